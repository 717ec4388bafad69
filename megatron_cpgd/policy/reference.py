"""The reference policy: weights on the host that trade places with the live ones for one pass."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import ConfigError, ConversionError
from megatron_cpgd.policy.parallel import ParallelInfo
from megatron_cpgd.policy.shards import import_shard, iter_weights
from megatron_cpgd.policy.transformer_config import computation
from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
from megatron_cpgd.weights.registry import weight_table
from megatron_cpgd.weights.table import WeightTable

PIECE_BYTES = 16 * 2**20
"""What is exchanged at a time, and so what the device needs on top. torch rounds every pinned
allocation up to a power of two: pieces of one lose nothing, whole parameters up to half."""


class ReferenceWeights:
    """This rank's shard of a second model of the same architecture, in the live one's format."""

    def __init__(
        self, chunks: list[Any], table: WeightTable, checkpoint: HfCheckpoint, info: ParallelInfo
    ) -> None:
        """Read the shard from the Hugging Face checkpoint; the live weights are not touched."""
        self._kept = [
            (tensor, _read(name, tensor, table, checkpoint, info))
            for name, tensor in iter_weights(chunks, info)
        ]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the live weights hold the reference; then they have their own bits again.

        Only values move. Each tensor stays in its storage, which DDP and the optimizer alias.
        """
        with ExitStack() as stack:
            for tensor, kept in self._kept:
                for live, reference in zip(_pieces(tensor), kept, strict=True):
                    _exchange(live, reference)
                    stack.callback(_exchange, live, reference)
            yield


def check_reference(config: ExperimentConfig, policy: HfCheckpoint) -> None:
    """Refuse a reference that is not the policy with other weights; nothing to do without one.

    Raises:
        ConfigError: its config.json describes another computation.
        ConversionError: a file is missing or damaged, or its tensors do not fit.
    """
    path = config.reference_path
    if path is None or path == config.model.path:
        return
    try:
        with HfCheckpoint.open(path) as reference:
            reference.check(weight_table(reference.config))
            found = computation(reference.config, config)
    except ConversionError as error:
        raise ConversionError(f"algorithm.reference.path={path}: {error}") from error
    expected = computation(policy.config, config)
    differences = [
        f"{name}={found.get(name)!r} instead of {expected.get(name)!r}"
        for name in expected | found
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise ConfigError(
            f"algorithm.reference.path={path}: not the architecture of model.path="
            f"{config.model.path}: {', '.join(differences)}; give a model that differs from it in "
            "its weights only"
        )


def _read(
    name: str, tensor: Tensor, table: WeightTable, checkpoint: HfCheckpoint, info: ParallelInfo
) -> list[Tensor]:
    """The reference's values of one weight, in pieces on the host."""
    whole = torch.empty_like(tensor, device="cpu", requires_grad=False)
    import_shard(table.entry(name), whole, checkpoint.read, info)
    return [piece.pin_memory() if tensor.is_cuda else piece for piece in _pieces(whole)]


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensor's values in order, as flat views of at most PIECE_BYTES."""
    flat = tensor.detach().view(-1)
    return torch.split(flat, PIECE_BYTES // tensor.element_size())


def _exchange(live: Tensor, kept: Tensor) -> None:
    """Swap the values of two tensors, one of them on the host.

    All copies are in order on the stream that also computes, so nobody has to wait for them.
    """
    before = live.clone()
    live.copy_(kept, non_blocking=True)
    kept.copy_(before, non_blocking=True)
