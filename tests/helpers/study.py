"""A small study whose runs are made up, and worker processes that only pretend to train."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import yaml

from megatron_cpgd.study.runs import StudyRun
from megatron_cpgd.study.worker import Broken, Ended
from tests.helpers.valid_run import write_run


def write_study(folder: Path, **changes: Any) -> Path:
    """A valid study file of two arms and two seeds; sections given replace those of it."""
    base = write_run(folder)
    content = {
        "name": "small",
        "prepare": "make things",
        "title": "A small study",
        "base": str(base),
        "settings": {"eval.sets.held": {"path": str(folder / "train.jsonl")}},
        "seeds": [0, 1],
        "reference": "cpgd",
        "collapse": {"window": 2},
        "arms": {"cpgd": {}, "grpo": {"algorithm.preset": "grpo"}},
        "questions": {"all": {"title": "Which one?", "arms": ["cpgd", "grpo"]}},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def make_up_run(run: StudyRun, accuracy: Sequence[float], **more: Any) -> None:
    """The folder of a run with these training accuracies; held-out ones are half of them."""
    metrics = {
        "rollout/response_tokens_mean": 9.0,
        "rollout/logprob_abs_diff_mean": 1e-7,
        "policy/entropy": 0.25,
        "policy/grad_norm": 0.5,
        "policy/kl_k3": 0.001,
        "policy/ratio_max": 2.0,
        "policy/masked_frac": 0.125,
    }
    rows: list[Mapping[str, Any]] = [{"step": 0, "eval/held/accuracy": 0.25}]
    rows += [
        {"step": t, "reward/accuracy": a, "eval/held/accuracy": a / 2} | metrics | more
        for t, a in enumerate(accuracy, start=1)
    ]
    run.folder.dir.mkdir(parents=True)
    run.folder.metrics.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run.folder.versions.write_text(json.dumps({"python": "3.12.1", "torch": "torch 2.11.0"}))
    run.write_done("finished", reason="", seconds=30.0)


def pretend(connection: Connection, parent_pid: int, folder: Path) -> None:
    """A worker that records every run at once, with its process id as the reason."""
    while run := connection.recv():
        run.folder.dir.mkdir(parents=True)
        run.write_done("finished", reason=str(os.getpid()), seconds=0.0)
        connection.send(Ended(outcome="finished", seconds=0.0))


def die_once(connection: Connection, parent_pid: int, folder: Path) -> None:
    """As `pretend`, but the first worker of all dies in its first run."""
    run = connection.recv()
    marker = folder.parent / "died"
    if not marker.exists():
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        os._exit(7)
    connection.send(_record(run))
    pretend(connection, parent_pid, folder)


def break_on_grpo(connection: Connection, parent_pid: int, folder: Path) -> None:
    """A worker that fails in every run of the arm grpo."""
    while run := connection.recv():
        if run.arm.name == "grpo":
            connection.send(Broken(reason="RolloutError: no engine"))
            return
        connection.send(_record(run))


def hang(connection: Connection, parent_pid: int, folder: Path) -> None:
    """A worker that never answers and leaves its process id in `folder`."""
    connection.recv()
    folder.mkdir(parents=True)
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)


def _record(run: StudyRun) -> Ended:
    run.folder.dir.mkdir(parents=True)
    run.write_done("finished", reason=str(os.getpid()), seconds=0.0)
    return Ended(outcome="finished", seconds=0.0)
