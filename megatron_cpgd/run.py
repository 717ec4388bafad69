"""One run on one rank: what is built at the start, and what is saved along the way."""

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_cpgd.batch_queue import BatchQueue
from megatron_cpgd.config.load import save_config
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.data.run_prompts import Prompts
from megatron_cpgd.files import write_text_atomic
from megatron_cpgd.planning.rates import StepRates, note_machine
from megatron_cpgd.policy.fp8 import require_fp8
from megatron_cpgd.policy.memory import PeakMemory
from megatron_cpgd.policy.parallel import init_model_parallel, join_world, leave_world
from megatron_cpgd.policy.policy import Policy
from megatron_cpgd.policy.reference import check_reference
from megatron_cpgd.policy.transformer_config import build_transformer_config, torch_dtype
from megatron_cpgd.rollout.engine import RolloutEngine
from megatron_cpgd.rollout.start import connect_engine_nodes, start_engine
from megatron_cpgd.sampler import Sampler
from megatron_cpgd.stability.detector import CollapseDetector
from megatron_cpgd.stop_request import StopRequest
from megatron_cpgd.tracking.console import step_line
from megatron_cpgd.tracking.logging import setup_logging
from megatron_cpgd.tracking.metrics import MetricsLog
from megatron_cpgd.tracking.run_folder import RunFolder
from megatron_cpgd.tracking.timer import StepTimer
from megatron_cpgd.weight_sync.routes import open_route
from megatron_cpgd.weight_sync.sync import WeightRoute
from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint, read_config
from megatron_cpgd.weights.hf_export import HfWriter
from megatron_cpgd.weights.registry import weight_table
from megatron_cpgd.weights.table import WeightTable

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything that lives as long as the run. What may be None is rank 0's."""

    config: ExperimentConfig
    folder: RunFolder
    policy: Policy
    table: WeightTable
    route: WeightRoute
    """Of the weights to the engines."""
    done: int
    """Steps that are finished."""
    bad_steps: int
    """Optimizer steps in a row that were skipped."""
    roll_backs: int
    """How often the run has gone back to an earlier checkpoint."""
    stop: StopRequest
    memory: PeakMemory
    prompts: Prompts | None = None
    sampler: Sampler | None = None
    batches: BatchQueue | None = None
    metrics: MetricsLog | None = None
    detector: CollapseDetector | None = None
    rates: StepRates | None = None


@contextmanager
def start_run(
    config: ExperimentConfig, engine: RolloutEngine | None = None, stop: StopRequest | None = None
) -> Iterator[Run]:
    """Build the run, or continue the one in run.dir. Collective: every rank calls it.

    Args:
        engine: rank 0's, see `train.train`.
        stop: see `train.train`.
    """
    rank = int(os.environ["RANK"])
    folder = RunFolder(config.run.dir)
    with ExitStack() as stack:
        # The others wait in join_world, so that a mistake of the user is reported by rank 0 alone.
        prompts, sampler = (
            _start_rank_0(config, folder, stack, engine) if rank == 0 else (None, None)
        )
        if not dist.is_initialized():  # else the caller has joined it, for several runs
            join_world(_longest_wait(config))
            stack.callback(_leave_world)
        if rank != 0:
            setup_logging(rank, folder.log(rank))
        checkpoint = stack.enter_context(HfCheckpoint.open(config.model.path))
        table = weight_table(checkpoint.config)
        memory = PeakMemory()
        info = init_model_parallel(config.parallel, seed=config.run.seed)
        policy = Policy(config, info, checkpoint, table)
        route = open_route(config, policy, table, sampler.engine if sampler else None)
        stack.callback(route.close)
        state = _resume(policy, folder)
        run = Run(
            config=config, folder=folder, policy=policy, table=table, route=route,
            done=state["step"], bad_steps=state["bad_steps"], roll_backs=state["roll_backs"],
            stop=stop or StopRequest(), memory=memory, prompts=prompts, sampler=sampler,
        )  # fmt: skip
        if prompts:
            _restore_rank_0(run, state, stack)
        yield run


def take_gpus(run: Run, timer: StepTimer) -> None:
    """Send engines that share the trainer's GPUs to sleep, and bring the policy back. Collective.

    The next `sync_weights` undoes both.
    """
    if not run.config.rollout.sleep:
        return
    with timer("sleep"):
        if run.sampler:
            run.sampler.engine.sleep()
        dist.barrier()
    with timer("reload"):
        run.policy.reload()


def log_step(run: Run, step: int, metrics: dict[str, Any]) -> None:
    """Write the step's row and show its line; rank 0 only does something."""
    if run.metrics is None:
        return
    run.metrics.append(step, metrics)
    sys.stdout.write(step_line(step, run.config.run.steps, metrics) + "\n")
    sys.stdout.flush()


def save(run: Run, step: int) -> None:
    """Write a checkpoint; `publish` makes it the one to resume from. Collective over the world."""
    state: dict[str, Any] = {
        "step": step, "bad_steps": run.bad_steps, "roll_backs": run.roll_backs
    }  # fmt: skip
    files = {}
    if run.prompts and run.batches and run.detector:
        state["prompts"] = run.prompts.stream.state()
        state["detector"] = run.detector.state()
        files = run.batches.files()
        if run.sampler and run.sampler.in_flight:
            files |= run.sampler.in_flight.files()
    run.policy.save(run.folder.checkpoint(step), state, files)


def publish(run: Run, step: int) -> None:
    """From now on the same command resumes behind `step`, whose row and files are complete."""
    run.stop.advanced = True
    if run.detector:  # rank 0
        point_latest_to(run.folder, step)
        _remove_old(run.folder, run.config.checkpoint.keep, run.detector.earliest_onset(step))


def point_latest_to(folder: RunFolder, step: int) -> None:
    """Make the checkpoint of `step` the one to resume from."""
    write_text_atomic(folder.checkpoints / "latest", f"{folder.checkpoint(step).name}\n")


def export(run: Run, step: int) -> None:
    """Write the policy as a Hugging Face folder. Collective over the world."""
    target = run.folder.hf(step)
    writer = None
    if run.policy.info.rank == 0:
        writer = HfWriter.create(
            target,
            table=run.table,
            source_dir=run.config.model.path,
            dtype=torch_dtype(run.config.precision.policy_weights),
            overwrite=True,  # what an interrupted run exported behind its last checkpoint
        )
    dist.barrier()
    if writer is None and run.policy.info.beside_rank_0:
        writer = HfWriter.attach(target)
    run.policy.write_weights(writer.view if writer else None)
    if writer and run.policy.info.rank == 0:
        writer.commit()
        logger.info("exported step %d to %s", step, target)
    elif writer:
        writer.close()


def note_skipped(run: Run, reason: str | None, step: int) -> None:
    """Count the optimizer steps in a row that were skipped; `guard` ends a run of too many."""
    run.bad_steps = run.bad_steps + 1 if reason else 0
    if reason:
        logger.warning(
            "step %d: optimizer step skipped, %s (%d in a row)", step, reason, run.bad_steps
        )


def _start_rank_0(
    config: ExperimentConfig, folder: RunFolder, stack: ExitStack, engine: RolloutEngine | None
) -> tuple[Prompts, Sampler]:
    """Check all that the user gave, before anything is written or started; then start sampling."""
    _check_model(config)
    prompts = Prompts(config)
    stack.enter_context(folder.claim())
    setup_logging(0, folder.log(0))
    folder.write_versions()
    note_machine(folder.machine, config.tracking.machine, _gpu_name())
    if engine is None:
        engine = (
            connect_engine_nodes(config, folder, os.environ["MASTER_ADDR"])
            if config.rollout.nodes
            else start_engine(config, folder.logs / "engine.log")
        )
        stack.callback(engine.close)
        if config.rollout.sleep:
            engine.sleep()  # it measures its memory on empty GPUs: the ranks have nothing there yet
    sampler = Sampler(config, prompts, engine)
    stack.callback(sampler.close)
    return prompts, sampler


def _gpu_name() -> str | None:
    """As the driver has it; None on CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _check_model(config: ExperimentConfig) -> None:
    with HfCheckpoint.open(config.model.path) as checkpoint:
        checkpoint.check(weight_table(checkpoint.config))
        require_fp8(config.precision)
        build_transformer_config(checkpoint.config, config.model, config.parallel, config.precision)
        check_reference(config, checkpoint)


def _longest_wait(config: ExperimentConfig) -> timedelta:
    """Of the other ranks for rank 0, whose waits for the engine have deadlines of their own.

    In one collective's wait fall the start of the engine or a refresh, all evaluations, and the
    generations and rewards of a step and of those that are to wait.
    """
    batches = (1 + config.rollout.staleness) * (config.algorithm.filter.max_batches or 1)
    calls = 1 + batches + len(config.eval.sets)
    engine = config.rollout.start_timeout_s + calls * config.rollout.step_timeout_s
    return timedelta(seconds=engine, hours=batches)


def _resume(policy: Policy, folder: RunFolder) -> dict[str, Any]:
    """Load the newest checkpoint, if there is one; returns its trainer state."""
    latest = folder.latest()
    if latest is None:
        return {"step": 0, "bad_steps": 0, "roll_backs": 0}
    path = folder.checkpoints / latest
    state = policy.load(path)
    logger.info("resumed from %s", path)
    return state


def _restore_rank_0(run: Run, state: dict[str, Any], stack: ExitStack) -> None:
    assert run.prompts and run.sampler
    rollout = run.config.rollout
    run.batches = BatchQueue(
        run.sampler,
        staleness=rollout.staleness,
        last_step=run.config.run.steps,
        overlap=rollout.overlap,
    )
    stack.callback(run.batches.close)
    run.detector = CollapseDetector(run.config.stability)
    run.rates = StepRates(read_config(run.config.model.path), run.config, _gpu_name())
    if "prompts" in state:
        run.prompts.stream.load_state(state["prompts"])
        run.batches.load(run.folder.checkpoint(run.done))
        if run.sampler.in_flight:
            run.sampler.in_flight.load(run.folder.checkpoint(run.done))
        run.detector.load_state(state["detector"])
    for step in run.folder.checkpoint_steps():
        if step > run.done:  # will be written anew, as all files of later steps
            shutil.rmtree(run.folder.checkpoint(step))
    run.metrics = MetricsLog(run.folder.metrics, resumed_step=run.done if run.done else None)
    save_config(run.config, run.folder.config)


def _remove_old(folder: RunFolder, keep: int, onset: int) -> None:
    """Keep the newest checkpoints, and the newest one before `onset`: a run may go back to it."""
    steps = folder.checkpoint_steps()
    kept = {*steps[-keep:], *[step for step in steps if step < onset][-1:]}
    for step in steps:
        if step not in kept:
            shutil.rmtree(folder.checkpoint(step))


def _leave_world() -> None:
    if sys.exc_info()[0] is None:  # after an error the other ranks may be anywhere
        leave_world()
