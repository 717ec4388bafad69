"""Series of metrics that end in each kind of collapse, and those that must stay silent."""

import json
import math
import random

import pytest

from megatron_cpgd.config.stability import StabilityConfig
from megatron_cpgd.stability.detector import CollapseDetector, find_collapses
from megatron_cpgd.stability.rules import RULES

HEALTHY = {
    "reward/mean": 0.5,
    "reward/zero_variance_frac": 0.3,
    "rollout/response_tokens_mean": 800.0,
    "rollout/truncated_frac": 0.02,
    "rollout/repetition_frac": 0.01,
    "rollout/kl_k3": 0.001,
    "policy/entropy": 0.4,
    "policy/grad_norm": 0.2,
    "policy/kl_k3": 0.002,
    "policy/ratio_p999": 1.6,
    "policy/skipped_in_a_row": 0,
}
ONSET = 21
COLLAPSED = {
    "reward_drop": {"reward/mean": 0.2},
    "length_collapse": {"rollout/response_tokens_mean": 100.0},
    "length_explosion": {"rollout/truncated_frac": 0.6},
    "entropy_collapse": {"policy/entropy": 0.02},
    "entropy_explosion": {"policy/entropy": 3.0},
    "ratio_explosion": {"policy/ratio_p999": 40.0},
    "gradient_explosion": {"policy/grad_norm": 9.0},
    "drift_explosion": {"policy/kl_k3": 0.7},
    "mismatch": {"rollout/kl_k3": 0.3},
    "repetition": {"rollout/repetition_frac": 0.8},
    "no_signal": {"reward/zero_variance_frac": 1.0},
    "not_finite": {"policy/skipped_in_a_row": 1},
}


def rows(steps: int, seed: int = 0) -> list[dict[str, float]]:
    """Healthy steps with noise of a tenth, beginning with the row of the first evaluation."""
    generator = random.Random(seed)
    noisy = [
        {"step": step} | {name: x * generator.gauss(1, 0.1) for name, x in HEALTHY.items()}
        for step in range(1, steps + 1)
    ]
    return [{"step": 0, "eval/heldout/accuracy": 0.5}, *noisy]


def collapse(cause: str, steps: int = 40) -> list[dict[str, float]]:
    """A run that is healthy until `ONSET`."""
    series = [row | (COLLAPSED[cause] if row["step"] >= ONSET else {}) for row in rows(steps)]
    if cause == "not_finite":  # three optimizer steps per step: 3, 6, ...
        for row in series[ONSET:]:
            row["policy/skipped_in_a_row"] = 3 * (row["step"] - ONSET + 1)
    return series


def named(findings) -> list[tuple[str, int, int]]:
    return [(finding.cause, finding.onset, finding.step) for finding in findings]


def test_every_rule_has_its_threshold_in_the_configuration_and_a_series_here():
    causes = [rule.cause for rule in RULES]
    settings = {"action", "window", "patience", "max_roll_backs", "lr_factor"}
    assert StabilityConfig.model_fields.keys() - settings == set(causes) == COLLAPSED.keys()
    assert len(causes) == len(set(causes))


# patience 5: the condition holds at 21, 22, 23, 24 and 25. Three skipped steps are due at once.
@pytest.mark.parametrize("cause", COLLAPSED)
def test_a_collapse_is_named_once_with_its_onset(cause):
    due = ONSET if cause == "not_finite" else ONSET + 4
    assert named(find_collapses(collapse(cause), StabilityConfig())) == [(cause, ONSET, due)]


@pytest.mark.parametrize("cause", sorted(COLLAPSED.keys() - {"not_finite"}))
def test_a_threshold_of_null_switches_a_cause_off(cause):
    assert not find_collapses(collapse(cause), StabilityConfig.model_validate({cause: None}))


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_collapse(seed):
    assert not find_collapses(rows(200, seed), StabilityConfig())


# The committed demo: rising reward, entropy down to a tenth, prompts that are solved one by one.
def test_a_run_that_learns_is_silent():
    learning = []
    for row in rows(100):
        done = 1 - math.exp(-row["step"] / 20)
        learning.append(
            row
            | {
                "reward/mean": 0.2 + 0.75 * done,
                "policy/entropy": 0.8 * (1 - 0.95 * done),
                "rollout/response_tokens_mean": 900 * (1 - 0.85 * done),
                "reward/zero_variance_frac": 0.9 * done,
                "policy/grad_norm": 1 - 0.9 * done,
            }
        )
    assert not find_collapses(learning, StabilityConfig())


def test_an_interrupted_condition_starts_anew():
    series = collapse("drift_explosion")
    series[ONSET + 2] = series[ONSET + 2] | {"policy/kl_k3": 0.001}
    # It breaks off at step 23, so it holds from 24 on.
    assert named(find_collapses(series, StabilityConfig())) == [("drift_explosion", 24, 28)]


def test_a_step_without_the_metric_neither_counts_nor_interrupts():
    series = collapse("drift_explosion")
    del series[ONSET + 2]["policy/kl_k3"]
    assert named(find_collapses(series, StabilityConfig())) == [("drift_explosion", ONSET, 26)]


@pytest.mark.parametrize("cause", ["reward_drop", "drift_explosion", "entropy_explosion"])
def test_nan_breaks_every_limit(cause):
    series = collapse(cause)
    for row in series[ONSET:]:
        row |= dict.fromkeys(COLLAPSED[cause], math.nan)
    assert (cause, ONSET, ONSET + 4) in named(find_collapses(series, StabilityConfig()))


def test_a_fall_within_the_noise_of_the_best_steps_is_none_but_a_fall_to_nothing_is():
    noisy = [0.1, 0.5, 0.3, 0.7, 0.2, 0.6, 0.4, 0.8, 0.3, 0.5]
    # Median 0.45, MAD 0.175: three spreads are 0.78, and half of the median would be 0.23.
    for low, found in ((0.2, []), (0.0, [("reward_drop", 11, 15)])):
        series = [
            {"step": step, "reward/mean": value}
            for step, value in enumerate([*noisy, *[low] * 10], start=1)
        ]
        assert named(find_collapses(series, StabilityConfig())) == found


def test_the_score_of_a_gradient_norm_is_its_distance_in_spreads():
    detector = CollapseDetector(StabilityConfig(window=4, patience=2))
    for step, norm in enumerate([1.0, 2.0, 3.0, 4.0], start=1):
        detector.observe(step, {"policy/grad_norm": norm})
    # Median 2.5, distances 1.5 0.5 0.5 1.5, their median 1: (10 - 2.5) / 1.4826.
    assert detector.grad_norm_z({"policy/grad_norm": 10.0}) == {
        "policy/grad_norm_z": pytest.approx(7.5 / 1.4826)
    }


def test_equal_gradient_norms_do_not_make_a_spike_of_rounding():
    detector = CollapseDetector(StabilityConfig())
    for step in range(1, 11):
        detector.observe(step, {"policy/grad_norm": 1.0})
    # The spread is at least a tenth of the median.
    score = detector.grad_norm_z({"policy/grad_norm": 1.001})["policy/grad_norm_z"]
    assert score == pytest.approx(0.01)


# A resume in the middle of a condition that has held for two of five steps.
@pytest.mark.parametrize("cause", COLLAPSED)
def test_a_detector_that_is_saved_and_loaded_finds_the_same(cause):
    series = collapse(cause)
    first, second = CollapseDetector(StabilityConfig()), CollapseDetector(StabilityConfig())
    for row in series[: ONSET + 2]:
        first.observe(row["step"], row)
    second.load_state(json.loads(json.dumps(first.state())))
    for row in series[ONSET + 2 :]:
        assert first.observe(row["step"], row) == second.observe(row["step"], row)
        assert first.causes == second.causes
        assert row["step"] != 25 or first.causes == [cause]
    assert first.state() == second.state()


def test_a_reset_forgets_what_the_reward_was_and_a_roll_back_resets():
    series = collapse("reward_drop", steps=60)
    series[ONSET + 9]["stability/rolled_back_to"] = 20
    series[ONSET + 9 :] = [row | {"reward/mean": 0.2} for row in series[ONSET + 9 :]]
    assert len(find_collapses(series, StabilityConfig())) == 1
    series[-10:] = [row | {"reward/mean": 0.05} for row in series[-10:]]
    assert named(find_collapses(series, StabilityConfig()))[1:] == [("reward_drop", 51, 55)]


def test_checkpoints_from_before_a_condition_that_may_become_a_finding_are_asked_for():
    detector = CollapseDetector(StabilityConfig())
    asked = []
    for row in collapse("mismatch", steps=24):
        detector.observe(row["step"], row)
        asked.append(detector.earliest_onset(row["step"]))
    assert asked[19:] == [20, 21, 21, 21, 21, 21]


def test_switched_off_only_what_always_ends_a_run_is_watched():
    off = StabilityConfig(action="off")
    assert [c for c in COLLAPSED if find_collapses(collapse(c), off)] == ["not_finite"]


def test_a_message_says_where_what_was_expected_what_came_and_what_to_do():
    [finding] = find_collapses(collapse("mismatch"), StabilityConfig())
    assert finding.message.startswith(
        "step 25: mismatch since step 21: expected rollout/kl_k3 <= 0.1, came 0.3; trainer and "
    )
    [finding] = find_collapses(
        [{"step": step, "reward/mean": 0.8 if step < 11 else 0.2} for step in range(1, 20)],
        StabilityConfig(),
    )
    expected = "expected reward/mean >= 0.4 (highest running median 0.8), came 0.2; "
    assert expected in finding.message
