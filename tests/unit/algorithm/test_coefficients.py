import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpgd.algorithm.coefficients import (
    log_clip_bounds,
    split_mini_batches,
    truncated_epoch_weight,
)


def test_mini_batches_are_contiguous_and_nearly_equal():
    # 10 groups in 4 steps: boundaries floor(10 i / 4) = 0, 2, 5, 7, 10
    assert split_mini_batches(10, 4) == [range(0, 2), range(2, 5), range(5, 7), range(7, 10)]


@given(st.integers(1, 200), st.data())
def test_mini_batches_cover_every_group_once(num_groups, data):
    mini_batches = data.draw(st.integers(1, num_groups))
    ranges = split_mini_batches(num_groups, mini_batches)
    assert [i for r in ranges for i in r] == list(range(num_groups))
    assert len(ranges) == mini_batches
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_no_mini_batch_is_empty_when_a_filter_has_left_few_groups():
    assert split_mini_batches(3, 4) == [range(0, 1), range(1, 2), range(2, 3)]
    assert split_mini_batches(0, 4) == []


def test_a_constant_clip_has_the_same_bounds_for_all_tokens():
    low, high = log_clip_bounds(3, low=0.2, high=0.28)
    torch.testing.assert_close(low, torch.full((3,), math.log(0.8)), rtol=0, atol=1e-7)
    torch.testing.assert_close(high, torch.full((3,), math.log(1.28)), rtol=0, atol=1e-7)
    assert low.dtype == high.dtype == torch.float32


def test_tight_to_loose_grows_linearly_and_ends_at_epsilon():
    # start 0.5, T = 4: scale 0.5 + 0.5 i / 4 = 0.625, 0.75, 0.875, 1
    low, high = log_clip_bounds(4, low=0.2, high=0.4, start=0.5)
    scale = torch.tensor([0.625, 0.75, 0.875, 1.0])
    torch.testing.assert_close(low.exp(), 1 - 0.2 * scale)
    torch.testing.assert_close(high.exp(), 1 + 0.4 * scale)


def test_tight_to_loose_from_zero_starts_at_one_t_th():
    # start 0, T = 2: eps 0.1, 0.2
    low, high = log_clip_bounds(2, low=0.2, high=0.2, start=0.0)
    assert low.exp().tolist() == pytest.approx([0.9, 0.8])
    assert high.exp().tolist() == pytest.approx([1.1, 1.2])


def test_bounds_of_an_empty_response_are_empty():
    low, high = log_clip_bounds(0, low=0.2, high=0.2, start=0.5)
    assert low.shape == high.shape == (0,)


def test_epoch_weight_is_the_ratio_cut_at_both_sides():
    # ratios 1, 1.1, 0.9 stay; 2 is cut to 1.3, 0.5 to 0.8
    ratios = torch.tensor([1.0, 1.1, 0.9, 2.0, 0.5])
    old = torch.tensor([-1.0, -2.0, -0.5, -3.0, -0.1])
    weight = truncated_epoch_weight(old + ratios.log(), old, low=0.2, high=0.3)
    torch.testing.assert_close(weight, torch.tensor([1.0, 1.1, 0.9, 1.3, 0.8]))


def test_epoch_weight_of_a_vanished_or_exploded_ratio_is_the_bound():
    old = torch.tensor([-0.1, -500.0])
    weight = truncated_epoch_weight(torch.tensor([-500.0, -0.1]), old, low=0.2, high=0.3)
    torch.testing.assert_close(weight, torch.tensor([0.8, 1.3]))


def test_epoch_weight_carries_no_gradient():
    start = torch.zeros(2, requires_grad=True)
    assert not truncated_epoch_weight(start, torch.zeros(2), low=0.2, high=0.2).requires_grad
