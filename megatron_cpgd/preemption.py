"""The batch of a step, or the end of a run that was asked to stop, behind a checkpoint."""

import logging
from typing import Never

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
    decision = share_integer(decision)
    if decision != _GO_ON:
        _stop(run, step - 1, saves=decision == _SAVE_AND_STOP)
    run.stop.has_work = True
    return batch


def _take(run: Run, step: int, timer: StepTimer) -> ScoredBatch | None:
    """None if this is not rank 0, or was asked to stop: then prompts and queue are as before."""
    if not (run.prompts and run.batches):
        return None
    drawn, waiting = run.prompts.stream.state(), run.batches.waiting
    in_flight = run.sampler.in_flight if run.sampler else None
    groups = in_flight.copy_groups() if in_flight else []
    try:
        with run.stop.interruptible():
            run.batches.fill(step, timer)
    except StopRequested:
        run.prompts.stream.load_state(drawn)
        run.batches.waiting = waiting
        if in_flight:
            in_flight.groups = groups
        return None
    return run.batches.take(step, timer)


def _stop(run: Run, done: int, *, saves: bool) -> Never:
    if saves:
        save(run, done)
        publish(run, done)
    if run.policy.info.rank == 0:
        logger.info("stopped behind step %d as asked; the same command goes on from there", done)
    dist.barrier()  # srun ends all ranks when the first one does: not before `latest` is written
    raise RunStopped(f"stopped behind step {done}")
