"""A run that collapses twice: it goes back to a checkpoint once, and then ends."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.full_run import Finished, read_rows, run_cli, settings, write_yaml

SPOILED = (4, 5, 9, 10)
"""Batches, in the order of the data, whose rewards are all 0; two in a row are a finding. Batch 6
waits when the run goes back at step 5, and is dropped: steps 8 and 9 train on 9 and 10."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of the run, and what lay in its folder afterwards."""

    finished: Finished
    rows: list[dict[str, Any]]
    checkpoints: list[str]
    latest: str


def prepare(assets: Path, folder: Path) -> Callable[[], list[Attempt]]:
    """The run and, by the same command, its repetition from the last good checkpoint."""
    # Read in order, 8 problems make a step.
    problems = [json.loads(line) for line in (assets / "train.jsonl").read_text().splitlines()]
    rows = [problems[i % len(problems)] | {"spoiled": 1 + i // 8 in SPOILED} for i in range(8 * 12)]
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    content = settings(assets) | {
        "run": {"steps": 10, "dir": str(folder / "run")},
        "rewards": {
            "workers": 1,
            "functions": [
                {"type": "python", "path": "tests.helpers.spoiled_reward.spoiled_reward"}
            ],
        },
        "eval": {},
        "checkpoint": {"every": 2, "keep": 1},
        "stability": {
            "action": "roll_back", "window": 4, "patience": 2, "max_roll_backs": 1,
            "reward_drop": 0.5, "mismatch": None, "drift_explosion": None, "ratio_explosion": None,
            "gradient_explosion": None, "length_explosion": None, "length_collapse": None,
        },
    }  # fmt: skip
    content["rollout"] |= {"staleness": 1}
    content["data"] |= {"path": str(folder / "train.jsonl"), "shuffle": False}
    yaml = write_yaml(folder / "run.yaml", content)
    return lambda: [_attempt(yaml, folder) for _ in range(2)]


@pytest.fixture(scope="module")
def attempts(prepared) -> list[Attempt]:
    return prepared


def _attempt(yaml: Path, folder: Path) -> Attempt:
    finished = run_cli("train", yaml, folder=folder)
    checkpoints = folder / "run" / "checkpoints"
    return Attempt(
        finished,
        read_rows(folder / "run" / "metrics.jsonl"),
        sorted(path.name for path in checkpoints.glob("step_*")),
        (checkpoints / "latest").read_text().strip(),
    )


def test_steps_and_prompts_go_on_with_the_weights_of_the_last_good_checkpoint(attempts):
    rows = attempts[0].rows
    assert [row["step"] for row in rows] == list(range(10)), attempts[0].finished.err
    digests = [row.get("weights/digest") for row in rows]
    # The condition holds from step 4 on; step 4 was saved too, but 2 lies before it.
    assert rows[5]["stability/rolled_back_to"] == 2
    assert digests[5] == digests[2]
    assert len({digests[step] for step in (1, 2, 3, 4, 6, 7, 8)}) == 7
    assert rows[5]["weights/version"] == 5
    assert [row["step"] for row in rows[1:] if row["reward/mean"] == 0] == [4, 5, 8, 9]
    # Step 6 could only be sampled by the weights that it trains.
    assert [row["rollout/staleness"] for row in rows[1:]] == [0, 1, 1, 1, 1, 0, 1, 1, 1]


def test_a_roll_back_is_counted_and_scales_the_learning_rate(attempts):
    rows = attempts[0].rows[1:9]
    assert [row["policy/learning_rate"] for row in rows] == [1e-2] * 5 + [5e-3] * 3
    assert [row["stability/lr_scale"] for row in rows] == [1.0] * 4 + [0.5] * 4
    assert [row["stability/roll_backs"] for row in rows] == [0] * 4 + [1] * 4
    named = {row["step"]: row.get("stability/findings") for row in attempts[0].rows}
    assert {step for step, causes in named.items() if causes} == {5, 9}
    assert named[5] == named[9] == ["reward_drop", "no_signal"]  # the second only warns


def test_the_second_collapse_ends_the_run_and_names_cause_and_checkpoint(attempts):
    finished = attempts[0].finished
    assert finished.code == 3
    assert "step 9: reward_drop since step 8: expected reward/mean >= " in finished.err
    assert "the last good checkpoint is" in finished.err
    assert "stability.max_roll_backs=1 are used up" in finished.err
    assert "Traceback" not in finished.err
    # keep=1 keeps the newest, and the one before the condition that held at step 8.
    assert attempts[0].checkpoints == ["step_000006", "step_000008"]
    assert attempts[0].latest == "step_000006"


def test_the_same_command_goes_on_from_there_and_comes_to_the_same_end(attempts):
    first, second = attempts
    assert "resumed from" in second.finished.err
    assert second.finished.code == 3
    assert second.finished.err.count("step 9: reward_drop since step 8") == 2
    assert [_without_times(row) for row in second.rows] == [
        _without_times(row) for row in first.rows
    ]
    assert (second.checkpoints, second.latest) == (first.checkpoints, first.latest)


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in row.items() if not name.startswith(("time/", "perf/"))}
