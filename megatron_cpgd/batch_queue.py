"""Rank 0's batches between sampling and training: with stale rollouts some are always waiting."""

from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from megatron_cpgd.sampler import Sampler
from megatron_cpgd.scored_batch import ScoredBatch
from megatron_cpgd.tracking.timer import StepTimer

FILE = "batches.msgpack"
"""Inside a checkpoint: the batches that wait, if any."""


class BatchQueue:
    """Samples `staleness` batches ahead of the step that trains on them.

    The batch of step t is sampled by the weights after step max(0, t - 1 - staleness), as when
    sampling and training run side by side. At the end of the run nothing is left over.
    """

    def __init__(self, sampler: Sampler, *, staleness: int, last_step: int) -> None:
        """
        Args:
            staleness: 0 samples each batch right before its step.
            last_step: no batch is sampled for a later one.
        """
        self._sampler = sampler
        self._staleness = staleness
        self._last_step = last_step
        self._batches: deque[ScoredBatch] = deque()

    def take(self, step: int, timer: StepTimer) -> ScoredBatch:
        """The batch of a step; the engine holds the weights after the step before."""
        while len(self._batches) <= min(self._staleness, self._last_step - step):
            self._batches.append(self._sampler.sample(version=step - 1, timer=timer))
        return self._batches.popleft()

    def clear(self) -> None:
        """Forget the waiting batches; their prompts are not drawn again."""
        self._batches.clear()

    def files(self) -> dict[str, bytes]:
        """What a checkpoint has to hold for `load`, by file name."""
        if not self._batches:
            return {}
        return {FILE: msgspec.msgpack.encode(list(self._batches), enc_hook=_from_tensor)}

    def load(self, checkpoint: Path) -> None:
        """Wait with the batches that the checkpoint holds."""
        file = checkpoint / FILE
        if file.is_file():
            batches = msgspec.msgpack.decode(
                file.read_bytes(), type=list[ScoredBatch], dec_hook=_to_tensor
            )
            self._batches = deque(batches)


def _from_tensor(tensor: Any) -> Any:
    assert isinstance(tensor, Tensor)
    return str(tensor.dtype).removeprefix("torch."), tensor.tolist()


def _to_tensor(kind: type, stored: Any) -> Tensor:
    assert kind is Tensor
    dtype, values = stored
    return torch.tensor(values, dtype=getattr(torch, dtype))
