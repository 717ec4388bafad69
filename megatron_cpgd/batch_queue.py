"""Rank 0's batches between sampling and training: with stale rollouts some are always waiting."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from megatron_cpgd.sampler import Sampler, SamplerPosition
from megatron_cpgd.scored_batch import ScoredBatch
from megatron_cpgd.tracking.timer import StepTimer

FILE = "batches.msgpack"
"""Inside a checkpoint: the batches that wait, if any."""
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """How far the sampling has come."""

    sampler: SamplerPosition
    waiting: tuple[ScoredBatch, ...]


class BatchQueue:
    """Samples `staleness` batches ahead of the step that trains on them.

    The batch of step t is sampled by the weights after step max(0, t - 1 - staleness). With
    `overlap` that happens while an earlier step trains, else before it does; the batches are the
    same. At the end of the run nothing is left over.
    """

    def __init__(
        self, sampler: Sampler, *, staleness: int, last_step: int, overlap: bool = False
    ) -> None:
        """
        Args:
            staleness: 0 samples each batch right before its step.
            last_step: no batch is sampled for a later one.
            overlap: sample what no step needs yet in a thread; needs a staleness.
        """
        assert staleness > 0 or not overlap, f"{staleness=} {overlap=}"
        self._sampler = sampler
        self._staleness = staleness
        self._last_step = last_step
        self._batches: deque[ScoredBatch] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling") if overlap else None
        self._ahead: Future[float] | None = None
        self._before_ahead: QueuePosition | None = None

    def take(self, step: int, timer: StepTimer) -> ScoredBatch:
        """The batch of a step; the engine holds the weights after the step before."""
        self.fill(step, timer)
        batch = self._batches.popleft()
        if self._thread:
            self._before_ahead = self.position()
            waiting = min(self._staleness, self._last_step - step)
            self._ahead = self._thread.submit(self._fill_ahead, step + 1, waiting, step - 1)
        return batch

    def fill(self, step: int, timer: StepTimer) -> None:
        """Sample all that `take` has to wait for."""
        assert self._ahead is None, "finish the sampling of the step before"
        waiting = min(self._staleness, self._last_step - step)
        self._fill(step, 1 if self._thread else 1 + waiting, step - 1, timer)

    def finish(
        self, timer: StepTimer, give_up: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Wait for what is sampled in the background; the engine may then get other weights.

        Args:
            give_up: asked while it waits; None is returned if it says so, and the sampling goes on.

        Raises:
            RolloutError, WeightSyncError: as `RolloutEngine.generate`.
        """
        if self._ahead is None:
            return {}
        with timer("wait"):
            while not wait([self._ahead], POLL_S).done:
                if give_up():
                    return None
            seconds = self._ahead.result()
        self._ahead = None
        return {"time/background_s": seconds}

    def abandon(self) -> None:
        """Go back to before what is sampled in the background. Call it after closing the engine,
        which ends the sampling."""
        if self._ahead is not None and self._before_ahead is not None:
            self._ahead.exception()  # waits
            self._ahead = None
            self.return_to(self._before_ahead)

    def position(self) -> QueuePosition:
        """What `return_to` needs."""
        return QueuePosition(self._sampler.position(), self.waiting)

    def return_to(self, position: QueuePosition) -> None:
        """As if nothing had been sampled since."""
        self._sampler.return_to(position.sampler)
        self._batches = deque(position.waiting)

    def close(self) -> None:
        """Sample nothing more. Does not wait: closing the engine ends what goes on."""
        if self._thread:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _fill(self, step: int, count: int, version: int, timer: StepTimer) -> None:
        """Have `count` batches wait, the first of them for `step`."""
        while len(self._batches) < count:
            trains = step + len(self._batches)
            self._batches.append(self._sampler.sample(step=trains, version=version, timer=timer))

    def _fill_ahead(self, step: int, count: int, version: int) -> float:
        """As `_fill`, in the background; returns the seconds."""
        timer = StepTimer()
        self._fill(step, count, version, timer)
        return timer.finish_step()["time/total_s"]

    @property
    def waiting(self) -> tuple[ScoredBatch, ...]:
        """The batches of the next steps."""
        return tuple(self._batches)

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
