"""The engine's model of any of its ranks, without their processes and their memory."""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_cpgd.config.schema import RolloutConfig
from megatron_cpgd.errors import ConfigError, ConversionError
from megatron_cpgd.rollout.vllm_compat import build_rank
from megatron_cpgd.weights.table import WeightTable, raise_problems
from megatron_cpgd.weights.tiling import Index, fills


def check_engine(folder: Path, table: WeightTable, rollout: RolloutConfig) -> list[int]:
    """Prove that vLLM's loaders take each element of each tensor, and fill every parameter.

    Ranks may hold the same part (norms; heads of keys if there are fewer than ranks), but their
    different parts must make up the tensor.

    Args:
        folder: with config.json.

    Returns:
        Parameters of each rank, stage by stage.

    Raises:
        ConfigError: the engine is cut in other ways too.
        ConversionError: names the tensors or parameters that are not.
    """
    arguments = rollout.engine_args
    if arguments.get("data_parallel_size", 1) != 1:
        raise ConfigError(
            f"rollout.engine_args.data_parallel_size={arguments['data_parallel_size']}: only "
            "tensor-parallel ranks of pipeline stages can be checked; remove it"
        )
    size, stages = (
        int(arguments.get(f"{axis}_parallel_size", 1)) for axis in ("tensor", "pipeline")
    )
    spread = bool(arguments.get("enable_expert_parallel"))
    parts: dict[str, dict[str, Index]] = {name: {} for name in table.hf_shapes}
    sizes = []
    for stage, rank in itertools.product(range(stages), range(size)):
        try:
            model = build_rank(
                folder, rank=rank, size=size, stage=stage, stages=stages, expert_parallel=spread
            )
        except (AssertionError, RuntimeError, ValueError) as error:  # by model
            raise ConversionError(
                f"vLLM refuses rollout.engine_args with pipeline_parallel_size={stages}, "
                f"tensor_parallel_size={size}: {error!r}"
            ) from error
        where = f"engine rank {stage * size + rank}"
        for name, indices in _rehearse(model, table, where).items():
            parts[name] |= {str(index): index for index in indices}
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    wrong = [
        f"{name}: vLLM takes {len(parts[name])} parts, which do not make up {list(shape)}"
        for name, shape in table.hf_shapes.items()
        if not fills(list(parts[name].values()), shape)
    ]
    raise_problems(f"the {len(sizes)} ranks of the engine do not take every element", wrong)
    return sizes


def _rehearse(model: nn.Module, table: WeightTable, where: str) -> dict[str, list[Index]]:
    """What `model.load_weights` takes of each tensor."""
    watcher = _LoadWatcher()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        # Loaders pull one tensor at a time, so copies made during a yield belong to its name.
        for name, (dtype, shape) in table.hf_tensors(torch.bfloat16).items():
            watcher.start(name, torch.empty(shape, dtype=dtype, device="meta"))
            yield name, watcher.source

    load_weights: Any = model.load_weights
    try:
        with watcher:
            load_weights(tensors())
    except (AssertionError, LookupError, RuntimeError, ValueError) as error:  # by kind of layer
        raise ConversionError(f"{where}: vLLM refuses {watcher.name}: {error!r}") from error
    wrong = [
        f"{name}: {watcher.filled[_storage(parameter)]} of {parameter.numel()} elements are filled"
        for name, parameter in model.named_parameters()
        if watcher.filled[_storage(parameter)] != parameter.numel()
    ]
    raise_problems(where, wrong)
    return watcher.taken


class _LoadWatcher(TorchDispatchMode):
    """Notes which part of the current tensor goes into which storage."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.taken: dict[str, list[Index]] = defaultdict(list)
        self.filled: dict[int, int] = defaultdict(int)
        """Elements written, by storage of a parameter."""

    def start(self, name: str, source: Tensor) -> None:
        """What is copied from now on comes from this tensor."""
        self.name, self.source = name, source

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.fill_.Scalar:  # padding of the vocabulary
            self.filled[_storage(args[0])] += args[0].numel()
        elif func is torch.ops.aten.copy_.default:
            target, part = args[:2]
            if target.shape != part.shape or _storage(part) != _storage(self.source):
                raise ConversionError(
                    f"{self.name}: vLLM copies {list(part.shape)} of something else into "
                    f"{list(target.shape)}"
                )
            self.filled[_storage(target)] += target.numel()
            self.taken[self.name].append(_index(part, self.source))
            return target
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _index(part: Tensor, source: Tensor) -> Index:
    """Where a view of rows, or rows and columns, lies in its tensor."""
    assert part.stride() == source.stride(), f"{part.stride()=} {source.stride()=}"
    index, offset = [], int(part.storage_offset())
    for stride, length in zip(source.stride(), part.shape, strict=True):
        start, offset = divmod(offset, stride)
        index.append(slice(start, start + length))
    return tuple(index)
