"""The search of BAPO's clip range, worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpgd.algorithm.balanced_clip import balanced_bounds
from megatron_cpgd.algorithm.loss_sequences import build_loss_sequences, searched_clip
from megatron_cpgd.config.algorithm import AlgorithmConfig, BalancedClip
from megatron_cpgd.types import TrainSequence

# (pi_old, ratio, A). With a range (l, h) they count as .5 min(1.5, h), .5 max(.5, l) and 1:
#   (.6, 1.2)  .6 / 1.9 = .316     (.7, 1.6)  .75 / 2.1  = .357
#   (.6, 1.4)  .7 / 2   = .35      (.8, 1.6)  .75 / 2.15 = .349
#   (.6, 1.6)  .75 / 2.05 = .366
TOKENS = [(0.5, 1.5, 1.0), (0.5, 0.5, -1.0), (0.25, 2.0, -2.0)]


def clip(share=0.4, **settings) -> BalancedClip:
    coarse = {"low_end": 0.8, "low_step": 0.1, "high_end": 1.6, "high_step": 0.2}
    return BalancedClip(type="balanced", positive_share=share, **{**coarse, **settings})


def bounds(tokens, clip) -> tuple[float, float]:
    old, ratio, advantages = torch.tensor(tokens).reshape(-1, 3).T
    return balanced_bounds(old.log() + ratio.log(), old.log(), advantages, clip)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.30, (0.6, 1.2)),  # met where the search starts
        (0.34, (0.6, 1.4)),
        (0.36, (0.6, 1.6)),
        (0.40, (0.8, 1.6)),  # never met: both limits
    ],
)
def test_the_upper_bound_rises_first_until_the_share_is_met_or_both_limits_are(share, expected):
    assert bounds(TOKENS, clip(share)) == pytest.approx(expected)


def test_the_probability_under_the_old_policy_weighs_a_token():
    # One token of each sign at ratio 1: .2 / (.2 + .3) = .4 is met, .19 / (.19 + .3) is not.
    assert bounds([(0.2, 1.0, 1.0), (0.3, 1.0, -1.0)], clip(0.39)) == (0.6, 1.2)
    assert bounds([(0.19, 1.0, 1.0), (0.3, 1.0, -1.0)], clip(0.39)) == pytest.approx((0.8, 1.6))


def test_a_step_that_would_pass_a_limit_is_not_made():
    # 1.2 + 2 * .2 > 1.5 and .6 + 2 * .15 > .8
    settings = {"high_end": 1.5, "low_step": 0.15}
    assert bounds(TOKENS, clip(**settings)) == pytest.approx((0.75, 1.4))


def test_the_limits_are_reached_in_spite_of_rounding():
    # .6 + .02 + .02 + ... is .9000000000000002 after 15 steps, and (.9 - .8) / .1 is below 1
    never_met = [(0.5, 1.0, -1.0)]
    found = bounds(never_met, BalancedClip(type="balanced"))
    assert found == pytest.approx((0.9, 3.0), abs=1e-12)
    found = bounds(never_met, clip(low_start=0.8, low_end=0.9))
    assert found == pytest.approx((0.9, 1.6), abs=1e-12)


@pytest.mark.parametrize(
    "tokens", [[], [(0.5, 1.0, 0.0)], [(0.5, 3.0, 1.0)], [*TOKENS, (0.5, math.nan, 1.0)]]
)
def test_with_nothing_to_balance_the_range_is_where_the_search_starts(tokens):
    assert bounds(tokens, clip()) == (0.6, 1.2)


def sequences(tokens: list[tuple[float, float, float]]) -> list[TrainSequence]:
    """A response of each token, and an empty one."""
    return [
        TrainSequence(
            group=0,
            prompt_ids=torch.tensor([1]),
            response_ids=torch.zeros(n, dtype=torch.int64),
            rollout_logprobs=torch.zeros(n),
            advantage=advantage,
            truncated=False,
            old_logprobs=torch.full((n,), math.log(old)),
        )
        for n, (old, _, advantage) in [*((1, token) for token in tokens), (0, (1.0, 1.0, -1.0))]
    ]


def logprobs(tokens: list[tuple[float, float, float]]) -> list[torch.Tensor]:
    return [*(torch.tensor([math.log(old * ratio)]) for old, ratio, _ in tokens), torch.zeros(0)]


def test_the_range_that_was_found_bounds_the_ratio_of_every_token():
    found = searched_clip(sequences(TOKENS), logprobs(TOKENS), clip(0.34))
    config = AlgorithmConfig.model_validate({"preset": "bapo"}).model_copy(update={"clip": found})
    *built, empty = build_loss_sequences(sequences(TOKENS), config)
    for sequence in built:
        assert sequence.tensors["log_clip_low"].tolist() == pytest.approx([math.log(0.6)])
        assert sequence.tensors["log_clip_high"].tolist() == pytest.approx([math.log(1.4)])
    assert len(empty.tensors["log_clip_low"]) == 0


def test_a_loss_is_not_built_before_the_search():
    with pytest.raises(AssertionError, match="search the range of this optimizer step first"):
        build_loss_sequences(sequences(TOKENS), AlgorithmConfig(preset="bapo"))


@given(st.integers(0, 10_000), st.data())
def test_the_order_of_responses_does_not_matter(seed, data):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, 12, generator=generator)
    tokens = [(p.sigmoid(), r.exp(), a - 0.5) for p, r, a in zip(*noise, strict=True)]
    low, high = bounds(tokens, BalancedClip(type="balanced"))
    # The upper bound moves first, and moving the lower one never helps: it goes all the way.
    assert low == 0.6 or (low, high) == pytest.approx((0.9, 3.0))
    permuted = data.draw(st.permutations(tokens))
    assert bounds(permuted, BalancedClip(type="balanced")) == (low, high)
