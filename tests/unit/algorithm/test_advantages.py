import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpgd.algorithm.advantages import (
    Advantages,
    compute_advantages,
    equal_rewards,
    overlong_penalty,
)

# Multiples of 1/8: sums, means over 4 and shifts are exact, so equal rewards stay equal.
GROUPS = st.lists(
    st.lists(st.integers(-64, 64).map(lambda n: n / 8), min_size=4, max_size=4),
    min_size=1,
    max_size=5,
)


def advantages(rewards, prompt_weight="equal", max_weight=3.0, **options) -> Advantages:
    return compute_advantages(
        torch.as_tensor(rewards), prompt_weight=prompt_weight, max_weight=max_weight, **options
    )


def test_equal_weight_only_centres():
    # mean of 1, 0, 0, 1, 1 is 0.6
    result = advantages([[1.0, 0.0, 0.0, 1.0, 1.0]])
    torch.testing.assert_close(result.values, torch.tensor([[0.4, -0.6, -0.6, 0.4, 0.4]]))
    assert result.prompt_weight.tolist() == [1.0]
    assert result.values.dtype == result.prompt_weight.dtype == torch.float32


def test_std_weight_divides_by_the_standard_deviation_with_divisor_g_minus_1():
    # rewards 1, 0, 0, 1: mean 1/2, squares 4 * 1/4 = 1, variance 1 / 3, weight sqrt(3)
    result = advantages([[1.0, 0.0, 0.0, 1.0]], "std")
    assert result.prompt_weight.item() == pytest.approx(math.sqrt(3))
    assert result.values[0].tolist() == pytest.approx(
        [math.sqrt(3) / 2 * s for s in (1, -1, -1, 1)]
    )


def test_clip_filter_weight_is_one_number_for_the_batch():
    # 2 of 4 groups have unequal rewards: 4 / 2 = 2, below the bound
    result = advantages([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]], "clip_filter")
    assert result.prompt_weight.tolist() == [2.0] * 4
    assert result.values.tolist() == [[1.0, -1.0], [0.0, 0.0], [0.0, 0.0], [-1.0, 1.0]]


def test_clip_filter_weight_is_bounded():
    # 1 of 4 groups: 4 / 1 = 4, bounded by 3
    result = advantages([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]], "clip_filter")
    assert result.prompt_weight.tolist() == [3.0] * 4


@pytest.mark.parametrize("prompt_weight", ["equal", "std", "clip_filter"])
def test_a_batch_without_signal_has_zero_advantages_and_weight_one(prompt_weight):
    result = advantages([[1.0, 1.0], [0.0, 0.0]], prompt_weight)
    assert result.values.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert result.prompt_weight.tolist() == [1.0, 1.0]


def test_groups_of_equal_rewards_are_found():
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1e-6]])
    assert equal_rewards(rewards).tolist() == [False, True, True, False]


@pytest.mark.parametrize("prompt_weight", ["equal", "std", "clip_filter"])
def test_no_group_has_no_advantages(prompt_weight):
    lengths = torch.zeros(0, 4, dtype=torch.int64)
    result = advantages(torch.zeros(0, 4), prompt_weight, whiten_lengths=lengths)
    assert result.values.shape == (0, 4) and result.prompt_weight.shape == (0,)


@pytest.mark.parametrize(
    "rewards",
    [
        [0.1 + 0.2, 0.3, 0.3],  # 5.6e-17 apart: one sum, two orders of rounding
        [0.1] * 3,  # in float64 their mean is 1.4e-17 above them and their std 1.7e-17
    ],
)
def test_rounding_does_not_make_equal_rewards_unequal(rewards):
    rewards = torch.tensor([rewards], dtype=torch.float64)
    assert equal_rewards(rewards).tolist() == [True]
    result = advantages(rewards, "std")
    assert result.values.tolist() == [[0.0] * 3]
    assert result.prompt_weight.tolist() == [1.0]


def test_a_small_real_difference_is_kept():
    # 1e-6 apart: centred +-5e-7, std 1e-6 / sqrt(2), advantage +-1 / sqrt(2)
    result = advantages([[1.0, 1.0 + 1e-6]], "std")
    assert result.values[0].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])


@pytest.mark.parametrize("prompt_weight", ["equal", "std", "clip_filter"])
def test_one_rollout_per_prompt_is_refused(prompt_weight):
    with pytest.raises(ValueError, match="at least 2 responses"):
        advantages([[1.0], [0.0]], prompt_weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused_with_its_place(bad):
    with pytest.raises(ValueError, match=rf"the first is {bad} at prompt 1, rollout 2"):
        advantages([[0.0, 1.0, 0.0], [1.0, 0.0, bad]])


@pytest.mark.parametrize("rewards", [[1.0, 0.0], [[[1.0, 0.0]]]])
def test_a_wrong_shape_is_refused(rewards):
    with pytest.raises(ValueError, match="expected \\[prompts, rollouts per prompt\\], got shape"):
        advantages(rewards)


def test_an_unknown_weight_is_refused():
    with pytest.raises(ValueError, match="got 'batch'"):
        advantages([[1.0, 0.0]], "batch")


@pytest.mark.parametrize("prompt_weight", ["equal", "std", "clip_filter"])
@given(rewards=GROUPS, shift=st.integers(-64, 64))
def test_a_constant_added_to_a_group_changes_nothing(prompt_weight, rewards, shift):
    rewards = torch.tensor(rewards)
    shifted = rewards.clone()
    shifted[0] += shift
    torch.testing.assert_close(
        advantages(shifted, prompt_weight).values, advantages(rewards, prompt_weight).values
    )


@given(rewards=GROUPS, scale=st.floats(0.1, 10.0))
def test_the_std_weight_makes_advantages_independent_of_the_reward_scale(rewards, scale):
    rewards = torch.tensor(rewards)
    # rtol: scaled rewards are rounded to float32 relative to their size, here up to 64 differences
    torch.testing.assert_close(
        advantages(rewards * scale, "std").values,
        advantages(rewards, "std").values,
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("prompt_weight", ["equal", "std", "clip_filter"])
@given(rewards=GROUPS)
def test_advantages_of_a_group_sum_to_zero_and_order_like_the_rewards(prompt_weight, rewards):
    rewards = torch.tensor(rewards)
    values = advantages(rewards, prompt_weight).values
    torch.testing.assert_close(values.sum(dim=1), torch.zeros(len(rewards)), rtol=0, atol=1e-4)
    for reward, value in zip(rewards, values, strict=True):
        assert ((reward[:, None] > reward) <= (value[:, None] > value)).all()


@given(rewards=GROUPS)
def test_std_advantages_have_standard_deviation_one(rewards):
    result = advantages(rewards, "std")
    expected = (~equal_rewards(torch.tensor(rewards))).float()
    torch.testing.assert_close(result.values.std(dim=1), expected)


def test_leave_one_out_compares_with_the_others():
    # others' means of 1, 0, 0.5: .25, .75, .5
    result = advantages([[1.0, 0.0, 0.5], [2.0, 2.0, 2.0]], baseline="leave_one_out")
    torch.testing.assert_close(result.values, torch.tensor([[0.75, -0.75, 0.0], [0.0] * 3]))


def test_without_baseline_the_advantage_is_the_reward_also_of_a_single_response():
    result = advantages([[1.0], [0.5]], baseline="none")
    assert result.values.tolist() == [[1.0], [0.5]]


def test_whitening_counts_every_token():
    # centred 1, -1 with 3 tokens and 1 token: mean .5; squares 3 * .25 + 2.25 = 3, over 3 tokens: 1
    lengths = torch.tensor([[3, 1]])
    result = advantages([[2.0, 0.0]], whiten_lengths=lengths)
    torch.testing.assert_close(result.values, torch.tensor([[0.5, -1.5]]))


def test_whitening_makes_the_advantages_of_equal_rewards_differ_from_zero():
    # centred 1, -1 | 0, 0 with tokens 2, 1 | 1, 0: mean 1/4
    lengths = torch.tensor([[2, 1], [1, 0]])
    result = advantages([[2.0, 0.0], [1.0, 1.0]], whiten_lengths=lengths)
    assert result.values[1, 0].item() < -0.1


@pytest.mark.parametrize("lengths", [[[0, 0]], [[1, 0]]])
def test_fewer_than_two_tokens_are_not_whitened(lengths):
    result = advantages([[2.0, 0.0]], whiten_lengths=torch.tensor(lengths))
    assert result.values.tolist() == [[1.0, -1.0]]


@given(
    st.lists(
        st.tuples(st.integers(-8, 8), st.integers(-8, 8), st.integers(0, 5), st.integers(1, 5)),
        min_size=2,
        max_size=5,
    )
)
def test_whitened_advantages_have_mean_zero_and_variance_one_over_tokens(rows):
    rewards = torch.tensor([[a, b] for a, b, _, _ in rows]).float()
    lengths = torch.tensor([[n, m] for _, _, n, m in rows])
    result = advantages(rewards, whiten_lengths=lengths)
    tokens = result.values.flatten().repeat_interleave(lengths.flatten()).double()
    assert tokens.mean().item() == pytest.approx(0.0, abs=1e-5)
    variance = tokens.var().item()
    assert variance == pytest.approx(1.0, abs=1e-4) or tokens.abs().max() < 1e-3


def test_overlong_penalty_falls_linearly_over_the_buffer():
    # max 20, buffer 4: 0 up to 16, -1/4 a token, -1 at 20
    penalty = overlong_penalty(torch.tensor([3, 16, 17, 20]), max_tokens=20, buffer_tokens=4)
    assert penalty.tolist() == [0.0, 0.0, -0.25, -1.0]
