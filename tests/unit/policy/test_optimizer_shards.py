"""A range of a flattened tensor as boxes of it."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpgd.policy.optimizer_shards import flat_boxes


def test_a_range_of_a_matrix_is_the_rest_of_a_row_whole_rows_and_the_beginning_of_one():
    assert list(flat_boxes((5, 4), 3, 17)) == [
        ((0, 3), (1, 1)),
        ((1, 0), (3, 4)),
        ((4, 0), (1, 1)),
    ]


def test_a_range_within_a_row_is_one_box():
    assert list(flat_boxes((5, 4), 9, 11)) == [((2, 1), (1, 2))]


def test_whole_rows_are_one_box_and_an_empty_range_is_none():
    assert list(flat_boxes((5, 4), 4, 12)) == [((1, 0), (2, 4))]
    assert list(flat_boxes((5, 4), 7, 7)) == []


@given(st.data())
def test_boxes_are_the_range_in_order_whatever_the_shape(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    count = math.prod(shape)
    begin = data.draw(st.integers(0, count))
    end = data.draw(st.integers(begin, count))
    tensor = torch.arange(count).view(shape)
    boxes = list(flat_boxes(shape, begin, end))
    parts = [
        tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].flatten()
        for offsets, sizes in boxes
    ]
    assert torch.cat([*parts, tensor.new_empty(0)]).tolist() == list(range(begin, end))
    assert len(boxes) <= 2 * len(shape) - 1
