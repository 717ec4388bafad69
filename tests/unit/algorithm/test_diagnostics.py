import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpgd.algorithm.diagnostics import (
    MAXIMA,
    QUANTILES,
    TOTALS,
    empty_statistics,
    merge_statistics,
)
from megatron_cpgd.algorithm.objective import Objective
from megatron_cpgd.algorithm.sequences import one_rank_sequences
from megatron_cpgd.config.algorithm import AlgorithmConfig

SETTINGS = {
    "log_clip_low": torch.tensor(0.8).log(),
    "log_clip_high": torch.tensor(1.2).log(),
    "drift_coef": 0.1,
    "drift_clip": 2.0,
}


def worked_batch():
    """Four tokens of ratio 1.5, 0.5, 4, 1 and a fifth outside the mask that holds junk."""
    logprobs = torch.tensor([-1.0, -2.0, -0.5, -0.5, math.nan])
    old = logprobs - torch.tensor([1.5, 0.5, 4.0, 1.0, math.inf]).log()
    return {
        "logprobs": logprobs,
        "old_logprobs": old,
        "advantages": torch.tensor([1.0, -1.0, -2.0, 0.0, math.inf]),
        "coefficients": torch.tensor([0.5, 0.5, 0.25, 0.25, math.nan]),
        "mask": torch.tensor([True, True, True, True, False]),
        "entropy": torch.tensor([1.0, 2.0, 3.0, 4.0, math.nan]),
    }


def random_batch(seed, size=30):
    generator = torch.Generator().manual_seed(seed)

    def normal(scale):
        return scale * torch.randn(size, generator=generator)

    old = -normal(1.0).abs()
    return {
        "logprobs": old + normal(0.5),
        "old_logprobs": old,
        "advantages": normal(1.0),
        "coefficients": normal(1.0).abs(),
        "mask": torch.rand(size, generator=generator) < 0.6,
        "entropy": normal(1.0).abs(),
    }


def evaluate(batch, **settings):
    """(loss, statistics) of CPGD."""
    settings = SETTINGS | settings
    drift = {"coef": settings.pop("drift_coef"), "gradient_clip": settings.pop("drift_clip")}
    objective = Objective(config=AlgorithmConfig.model_validate({"drift": drift}))
    tokens = {n: x for n, x in (batch | settings).items() if x is not None}
    logprobs, entropy, mask = (tokens.pop(n) for n in ("logprobs", "entropy", "mask"))
    sequences = one_rank_sequences(torch.where(mask, 0, -1))
    return objective.evaluate(logprobs, entropy, tokens | {"loss_mask": mask}, sequences)


def statistics(batch, **settings):
    return evaluate(batch, **settings)[1]


def test_every_metric_of_a_worked_example():
    metrics = statistics(worked_batch()).finish()
    k3 = [0.5 - math.log(1.5), -0.5 - math.log(0.5), 3 - math.log(4), 0.0]
    # gradient: policy only at token 3, .25 * |-2| = .5; drift .1 * (.5 * .5 + .5 * .5 + .25 * 2)
    drift_share = 0.1 / (0.5 + 0.1)
    expected = {
        "policy/clip_frac_high": 1 / 4,  # token 1
        "policy/clip_frac_low": 1 / 4,  # token 2
        "policy/clip_frac_sign_blind": 3 / 4,
        "policy/masked_frac": 2 / 4,  # tokens 1 and 2; token 4 has no advantage
        "policy/unclipped_high_frac": 1 / 4,  # token 3
        "policy/ratio_mean": 7 / 4,
        "policy/ratio_max": 4.0,
        "policy/ratio_min": 0.5,
        "policy/kl_k1": -math.log(1.5 * 0.5 * 4) / 4,
        "policy/kl_k3": sum(k3) / 4,
        "policy/drift": (0.5 - 0.5 + 2.0 + 0.0) / 4,
        "policy/drift_capped_frac": 1 / 4,
        "policy/drift_grad_share": drift_share,
        "policy/entropy": 10 / 4,
        "policy/neg_logprob_mean": 4 / 4,
        # -Phi: -ln 1.2, ln .8 = -.2231, +2 ln 4, 0; drift E: -.5, +1, -1, 0
        "policy/loss": 0.5 * (-math.log(1.2) + math.log(0.8) + 0.1 * 0.5)
        + 0.25 * (2 * math.log(4) - 0.1),
    }
    # Smallest and largest ratio; a bin is exact to 2.5 % of the log-ratio.
    low, high, higher = (metrics.pop(f"policy/ratio_{q}") for q in ("p01", "p99", "p999"))
    assert math.log(low) == pytest.approx(math.log(0.5), rel=0.025)
    assert math.log(high) == math.log(higher) == pytest.approx(math.log(4.0), rel=0.025)
    assert metrics.keys() == expected.keys()
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 0.05, 1.0])
def test_ratio_quantiles_are_those_of_torch_to_the_width_of_a_bin(scale):
    batch = random_batch(0, size=20_001) | {"mask": torch.ones(20_001, dtype=torch.bool)}
    noise = torch.randn(20_001, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    batch["logprobs"] = batch["old_logprobs"] + (scale * (noise + 0.5 * noise**2)).float()
    log_ratio = (batch["logprobs"] - batch["old_logprobs"]).double()
    metrics = statistics(batch).finish()
    for name, q in QUANTILES.items():
        # 5 % are two halves of a bin: one for the bin, one for the interpolation of torch.
        expected = log_ratio.quantile(q).item()
        assert math.log(metrics[name]) == pytest.approx(expected, rel=0.05, abs=1e-4), name


def test_ratio_quantiles_of_equal_policies_are_one_and_extremes_stay_finite():
    batch = worked_batch() | {"old_logprobs": worked_batch()["logprobs"]}
    metrics = statistics(batch).finish()
    assert [metrics[name] for name in QUANTILES] == [1.0, 1.0, 1.0]
    far = worked_batch() | {"old_logprobs": worked_batch()["logprobs"] - 50.0}
    metrics = statistics(far).finish()
    # Beyond the last edge, 1e-4 * 1.05^250 = 19.8.
    assert metrics["policy/ratio_p999"] == pytest.approx(math.exp(1e-4 * 1.05**250))


def test_the_loss_is_the_one_that_was_trained_on():
    batch = random_batch(0)
    loss, parts = evaluate(batch)
    assert parts.finish()["policy/loss"] == loss.item()


@pytest.mark.parametrize(("advantage", "side"), [(1.0, "high"), (-1.0, "low")])
def test_a_token_exactly_at_the_bound_is_not_counted_as_clipped(advantage, side):
    batch = {name: torch.zeros(1) for name in worked_batch()} | {"mask": torch.ones(1) > 0}
    batch["advantages"] = torch.tensor([advantage])
    at_bound = SETTINGS[f"log_clip_{side}"].reshape(1)
    beyond = torch.nextafter(at_bound, 2 * at_bound)
    key = f"policy/clip_frac_{side}"
    assert statistics(batch | {"logprobs": at_bound}).finish()[key] == 0.0
    assert statistics(batch | {"logprobs": beyond}).finish()[key] == 1.0


def test_without_clip_nothing_is_clipped():
    metrics = statistics(worked_batch(), log_clip_low=None, log_clip_high=None).finish()
    assert all(value == 0.0 for name, value in metrics.items() if "clip" in name)


def test_bounds_per_token_are_read_per_token():
    # ratio 1.5 with A = 1 at token 1 is inside a bound of 2
    high = torch.tensor([2.0, 1.2, 1.2, 1.2, math.nan]).log()
    assert statistics(worked_batch(), log_clip_high=high).finish()["policy/clip_frac_high"] == 0.0


def test_padded_rows_give_the_statistics_of_the_packed_tokens():
    batch = random_batch(0)
    rows = {name: x.reshape(5, 6) for name, x in batch.items()}
    assert statistics(rows).finish() == pytest.approx(statistics(batch).finish(), rel=1e-6)


def test_statistics_have_no_gradient():
    batch = random_batch(0)
    batch["logprobs"].requires_grad_()
    assert not statistics(batch).totals.requires_grad


@pytest.mark.parametrize(
    ("drift_coef", "expected"),
    [(0.1, 1.0), (0.0, 0.0)],  # advantages 0: all of the gradient is drift, or there is none
)
def test_drift_share_of_a_batch_without_advantages(drift_coef, expected):
    batch = worked_batch() | {"advantages": torch.zeros(5)}
    metrics = statistics(batch, drift_coef=drift_coef).finish()
    assert metrics["policy/drift_grad_share"] == expected


@pytest.mark.parametrize("size", [5, 0])
def test_a_micro_batch_without_tokens_is_the_neutral_element(size):
    nothing = {name: torch.full((size,), math.nan) for name in worked_batch()}
    empty = statistics(nothing | {"mask": torch.zeros(size, dtype=torch.bool)})
    full = statistics(worked_batch())
    merged = merge_statistics([empty, full, empty_statistics()])
    assert torch.equal(merged.totals, full.totals)
    assert torch.equal(merged.maxima, full.maxima)


def test_no_token_at_all_reports_only_the_loss():
    assert empty_statistics().finish() == {"policy/loss": 0.0}


def test_flat_tensors_have_fixed_float64_entries():
    for part in (statistics(worked_batch()), empty_statistics()):
        # Behind the named totals 2 * 251 bin edges make 503 bins.
        assert part.totals.shape == (len(TOTALS) + 503,) and part.totals.dtype == torch.float64
        assert part.maxima.shape == (len(MAXIMA),) and part.maxima.dtype == torch.float64


@given(st.integers(0, 10_000), st.lists(st.integers(0, 30), max_size=4))
def test_merged_parts_equal_the_whole(seed, cuts):
    batch = random_batch(seed)
    bounds = [0, *sorted(cuts), 30]
    parts = [
        statistics({name: x[start:stop] for name, x in batch.items()})
        for start, stop in pairwise(bounds)
    ]
    whole = statistics(batch)
    merged = merge_statistics(parts)
    # The loss is summed in float32 inside a part, the rest in float64.
    loss = TOTALS.index("policy/loss")
    torch.testing.assert_close(merged.totals[loss], whole.totals[loss], rtol=1e-5, atol=1e-5)
    keep = [i for i in range(len(whole.totals)) if i != loss]
    torch.testing.assert_close(merged.totals[keep], whole.totals[keep], rtol=1e-12, atol=1e-12)
    assert torch.equal(merged.maxima, whole.maxima)


@given(st.integers(0, 10_000))
def test_k3_is_never_negative(seed):
    metrics = statistics(random_batch(seed) | {"mask": torch.ones(30, dtype=torch.bool)}).finish()
    assert metrics["policy/kl_k3"] >= 0.0
