"""Weights, gradients and optimizer state leave the device while the engine works, and come back.

Storages shrink to nothing and grow again; the tensors on them stay: parameters, the buffers of DDP,
the optimizer's shards and moments, and all views that these share. What comes back has the same
bits. megatron-core's own `MegatronOptimizer.offload_to_cpu` gives tensors new storages instead,
which cuts fp32 weights off from the optimizer's views of them.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage

PIECE_BYTES = 64 * 2**20
"""Of the host memory. torch rounds every pinned allocation up to a power of two."""


class DeviceState:
    """What a rank holds on its device between steps."""

    def __init__(self, models: list[Any], optimizer: Any) -> None:
        """
        Args:
            models: wrapped in DDP.
            optimizer: Megatron's.
        """
        self._models = models
        self._optimizer = optimizer
        self._host: list[Tensor] = []  # kept: pinning memory takes seconds
        self._kept: list[tuple[UntypedStorage, int]] = []
        self._dropped: list[tuple[UntypedStorage, int]] = []

    def offload(self) -> None:
        """Copy weights and optimizer state to the host and free them; gradients are let go.

        Nothing may touch the tensors before `reload`.
        """
        if self._kept:  # is away
            return
        self._kept = _storages(self._lasting())
        self._dropped = _storages(
            buffer.grad_data
            for model in self._models
            for buffer in [*model.buffers, *model.expert_parallel_buffers]
        )
        for on_device, on_host in self._pieces():
            on_host.copy_(on_device, non_blocking=True)
        _synchronize()
        for storage, _ in self._kept + self._dropped:
            storage.resize_(0)

    def reload(self) -> None:
        """Undo `offload`, if need be; gradients have no values, a step clears them first."""
        for storage, nbytes in self._kept + self._dropped:
            storage.resize_(nbytes)
        for on_device, on_host in self._pieces():
            on_device.copy_(on_host, non_blocking=True)
        _synchronize()
        self._kept, self._dropped = [], []

    def _lasting(self) -> Iterator[Tensor]:
        """Parameters, and what the optimizer keeps: fp32 copies and moments."""
        for model in self._models:
            yield from model.parameters()
        for part in self._optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                yield from group["params"]
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(device, host) views of the same length, which cover every byte that is kept."""
        place = 0
        for storage, nbytes in self._kept:
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            start = 0
            while start < nbytes:
                number, offset = divmod(place, PIECE_BYTES)
                if number == len(self._host):
                    pinned = storage.device.type == "cuda"
                    self._host.append(
                        torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=pinned)
                    )
                length = min(nbytes - start, PIECE_BYTES - offset)
                yield (
                    flat[start : start + length],
                    self._host[number][offset : offset + length],
                )
                start, place = start + length, place + length


def _storages(tensors: Iterable[Tensor]) -> list[tuple[UntypedStorage, int]]:
    """Each storage on the device once, with its size in bytes."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    device = storages[0].device  # of a weight or a gradient; Adam's step may be on the host
    unique = {storage.data_ptr(): storage for storage in storages if storage.device == device}
    return [(storage, storage.nbytes()) for storage in unique.values() if storage.nbytes()]


def _synchronize() -> None:
    """Wait until all copies are made: the memory may go to another stream or process next."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
