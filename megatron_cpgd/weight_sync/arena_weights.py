"""Weights through an arena on rank 0's host, which the ranks fill and the engines map."""

from typing import Protocol

from torch import Tensor

from megatron_cpgd.weight_sync.arena import remove_arena
from megatron_cpgd.weight_sync.sync import Sent
from megatron_cpgd.weights.engine_format import EngineFormat
from megatron_cpgd.weights.fingerprint import Fingerprints
from megatron_cpgd.weights.tensor_file import TensorFile


class TensorView(Protocol):
    """A tensor of the arena by its HF name."""

    def __call__(self, name: str, /) -> Tensor: ...


class WeightWriter(Protocol):
    """The part of a policy that this needs."""

    def write_engine_weights(self, view: TensorView | None, format: EngineFormat) -> Fingerprints:
        """Write this rank's share of the tensors that engines load and wait for the others; returns
        the sums of what they are to read."""

    def release(self) -> None:
        """Leave the GPUs to the engines, if they share them, and wait for the others."""


class ArenaWeights:
    """A WeightRoute."""

    def __init__(
        self, policy: WeightWriter, arena: TensorFile | None, format: EngineFormat
    ) -> None:
        """
        Args:
            arena: None on ranks that do not share rank 0's host.
            format: of what the engines load from it.
        """
        self._policy, self._arena, self._format = policy, arena, format

    def send(self, version: int, *, report: bool) -> Sent | None:
        """See WeightRoute.send."""
        view = self._arena.view if self._arena else None
        sums = self._policy.write_engine_weights(view, self._format)
        self._policy.release()  # the engines read the arena, so they may wake without the policy
        if not report:
            return None
        assert self._arena is not None, "rank 0 has an arena"
        return Sent(self._arena.path, self._arena.tensors, sums)

    def close(self) -> None:
        """Unmap the arena; rank 0 deletes it."""
        if self._arena:
            remove_arena(self._arena)
