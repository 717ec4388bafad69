"""Runs that stop by themselves: the weights have gone wrong, or trainer and engine differ."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.full_run import Finished, read_rows, run_cli, settings, write_yaml

RUNS = {
    # The first optimizer step makes weights of 1e30, on which every gradient is NaN.
    "diverged": ("optim.lr=1e30", "stability.not_finite=5"),
    # Rounding alone exceeds this.
    "unequal": ("rollout.logprob_diff_limit=1e-12",),
}


def prepare(assets: Path, folder: Path) -> Callable[[], dict[str, tuple[Path, Finished]]]:
    """(folder, finished command) of two runs on one rank each."""
    yaml = write_yaml(folder / "run.yaml", settings(assets) | {"parallel": {}, "run": {"steps": 6}})

    def run(name: str) -> tuple[Path, Finished]:
        changes = (f"run.dir={folder / name}", *RUNS[name])
        return folder / name, run_cli("train", yaml, *changes, folder=folder)

    return lambda: {name: run(name) for name in RUNS}


@pytest.fixture(scope="module")
def stopped(prepared) -> dict[str, tuple[Path, Finished]]:
    return prepared


def test_a_diverged_run_stops_after_so_many_bad_steps_and_says_why(stopped):
    _, finished = stopped["diverged"]
    assert finished.code == 3
    # 2 epochs of 2 mini-batches: one good step and three bad ones, and then four more.
    expected = "step 2: not_finite since step 1: expected fewer than 5 optimizer steps in a row"
    assert finished.err.count(expected) == 2  # a line of the log, and the error
    assert "without an update, came 7; policy/skipped_reason names" in finished.err
    assert "there is no checkpoint from before that; start a new run" in finished.err
    assert "Traceback" not in finished.err


def test_skipped_steps_are_counted_with_their_reason(stopped):
    folder, _ = stopped["diverged"]
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row["policy/skipped_steps"] for row in rows[1:]] == [3, 4]
    assert [row["policy/skipped_in_a_row"] for row in rows[1:]] == [3, 7]
    assert rows[1]["policy/skipped_reason"] == "gradient norm is nan"
    assert rows[2]["stability/findings"] == ["not_finite"]


def test_broken_weights_are_not_saved(stopped):
    folder, _ = stopped["diverged"]
    assert not (folder / "checkpoints").exists()  # the one of step 2 was due


def test_a_log_prob_gap_over_the_limit_stops_the_run_before_it_trains(stopped):
    folder, finished = stopped["unequal"]
    assert finished.code == 3
    assert finished.err.count("exceeds rollout.logprob_diff_limit=1e-12") == 1
    assert "step 1: mean |trainer - engine| log-prob difference" in finished.err
    assert "Traceback" not in finished.err
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [0]
