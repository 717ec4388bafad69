"""The metrics of a step from those of its optimizer steps, and the clip range of one of them."""

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_cpgd import train
from megatron_cpgd.config.algorithm import AlgorithmConfig
from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.guard import ROLLED_BACK_TO
from megatron_cpgd.policy.policy import StepResult
from megatron_cpgd.tracking.timer import StepTimer
from megatron_cpgd.train import _mean_metrics, _set_old_logprobs, _settle_clip
from megatron_cpgd.types import TrainSequence
from tests.helpers.tiny import tiny_config


def result(
    skipped: str | None = None, grad_norm: float = 1.0, rate: float = 0.5, **metrics: float
) -> StepResult:
    named = {f"policy/{name}": value for name, value in metrics.items()}
    return StepResult(skipped=skipped, grad_norm=grad_norm, learning_rate=rate, metrics=named)


def test_means_are_taken_and_extremes_stay_extremes():
    steps = [
        result(grad_norm=1.0, rate=0.25, ratio_mean=1.0, ratio_max=3.0, ratio_min=0.5),
        result(grad_norm=3.0, ratio_mean=2.0, ratio_max=2.0, ratio_min=0.1),
    ]
    assert _mean_metrics(steps) == {
        "policy/ratio_mean": 1.5,
        "policy/ratio_max": 3.0,
        "policy/ratio_min": 0.1,
        "policy/grad_norm": 2.0,
        "policy/learning_rate": 0.5,
        "policy/optimizer_steps": 2,
        "policy/skipped_steps": 0,
    }


def test_a_skipped_step_counts_and_leaves_no_number():
    steps = [result(loss=2.0), result("loss is nan", float("nan"), loss=float("nan"))]
    metrics = _mean_metrics(steps)
    assert metrics["policy/loss"] == 2.0 and metrics["policy/grad_norm"] == 1.0
    assert metrics["policy/skipped_steps"] == 1 and metrics["policy/optimizer_steps"] == 1
    assert metrics["policy/skipped_reason"] == "loss is nan"


def test_all_steps_skipped_leave_only_their_count():
    metrics = _mean_metrics([result("gradient norm is inf", float("inf"))])
    assert metrics == {
        "policy/optimizer_steps": 0,
        "policy/skipped_steps": 1,
        "policy/skipped_reason": "gradient norm is inf",
    }


# The first of two mini-batches had no response token, so it reports its loss only.
@pytest.mark.parametrize("order", [1, -1])
def test_a_metric_that_one_step_lacks_is_the_mean_of_the_others(order):
    steps = [result(loss=0.0), result(loss=1.0, entropy=0.7)][::order]
    metrics = _mean_metrics(steps)
    assert metrics["policy/loss"] == 0.5 and metrics["policy/entropy"] == 0.7


def one_response(old_logprob: float | None = None, **changes: Any) -> TrainSequence:
    """Of one token, which the engine gave the log-prob -1."""
    old = None if old_logprob is None else torch.full((1,), old_logprob)
    one = {"prompt_ids": torch.tensor([1]), "response_ids": torch.tensor([2])}
    plain = {"group": 0, "rollout_logprobs": -torch.ones(1), "advantage": 1.0, "truncated": False}
    return TrainSequence(**{**one, **plain, "old_logprobs": old, **changes})


@pytest.mark.parametrize(("logprob", "stops"), [(-1.05, False), (-1.2, True), (math.nan, True)])
def test_a_log_prob_gap_above_the_limit_stops_the_run_and_so_does_nan(tmp_path, logprob, stops):
    config = tiny_config(tmp_path, rollout={"logprob_diff_limit": 0.1})
    policy = SimpleNamespace(
        compute_logprobs=lambda batch, compare_with: [torch.full((1,), logprob) for _ in batch]
    )
    run = SimpleNamespace(config=config, policy=policy)
    with pytest.raises(WeightSyncError) if stops else nullcontext():
        metrics = _set_old_logprobs(run, [one_response()], step=1)
        assert metrics["rollout/logprob_abs_diff_mean"] == pytest.approx(-1 - logprob)


# Of 10 steps, a checkpoint every 4: what is due, the end, a roll back, and a run that must stop.
@pytest.mark.parametrize(
    ("step", "metrics", "stops", "saved"),
    [
        (4, {}, False, True),
        (5, {}, False, False),
        (10, {}, False, True),
        (5, {ROLLED_BACK_TO: 4}, False, True),  # else a crash brings the given up weights back
        (5, {}, True, True),
    ],
)
def test_a_step_is_saved_when_it_is_due_and_when_it_must_not_be_lost(
    tmp_path, monkeypatch, step, metrics, stops, saved
):
    written, exported = [], []
    monkeypatch.setattr(train, "save", lambda run, step: written.append(step))
    monkeypatch.setattr(train, "export", lambda run, step: exported.append(step))
    config = tiny_config(tmp_path, run={"dir": "unused", "steps": 10}, checkpoint={"every": 4})
    run = SimpleNamespace(config=config)
    assert train._save(run, step, metrics, StepTimer(), stops=stops) == saved
    assert written == [step] * saved and exported == [step] * (step == 10)


# At ratio 1 the kept token has A > 0 alone: the search ends where it starts. The masked ones would
# make the share 1 / 3, below .4.
def test_a_balanced_clip_range_looks_only_at_responses_with_loss():
    sequences = [
        one_response(-1.0, advantage=advantage, truncated=advantage < 0)
        for advantage in (1.0, -1.0, -1.0)
    ]
    policy = SimpleNamespace(compute_logprobs=lambda batch: [-torch.ones(1) for _ in batch])
    for truncated, starts in (("mask", True), ("keep", False)):
        settings = {"preset": "bapo", "filter": {"truncated": truncated}}
        config = AlgorithmConfig.model_validate(settings)
        run = SimpleNamespace(config=SimpleNamespace(algorithm=config), policy=policy)
        _, found = _settle_clip(run, sequences)
        start = (config.clip.low_start, config.clip.high_start)
        assert (tuple(found.values()) == pytest.approx(start)) == starts
