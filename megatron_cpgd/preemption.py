"""The batch of a step, or the end of a run that was asked to stop, behind a checkpoint."""

import logging
from typing import Any, Never

import torch.distributed as dist

from megatron_cpgd.errors import RunStopped
from megatron_cpgd.policy.share import share_integer
from megatron_cpgd.run import Run, publish, save
from megatron_cpgd.scored_batch import ScoredBatch
from megatron_cpgd.stop_request import StopRequested
from megatron_cpgd.tracking.timer import StepTimer

logger = logging.getLogger(__name__)

_GO_ON, _STOP, _SAVE_AND_STOP = range(3)


def next_batch(run: Run, step: int, timer: StepTimer) -> ScoredBatch | None:
    """Rank 0's batch of a step; None on the other ranks. Collective over the world.

    A request to stop abandons the sampling; one that comes later waits for the end of the step.

    Raises:
        RunStopped: on every rank, rank 0 was asked to stop. The step before is saved, and a run
            that is resumed samples this one as if nothing had happened.
    """
    batch = _take(run, step, timer)
    decision = _GO_ON
    if run.batches and batch is None:
        done = run.folder.checkpoint(step - 1).name
        decision = _STOP if run.folder.latest() == done or step == 1 else _SAVE_AND_STOP
        if run.sampler and run.config.rollout.sleep:
            run.sampler.engine.close()  # it may still sample, on memory that a save needs
    decision = share_integer(decision)
    if decision == _SAVE_AND_STOP:
        save(run, step - 1)
        publish(run, step - 1)
    if decision != _GO_ON:
        stop_behind(run, step - 1)
    run.stop.has_work = True
    return batch


def finish_sampling(run: Run, timer: StepTimer, metrics: dict[str, Any]) -> bool:
    """Wait for what is sampled in the background, for later steps. Collective over the world.

    A run that was asked to stop waits for half of its time. Then it abandons the batch, and the
    next start samples one in its place, with newer weights.

    Returns:
        Whether it was abandoned: the engine is gone, the step is to be saved and the run to end.
    """
    if not run.config.rollout.overlap:
        return False
    finished: dict[str, float] | None = {}
    if run.batches and run.sampler:
        finished = run.batches.finish(timer, give_up=lambda: run.stop.late)
        if finished is None:
            logger.info("asked to stop: what is sampled in the background is abandoned")
            run.sampler.engine.close()
            run.batches.abandon()
        metrics |= finished or {}
    return share_integer(finished is None) == 1


def _take(run: Run, step: int, timer: StepTimer) -> ScoredBatch | None:
    """None if this is not rank 0, or was asked to stop: then prompts and queue are as before."""
    if run.batches is None:
        return None
    position = run.batches.position()
    try:
        with run.stop.interruptible():
            run.batches.fill(step, timer)
    except StopRequested:
        run.batches.return_to(position)
        return None
    return run.batches.take(step, timer)


def stop_behind(run: Run, done: int) -> Never:
    """End a run that was asked to stop. Collective over the world.

    Raises:
        RunStopped: always.
    """
    if run.policy.info.rank == 0:
        logger.info("stopped behind step %d as asked; the same command goes on from there", done)
    dist.barrier()  # srun ends all ranks when the first one does: not before `latest` is written
    raise RunStopped(f"stopped behind step {done}")
