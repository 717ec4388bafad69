import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpgd.algorithm.correction import correction_metrics, correction_weights
from megatron_cpgd.config.algorithm import (
    BandWeight,
    ClippedWeight,
    NoCorrection,
    RejectionConfig,
    TruncatedWeight,
)

OFF = NoCorrection()
KEEP_ALL = RejectionConfig()


def logs(*ratios):
    return torch.tensor(ratios).log()


def weights(differences, correction=OFF, rejection=KEEP_ALL):
    return [w.tolist() for w in correction_weights(differences, correction, rejection)]


# Two responses: rho = 4, 1, 0.25 (product 1, mean of logs 0) and 3, 3 (product 9, geometric 3).
D = [logs(4.0, 1.0, 0.25), logs(3.0, 3.0)]


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        (OFF, [[1, 1, 1], [1, 1]]),
        (TruncatedWeight(type="truncate", high=2), [[2, 1, 0.25], [2, 2]]),
        (TruncatedWeight(type="truncate", high=3.5), [[3.5, 1, 0.25], [3, 3]]),
        (TruncatedWeight(type="truncate", level="sequence", high=2), [[1, 1, 1], [2, 2]]),
        (TruncatedWeight(type="truncate", level="sequence", high=20), [[1, 1, 1], [9, 9]]),
        (TruncatedWeight(type="truncate", level="geometric", high=20), [[1, 1, 1], [3, 3]]),
        (ClippedWeight(type="clip", low=0.5, high=2), [[2, 1, 0.5], [2, 2]]),
        (BandWeight(type="band", low=0.5, high=3.5), [[0, 1, 0], [3, 3]]),
        (BandWeight(type="band", level="sequence", low=0.5, high=5), [[1, 1, 1], [0, 0]]),
    ],
)
def test_weights_by_hand(correction, expected):
    for result, wanted in zip(weights(D, correction), expected, strict=True):
        assert result == pytest.approx(wanted)


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_a_ratio_at_the_bound_of_the_band_is_inside(ratio):
    band = BandWeight(type="band", low=0.5, high=2.0)
    exact = torch.tensor([ratio], dtype=torch.float64).log()
    assert weights([exact], band) == [[pytest.approx(ratio)]]


@pytest.mark.parametrize(
    ("rejection", "expected"),
    [
        ({"veto": 0.3}, [0, 1]),  # 0.25 is below
        ({"veto": 0.2}, [1, 1]),
        ({"geometric_high": 2.5}, [1, 0]),  # geometric means 1 and 3
        ({"geometric_low": 1.0, "geometric_high": 3.1}, [1, 1]),
        ({"veto": 0.3, "geometric_high": 2.5}, [0, 0]),
    ],
)
def test_a_rejected_response_has_weight_zero_at_every_token(rejection, expected):
    result = weights(D, rejection=RejectionConfig(**rejection))
    assert [set(w) for w in result] == [{float(e)} for e in expected]


def test_masks_see_the_raw_difference_and_not_the_truncated_weight():
    correction = TruncatedWeight(type="truncate", high=1)
    assert weights([logs(3.0)], correction, RejectionConfig(geometric_high=2)) == [[0.0]]


def test_normalised_weights_have_mean_one_over_the_kept_tokens():
    # kept: 2, 1 of the first (mean 1.5); the second is vetoed
    correction = TruncatedWeight(type="truncate", high=2, normalise=True)
    result = weights([logs(4.0, 1.0), logs(0.01, 1.0)], correction, RejectionConfig(veto=0.1))
    assert result == [pytest.approx([4 / 3, 2 / 3]), [0.0, 0.0]]


def test_a_batch_that_is_rejected_as_a_whole_has_weights_zero():
    correction = TruncatedWeight(type="truncate", normalise=True)
    assert weights([logs(0.01)], correction, RejectionConfig(veto=0.1)) == [[0.0]]


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_empty_responses_have_no_weights_and_are_not_rejected(level):
    correction = TruncatedWeight(type="truncate", level=level, normalise=True)
    assert weights([torch.empty(0)], correction, RejectionConfig(veto=0.1)) == [[]]
    assert correction_metrics([torch.empty(0)], correction, KEEP_ALL) == {}


@pytest.mark.parametrize(
    "correction",
    [
        TruncatedWeight(type="truncate"),
        BandWeight(type="band"),
        ClippedWeight(type="clip", normalise=True),
    ],
)
def test_a_missing_log_prob_is_not_masked_away(correction):
    [result] = correction_weights(
        [torch.tensor([math.nan, 0.0])], correction, RejectionConfig(veto=0.1)
    )
    assert result[0].isnan()


def test_an_infinite_difference_gives_a_finite_weight():
    correction = TruncatedWeight(type="truncate", level="sequence", high=1e9)
    [[up], [down]] = weights([torch.tensor([1e4]), torch.tensor([-1e4])], correction)
    assert up == pytest.approx(math.exp(20)) and down == pytest.approx(math.exp(-20))


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_responses_does_not_matter(values, random):
    differences = [torch.tensor([v, -v / 2, 0.1]) for v in values]
    correction = ClippedWeight(type="clip", level="geometric", normalise=True)
    rejection = RejectionConfig(veto=0.2)
    order = random.sample(range(len(values)), len(values))
    expected = weights(differences, correction, rejection)
    shuffled = weights([differences[i] for i in order], correction, rejection)
    for i, result in zip(order, shuffled, strict=True):
        assert result == pytest.approx(expected[i])


def test_weighted_samples_of_the_sampler_give_expectations_of_the_trainer():
    # E_mu[rho f] = E_old[f] exactly, over all six tokens of a vocabulary
    generator = torch.Generator().manual_seed(0)
    old, rollout = torch.randn(2, 6, generator=generator).log_softmax(dim=1)
    f = torch.randn(6, generator=generator)
    correction = TruncatedWeight(type="truncate", high=1e6)
    [rho] = correction_weights([old - rollout], correction, KEEP_ALL)
    torch.testing.assert_close((rollout.exp() * rho * f).sum(), (old.exp() * f).sum())


def test_what_a_correction_does_is_measured():
    # weights 2, 1, .25 | 2, 2; the first response vetoed. Kept sum 4, squares 8, five tokens.
    correction = TruncatedWeight(type="truncate", high=2)
    assert correction_metrics(D, correction, RejectionConfig(veto=0.3)) == pytest.approx(
        {
            "rollout/correction_mean": 4 / 5,
            "rollout/correction_ess": 16 / (5 * 8),
            "rollout/correction_cut_frac": 3 / 5,
            "rollout/rejected_token_frac": 3 / 5,
            "rollout/rejected_response_frac": 1 / 2,
        }
    )


def test_without_correction_nothing_is_reported():
    assert correction_metrics(D, OFF, KEEP_ALL) == {}
