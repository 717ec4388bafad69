import math

import pytest
import torch

from megatron_cpgd.algorithm.mismatch import compute_mismatch


def test_mismatch_by_hand():
    old = torch.tensor([-1.0, -2.0, -0.5, -3.0])
    rollout = old - torch.tensor([0.1, -0.1, 0.0, 0.4])  # d = 0.1, -0.1, 0, 0.4
    metrics = compute_mismatch(old, rollout)
    assert metrics == pytest.approx(
        {
            "rollout/logprob_abs_diff_mean": 0.6 / 4,
            "rollout/logprob_abs_diff_max": 0.4,
            "rollout/kl_k1": -0.4 / 4,
            "rollout/kl_k3": sum(math.expm1(d) - d for d in (0.1, -0.1, 0.0, 0.4)) / 4,
            "rollout/prob_error": (2 * math.exp(0.1) + 1 + math.exp(0.4)) / 4,
            "rollout/chi2": sum(map(math.exp, (0.2, -0.2, 0.0, 0.8))) / 4 - 1,
            "rollout/ess": sum(map(math.exp, (0.1, -0.1, 0.0, 0.4))) ** 2
            / (4 * sum(map(math.exp, (0.2, -0.2, 0.0, 0.8)))),
            "rollout/is_ratio_max": math.exp(0.4),
            "rollout/is_ratio_min": math.exp(-0.1),
        },
        rel=1e-5,
    )


def test_a_wild_difference_stays_finite_in_k3():
    metrics = compute_mismatch(torch.tensor([0.0]), torch.tensor([-1000.0]))
    assert metrics["rollout/logprob_abs_diff_max"] == 1000.0
    assert math.isfinite(metrics["rollout/kl_k3"])


def test_a_batch_of_empty_responses_has_no_mismatch():
    assert compute_mismatch(torch.empty(0), torch.empty(0)) == {}


def test_nan_is_not_hidden():
    metrics = compute_mismatch(torch.tensor([math.nan, 0.0]), torch.zeros(2))
    assert math.isnan(metrics["rollout/logprob_abs_diff_mean"])
