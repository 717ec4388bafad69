"""The part of a weight refresh that runs inside vLLM's worker processes."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cpgd.errors import ConversionError, WeightSyncError
from megatron_cpgd.rollout.assemble import AssembledWeights, TrainerMemory
from megatron_cpgd.rollout.expected_tensors import ExpectedTensors, checkpoint_tensors
from megatron_cpgd.rollout.vllm_compat import (
    layerwise_reload,
    parameters_on_meta,
    reads_fp8_blocks,
)
from megatron_cpgd.rollout.vllm_gpt_oss import writable
from megatron_cpgd.weights.fingerprint import Fingerprints
from megatron_cpgd.weights.pieces import is_piece_list
from megatron_cpgd.weights.quantize import FP8, Tensors, quantized_tensors
from megatron_cpgd.weights.tensor_file import TensorFile

logger = logging.getLogger(__name__)


class WeightReceiver:
    """Loads an arena, or the weights that a piece list describes, into a running engine.

    vLLM's own weight-transfer engines cannot answer the caller and need three remote calls, which
    leave some workers in the middle of an update when one of them fails. Here a refresh is one
    call, and its answer says what every worker has read.
    """

    model_runner: Any
    vllm_config: Any
    device: torch.device
    rank: int
    _cpgd_expected: ExpectedTensors
    _cpgd_memory: TrainerMemory | None = None

    def cpgd_refresh(self, arena: str) -> dict[str, Any]:
        """Load an arena or a piece list.

        Returns:
            A receipt with `error`, or with `tensors`, `nbytes` and `fingerprints`; of an arena,
            which all workers map, only of this worker's share of the tensors.
        """
        try:
            return self._cpgd_load(Path(arena))
        except Exception as error:
            if not isinstance(error, (WeightSyncError, ConversionError)):
                logger.exception("weight refresh from %s broke off", arena)
            # An exception would lose its type on the way between processes.
            return {"error": f"{error}" or repr(error)}

    def _cpgd_load(self, path: Path) -> dict[str, Any]:
        model, model_config = self.model_runner.model, self.vllm_config.model_config
        if not hasattr(self, "_cpgd_expected"):
            tensors = checkpoint_tensors(Path(model_config.model))
            if reads_fp8_blocks(self.vllm_config):
                tensors = quantized_tensors(tensors)
            self._cpgd_expected = ExpectedTensors(tensors, loadable_names(model, tensors))
        with self._cpgd_open(path) as arena:
            self._cpgd_expected.check(arena.tensors)
            with layerwise_reload(model, model_config):
                model.load_weights((name, writable(name, arena.view(name))) for name in arena.names)
            return {
                "tensors": len(arena.names), "nbytes": arena.nbytes,
                "fingerprints": self._cpgd_fingerprints(arena),
            }  # fmt: skip

    def _cpgd_fingerprints(self, arena: TensorFile | AssembledWeights) -> Fingerprints:
        if isinstance(arena, AssembledWeights):
            return arena.fingerprints()  # each worker has put them together itself
        return arena.fingerprints(
            arena.names[self.rank :: self.vllm_config.parallel_config.world_size]
        )

    def _cpgd_open(self, path: Path) -> AbstractContextManager[TensorFile | AssembledWeights]:
        if not is_piece_list(path):
            return TensorFile.open(path)
        if self._cpgd_memory is None or not self._cpgd_memory.is_of(path):
            self._cpgd_memory = None  # lets go of the memory of an earlier run
            self._cpgd_memory = TrainerMemory(path, self.device)
        return nullcontext(AssembledWeights(self._cpgd_memory))


def loadable_names(model: nn.Module, tensors: Tensors) -> set[str]:
    """Those of the tensors that `model.load_weights` copies into a parameter.

    Found by a rehearsal with tensors without storage: only the loaders know which names they skip.

    Raises:
        WeightSyncError: this vLLM quantises other layers than `weights/quantize.py`.
    """
    used: set[str] = set()
    load_weights: Any = model.load_weights
    watcher = _CopyWatcher()

    def rehearse() -> Iterator[tuple[str, Tensor]]:
        # Loaders pull one tensor at a time, so copies made during a yield belong to its name.
        for name, (dtype, shape) in tensors.items():
            watcher.name, before = name, watcher.copies
            yield name, torch.empty(shape, dtype=dtype, device="meta")
            if watcher.copies > before:
                used.add(name)

    with parameters_on_meta(model), watcher:
        load_weights(rehearse())
    return used


class _CopyWatcher(TorchDispatchMode):
    """Counts `Tensor.copy_`, the last act of every loader, and does not carry it out.

    A copy between FP8 and another format would be carried out without a word, and without factors.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies = 0
        self.name = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.copies += 1
            target, source = args[0].dtype, args[1].dtype
            if target != source and FP8 in (target, source):
                raise WeightSyncError(
                    f"{self.name}: vLLM keeps it in {target} and would get {source}; this release "
                    "of vLLM is not supported with FP8"
                )
            return args[0]
        return func(*args, **(kwargs or {}))
