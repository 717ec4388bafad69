"""Runs that stop by themselves: the weights have gone wrong, or trainer and engine differ."""

import json

import pytest

from tests.helpers.full_run import Command, read_rows, run_cli, settings, write_yaml


@pytest.fixture(scope="module")
def stopped(assets, tmp_path_factory):
    """(folder, finished command) of two runs on one rank each, side by side."""
    folder = tmp_path_factory.mktemp("stopped")
    yaml = write_yaml(folder / "run.yaml", settings(assets) | {"parallel": {}, "run": {"steps": 6}})

    def start(name: str, *changes: str) -> Command:
        return Command("train", yaml, f"run.dir={folder / name}", *changes, folder=folder)

    with (
        # The first optimizer step makes weights of 1e30, on which every gradient is NaN.
        start("diverged", "optim.lr=1e30", "tracking.max_bad_steps=5") as diverged,
        # Rounding alone exceeds this.
        start("unequal", "rollout.logprob_diff_limit=1e-12") as unequal,
    ):
        return {
            "diverged": (folder / "diverged", diverged.wait(200)),
            "unequal": (folder / "unequal", unequal.wait(200)),
        }


def test_a_diverged_run_stops_after_so_many_bad_steps_and_says_why(stopped):
    _, finished = stopped["diverged"]
    assert finished.code == 3
    assert finished.err.count("5 optimizer steps in a row were skipped") == 1
    assert "the last because gradient norm is nan" in finished.err
    assert "Traceback" not in finished.err


def test_skipped_steps_are_counted_with_their_reason(stopped):
    folder, _ = stopped["diverged"]
    rows = read_rows(folder / "metrics.jsonl")
    # 2 epochs of 2 mini-batches: one good step, three bad ones, and two more in the next row.
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[1]["policy/skipped_steps"] == 3
    assert rows[1]["policy/skipped_reason"] == "gradient norm is nan"


def test_the_state_of_a_diverged_run_is_saved_and_loadable(stopped, tmp_path):
    folder, finished = stopped["diverged"]
    checkpoint = folder / "checkpoints" / "step_000001"
    assert str(checkpoint) in finished.err
    assert (folder / "checkpoints" / "latest").read_text().strip() == checkpoint.name
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert (state["updates"], state["optimizer_steps"]) == (1, 6)
    converted = run_cli("convert", "megatron-to-hf", checkpoint, tmp_path / "hf", folder=tmp_path)
    assert converted.code == 0, converted.err


def test_a_log_prob_gap_over_the_limit_stops_the_run_before_it_trains(stopped):
    folder, finished = stopped["unequal"]
    assert finished.code == 3
    assert finished.err.count("exceeds rollout.logprob_diff_limit=1e-12") == 1
    assert "step 1: mean |trainer - engine| log-prob difference" in finished.err
    assert "Traceback" not in finished.err
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [0]
