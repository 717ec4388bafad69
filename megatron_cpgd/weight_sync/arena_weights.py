"""Weights through an arena on rank 0's host, which the ranks fill and the engines map."""

from typing import Protocol

from torch import Tensor

from megatron_cpgd.weight_sync.arena import Arena, remove_arena
from megatron_cpgd.weight_sync.sync import Sent


class TensorView(Protocol):
    """A tensor of the arena by its HF name."""

    def __call__(self, name: str, /) -> Tensor: ...


class WeightWriter(Protocol):
    """The part of a policy that this needs."""

    def write_weights(self, view: TensorView | None) -> None:
        """Write this rank's share of the full HF tensors and wait for the others."""

    def release(self) -> None:
        """Leave the GPUs to the engines, if they share them, and wait for the others."""


class ArenaWeights:
    """A WeightRoute."""

    def __init__(self, policy: WeightWriter, arena: Arena | None) -> None:
        """
        Args:
            arena: None on ranks that do not share rank 0's host.
        """
        self._policy = policy
        self._arena = arena

    def send(self, version: int, *, report: bool) -> Sent | None:
        """See WeightRoute.send."""
        self._policy.write_weights(self._arena.view if self._arena else None)
        if self._arena:
            self._arena.complete()
        self._policy.release()  # the engines read the arena, so they may wake without the policy
        if not report:
            return None
        assert self._arena is not None, "rank 0 has an arena"
        return Sent(self._arena.file.path, self._arena.file.digest())

    def close(self) -> None:
        """Unmap the arena; rank 0 deletes it."""
        if self._arena:
            remove_arena(self._arena)
