"""Whole responses of a micro-batch, of which a context-parallel rank holds only some tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cpgd.algorithm.surrogate import MAX_LOG_RATIO


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Which token belongs to which response, and how to see the tokens of the other ranks.

    Sequence-level methods only need values here, never gradients: their force on a token is closed
    form. So the one collective is a gather without gradient, and every rank does the arithmetic of
    a single one.
    """

    index: Tensor
    """[B, S] int64, the response of each loss-bearing token of the whole micro-batch, ascending in
    row-major order; -1 elsewhere."""
    gather: Callable[[Tensor], Tensor]
    """[B, S / cp] of this rank -> [B, S] of the whole micro-batch; collective over the CP group."""
    take: Callable[[Tensor], Tensor]
    """[B, S] -> [B, S / cp], the positions of this rank."""

    def mean(self, values: Tensor) -> Tensor:
        """The mean over its response at every token, 0 elsewhere. Collective over the CP group."""
        sums, counts = self._sums(values)
        return self._spread(sums / counts.clamp(min=1.0), values)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over its response at every token, 0 elsewhere. Collective over the CP group."""
        sums, _ = self._sums(values)
        return self._spread(sums, values)

    def prefix_min(self, log_ratio: Tensor) -> Tensor:
        """The smallest value among the earlier tokens of the response, 0 for its first token.

        Collective over the CP group.

        Args:
            log_ratio: this rank's, bounded by MAX_LOG_RATIO.
        """
        index = self.index.flatten()
        # A running minimum over all responses at once: each lies below all those before it.
        step = 4 * MAX_LOG_RATIO
        floor = -step * index.clamp(min=0).cummax(0).values.double()
        values = self.gather(log_ratio).flatten().double()
        running = (torch.where(index >= 0, values, MAX_LOG_RATIO) + floor).cummin(0).values
        previous = index.roll(1)
        previous[:1] = -1
        within = (previous == index) & (index >= 0)
        result = torch.where(within, running.roll(1) - floor, 0.0)
        return self.take(result.view(self.index.shape)).to(log_ratio.dtype)

    def _sums(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[n + 1] sums and token counts; slot 0 takes what is outside all responses."""
        slots = (self.index + 1).flatten()
        count = int(slots.max()) + 1 if len(slots) else 1
        zeros = torch.zeros(count, dtype=torch.float64, device=values.device)
        whole = self.gather(values).flatten().double()
        return zeros.index_add(0, slots, whole), zeros.index_add(0, slots, torch.ones_like(whole))

    def _spread(self, per_response: Tensor, like: Tensor) -> Tensor:
        whole = torch.where(self.index >= 0, per_response[self.index + 1], 0.0)
        return self.take(whole).to(like.dtype)


def one_rank_sequences(index: Tensor) -> Sequences:
    """Where one rank holds the whole micro-batch."""
    return Sequences(index=index, gather=lambda x: x, take=lambda x: x)
