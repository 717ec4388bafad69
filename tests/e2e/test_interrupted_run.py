"""A run that is stopped, then killed in four ways, and ends like an undisturbed one.

Its engine sleeps while the trainer works, and the trainer's state is away while the engine does; of
the undisturbed run both stay. On CPU vLLM frees nothing: tests/e2e/inside_engine_process.py.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from megatron_cpgd.errors import STOPPED
from megatron_cpgd.weight_sync.shared_memory import SHARED_MEMORY, arena_path
from tests.helpers.full_run import (
    Command,
    Finished,
    read_rows,
    run_cli,
    settings,
    write_yaml,
)

SECONDS_TO_END = 60.0
"""From a fault to the end of every process: two on a quiet machine, more where tests pile up."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What one start of the run left behind when it was disturbed."""

    finished: Finished
    rows: list[int]
    """Steps in metrics.jsonl."""
    arena: Path
    """Shared memory of this start."""
    arena_was_there: bool
    """When it was disturbed."""
    arena_is_left: bool


@dataclass(frozen=True, slots=True)
class InterruptedRun:
    """The run and what happened to it, in this order."""

    yaml: Path
    dir: Path
    stopped: Fault
    """SIGUSR1 for the launcher, after step 1."""
    killed: Fault
    """SIGKILL for the launcher's process group, after step 3."""
    without_engine: Fault
    """SIGKILL for the engine, after step 3 for the second time."""
    without_rank_1: Fault
    """SIGKILL for a trainer rank, after step 5."""
    terminated: Fault
    """SIGTERM for the launcher, while the engine starts."""
    finished: Finished


def prepare(assets: Path, folder: Path) -> Callable[[], InterruptedRun]:
    content = settings(assets)
    content["run"]["dir"] = str(folder / "run")
    content["rollout"]["sleep"] = content["optim"]["offload"] = True
    return partial(interrupt, write_yaml(folder / "run.yaml", content), folder)


def interrupt(yaml: Path, folder: Path) -> InterruptedRun:
    run_dir = folder / "run"

    def disturb(after: str, victim) -> Fault:
        with Command("train", yaml, folder=folder) as command:
            command.wait_for_output(after)
            arena = SHARED_MEMORY / arena_path(command.rank(0)).name
            arena_was_there = arena.exists()
            process_id, number = victim(command)
            os.kill(process_id, number)
            finished = command.wait(SECONDS_TO_END)
            command.wait_until_nothing_runs(SECONDS_TO_END)
        rows = [row["step"] for row in read_rows(run_dir / "metrics.jsonl")]
        return Fault(finished, rows, arena, arena_was_there, arena.exists())

    return InterruptedRun(
        yaml=yaml,
        dir=run_dir,
        stopped=disturb("step 1/6", lambda command: (command.pid, signal.SIGUSR1)),
        killed=disturb("step 3/6", lambda command: (-command.pid, signal.SIGKILL)),
        without_engine=disturb("step 3/6", lambda command: (command.engine(), signal.SIGKILL)),
        without_rank_1=disturb("step 5/6", lambda command: (command.rank(1), signal.SIGKILL)),
        terminated=disturb("resumed from", lambda command: (command.pid, signal.SIGTERM)),
        finished=run_cli("train", yaml, folder=folder),
    )


@pytest.fixture(scope="module")
def interrupted(prepared) -> InterruptedRun:
    return prepared


def test_a_killed_launcher_takes_all_processes_along(interrupted):
    # `interrupted` has waited for every process of the command to end.
    assert interrupted.killed.finished.code == -signal.SIGKILL
    assert interrupted.killed.rows[-1] >= 3


# Whichever run starts next: others start meanwhile.
def test_the_next_start_removes_the_shared_memory_of_a_killed_one(interrupted):
    assert interrupted.killed.arena_was_there  # and nobody was left to remove it
    assert not interrupted.killed.arena.exists()


def test_a_dead_engine_ends_the_run_with_one_message(interrupted):
    finished = interrupted.without_engine.finished
    assert finished.code == 3
    assert finished.err.count("the engine was killed by SIGKILL") == 1
    assert "Traceback" not in finished.err
    assert "exited with code" not in finished.err  # rank 0 has given the reason
    assert not interrupted.without_engine.arena_is_left


def test_a_dead_rank_ends_the_run_and_is_named(interrupted):
    finished = interrupted.without_rank_1.finished
    assert finished.code == 128 + signal.SIGKILL
    assert finished.err.count("rank 1 was killed by SIGKILL (out of memory?)") == 1
    assert not interrupted.without_rank_1.arena_is_left


def test_sigterm_ends_everything(interrupted):
    assert interrupted.terminated.finished.code == 128 + signal.SIGTERM
    assert "Traceback" not in interrupted.terminated.finished.err
    assert not interrupted.terminated.arena_is_left


def test_a_run_that_is_asked_to_stop_saves_the_last_step_first(interrupted):
    finished, last = interrupted.stopped.finished, interrupted.stopped.rows[-1]
    assert finished.code == STOPPED, finished.err
    assert last in (1, 2)  # 2 if the signal came after the sampling; it is saved anyway, 1 is not
    assert f"stopped behind step {last} as asked" in finished.err
    assert "Traceback" not in finished.err
    assert not interrupted.stopped.arena_is_left
    assert f"resumed from {interrupted.dir}/checkpoints/step_00000{last}" in (
        interrupted.killed.finished.err
    )


def test_the_same_command_finishes_the_run(interrupted):
    assert interrupted.finished.code == 0, interrupted.finished.err
    assert "resumed from" in interrupted.finished.err
    rows = read_rows(interrupted.dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7))


def test_an_interrupted_run_samples_and_learns_exactly_what_an_undisturbed_one_does(
    complete_run, interrupted
):
    expected, actual = (read_rows(run.dir / "metrics.jsonl") for run in (complete_run, interrupted))
    assert all(row["time/sleep_s"] > 0 and row["time/reload_s"] > 0 for row in actual[1:])
    assert not any("time/sleep_s" in row for row in expected)
    for left, right in zip(expected, actual, strict=True):
        same = {name for name in left if not name.startswith(("time/", "perf/"))}
        assert {name: left[name] for name in same} == {name: right[name] for name in same}
    for step in range(1, 7):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (complete_run.dir / name).read_bytes() == (interrupted.dir / name).read_bytes()
    weights = "hf/step_000006/model.safetensors"
    assert (complete_run.dir / weights).read_bytes() == (interrupted.dir / weights).read_bytes()


def test_a_finished_run_is_left_as_it_is(interrupted, tmp_path):
    def state() -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns
            for path in interrupted.dir.rglob("*")
            if path.is_file() and path.name != "learning_curve.png"
        }

    before = state()
    again = run_cli("train", interrupted.yaml, folder=tmp_path)
    assert again.code == 0, again.err
    assert "7 steps" in again.out and "reward/mean" in again.out
    assert "step 6/6" not in again.out
    assert state() == before


def test_another_configuration_does_not_continue_the_run(interrupted, tmp_path):
    refused = run_cli("train", interrupted.yaml, "optim.lr=1e-3", folder=tmp_path)
    assert refused.code == 2
    assert f"optim.lr: the run in {interrupted.dir} has 0.01, now 0.001" in refused.err
