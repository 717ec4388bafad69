"""Several runs in one process on one engine; stale rollouts; dynamic sampling."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.full_run import ENVIRONMENT, ROOT, read_rows


def prepare(assets: Path, folder: Path) -> Callable[[], "subprocess.CompletedProcess[str]"]:
    command = [sys.executable, "-m", "tests.helpers.many_runs", str(assets), str(folder)]
    options = {"cwd": ROOT, "env": ENVIRONMENT, "capture_output": True, "text": True}
    return partial(subprocess.run, command, timeout=600, **options)


@pytest.fixture(scope="module")
def runs(prepared) -> Path:
    assert prepared.returncode == 0, prepared.stderr
    return Path(prepared.args[-1])


def learnt(run: Path) -> list[dict]:
    """The rows without times."""
    rows = read_rows(run / "metrics.jsonl")
    return [
        {name: x for name, x in row.items() if not name.startswith(("time/", "perf/"))}
        for row in rows
    ]


def test_a_second_run_of_a_process_repeats_the_first_bit_by_bit(runs):
    assert learnt(runs / "first") == learnt(runs / "again")
    assert len({row["weights/digest"] for row in learnt(runs / "first")[1:]}) == 6


def test_the_rows_say_how_stale_a_batch_was(runs):
    assert [row["rollout/staleness"] for row in learnt(runs / "first")[1:]] == [0] * 6
    assert [row["rollout/staleness"] for row in learnt(runs / "stale")[1:]] == [0, 1, 2, 2, 2, 2]


def test_old_log_probs_are_those_of_the_policy_that_is_about_to_change(runs):
    differences = [row["rollout/logprob_abs_diff_mean"] for row in learnt(runs / "stale")[1:]]
    assert differences[0] < 1e-5, "the first batch is fresh: only rounding"
    assert min(differences[1:]) > 1e-3, "the policy has moved since the others were sampled"
    fresh = [row["rollout/logprob_abs_diff_mean"] for row in learnt(runs / "first")[1:]]
    assert max(fresh) < 1e-5


def test_sampling_in_the_background_changes_nothing_but_the_time(runs):
    assert learnt(runs / "overlapped") == learnt(runs / "stale")
    rows = read_rows(runs / "overlapped" / "metrics.jsonl")[1:]
    assert all(row["time/background_s"] > 0 for row in rows[:4])
    assert "time/generate_s" not in rows[1], "the step found its batch waiting"


# Undisturbed, the fifth batch would be sampled by the weights of step 2.
def test_a_run_that_must_stop_abandons_the_batch_in_the_background_and_samples_it_anew(runs):
    stopped = read_rows(runs / "overlapped_stopped.jsonl")
    assert [row["step"] for row in stopped] == [0, 1, 2, 3]
    rows = read_rows(runs / "overlapped_stopped" / "metrics.jsonl")
    assert rows[:4] == stopped
    assert [row["rollout/staleness"] for row in rows[1:]] == [0, 1, 2, 2, 1, 2]
    undisturbed = read_rows(runs / "overlapped" / "metrics.jsonl")
    for name in ("reward/mean", "rollout/response_tokens", "policy/grad_norm"):
        assert [row[name] for row in rows[1:5]] == [row[name] for row in undisturbed[1:5]]


def test_an_engine_that_reads_the_weights_in_place_samples_the_same_after_a_restart_too(runs):
    # The digests of the weights included.
    assert learnt(runs / "in_place_interrupted") == learnt(runs / "stale")


def test_with_the_samplers_log_probs_the_ratio_spans_the_staleness(runs):
    trainer, sampler = (
        [row["policy/kl_k3"] for row in learnt(runs / name)[1:]]
        for name in ("stale", "stale_sampler")
    )
    assert sampler[0] == pytest.approx(trainer[0], rel=1e-2)  # a fresh batch
    assert all(b > 1.2 * a for a, b in zip(trainer[2:], sampler[2:], strict=True))
    assert "rollout/logprob_abs_diff_mean" not in learnt(runs / "stale_sampler")[1]


def test_groups_in_flight_are_trained_on_after_the_weights_have_changed(runs):
    rows = learnt(runs / "pieces")[1:]
    assert rows[0]["rollout/older_tokens_frac"] == 0, "the first step knows one version only"
    assert max(row["rollout/older_tokens_frac"] for row in rows) > 0
    assert all(row["rollout/older_steps_max"] <= row["step"] - 1 for row in rows)


# Waiting batches; refills; groups in flight.
@pytest.mark.parametrize("name", ["stale", "dapo", "pieces"])
def test_an_interrupted_run_goes_on_where_it_was(runs, name):
    assert learnt(runs / f"{name}_interrupted") == learnt(runs / name)
    left, right = (
        (runs / each / "hf/step_000006/model.safetensors").read_bytes()
        for each in (name, f"{name}_interrupted")
    )
    assert left == right


def test_dapo_samples_until_all_its_groups_have_unequal_rewards(runs):
    rows = learnt(runs / "dapo")[1:]
    batches = [row["rollout/sampled_batches"] for row in rows]
    assert max(batches) > 1, "no refill: the test shows nothing"
    for row, count in zip(rows, batches, strict=True):
        dropped = row["rollout/filtered_groups"] + row["rollout/surplus_groups"]
        assert 8 * count - dropped == 8 or count == 10
        assert row["reward/zero_variance_frac"] == row["rollout/filtered_groups"] / (8 * count)
        assert (runs / "dapo" / "rollouts" / f"step_{row['step']:06d}.jsonl").exists()


def test_a_run_whose_groups_are_all_filtered_ends_with_the_weights_it_began_with(runs, assets):
    rows = learnt(runs / "nothing_left")[1:]
    assert [row["policy/optimizer_steps"] for row in rows] == [0] * 6
    assert [row["rollout/filtered_groups"] for row in rows] == [16] * 6  # two batches of 8
    assert [row["reward/accuracy"] for row in rows] == [1.0] * 6
    assert [row["weights/version"] for row in rows] == [1, 2, 3, 4, 5, 6]
    exported = load_file(runs / "nothing_left" / "hf/step_000006/model.safetensors")
    given = load_file(assets / "model" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in given.items())
