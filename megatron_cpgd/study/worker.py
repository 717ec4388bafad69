"""A process that trains one run after the other on one engine."""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import TrainingDivergedError
from megatron_cpgd.study.runs import Outcome, StudyRun

_ENGINE_LOG = "engine.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Answer of a worker: the run is recorded as done."""

    outcome: Outcome
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """Answer of a worker: the run failed, and the worker ends."""

    reason: str


def work(connection: Connection, parent_pid: int, folder: Path) -> None:
    """Answer every StudyRun with Ended or Broken, until None comes. A process of its own.

    Args:
        folder: for the logs of this worker.
    """
    from megatron_cpgd.rollout.lifetime import end_with_parent

    end_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    folder.mkdir(parents=True, exist_ok=True)
    _redirect_output(folder / "worker.log")
    _become_only_rank()
    with ExitStack() as stack:
        train: Callable[[ExperimentConfig], None] | None = None
        key: Any = None
        while run := connection.recv():
            start = time.monotonic()
            try:
                if train is None or _engine_key(run.config) != key:
                    stack.close()
                    train, key = _start(run.config, folder, stack), _engine_key(run.config)
                outcome = _train(run, train, start)
            except Exception as error:
                traceback.print_exc()
                connection.send(Broken(reason=f"{type(error).__name__}: {error}"))
                return
            connection.send(Ended(outcome=outcome, seconds=time.monotonic() - start))


def _train(run: StudyRun, train: Callable[[ExperimentConfig], None], start: float) -> Outcome:
    run.clear()
    outcome: Outcome = "finished"
    reason = ""
    try:
        train(run.config)
    except TrainingDivergedError as error:
        outcome, reason = "diverged", str(error)
    run.write_done(outcome, reason=reason, seconds=time.monotonic() - start)
    return outcome


def _start(
    config: ExperimentConfig, folder: Path, stack: ExitStack
) -> Callable[[ExperimentConfig], None]:
    """Join a world of one rank and start the engine; the import takes seconds."""
    import torch
    import torch.distributed as dist

    from megatron_cpgd.policy.parallel import join_world
    from megatron_cpgd.rollout.reused_engine import ReusedEngine
    from megatron_cpgd.rollout.start import start_engine
    from megatron_cpgd.train import train

    torch.set_num_threads(1)
    if not dist.is_initialized():
        join_world(timedelta(hours=1))
    engine = ReusedEngine(start_engine(config, folder / _ENGINE_LOG))
    stack.callback(engine.close)

    def train_on_engine(run_config: ExperimentConfig) -> None:
        engine.begin_run()
        train(run_config, engine)

    return train_on_engine


def _engine_key(config: ExperimentConfig) -> Any:
    """What the engine was started with; runs that agree in it share one."""
    rollout = config.rollout
    return (
        config.model,
        config.precision,
        config.data.max_prompt_tokens + rollout.max_response_tokens,
        rollout.engine_args,
        rollout.engines,
        rollout.devices,
        config.needs_rollout_routes,
    )


def _become_only_rank() -> None:
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",  # any
    }  # fmt: skip


def _redirect_output(path: Path) -> None:
    """What training prints goes to a file, also from children."""
    logging.captureWarnings(True)
    with path.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
