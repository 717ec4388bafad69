import pytest

from megatron_cpgd.weights.tiling import fills, span, tiles

GATE, UP = slice(0, 6, 2), slice(1, 7, 2)  # rows 0 2 4 and 1 3 5


def test_an_index_is_the_places_that_it_selects():
    assert list(span(3)) == [3] and list(span(slice(2, 5))) == [2, 3, 4]
    assert list(span(UP)) == [1, 3, 5]


@pytest.mark.parametrize(
    ("spans", "length", "whole"),
    [
        ([range(0, 2), range(2, 5)], 5, True),
        ([range(2, 5), range(0, 2)], 5, True),  # in any order
        ([range(0, 2), range(3, 5)], 5, False),  # a gap
        ([range(0, 3), range(2, 5)], 5, False),  # an overlap
        ([range(0, 2), range(2, 5)], 6, False),  # too short
        ([range(0, 6, 2), range(1, 7, 2)], 6, True),
        ([range(0, 4, 2), range(4, 6, 2), range(1, 7, 2)], 6, True),
        ([range(0, 6, 2), range(0, 6, 2)], 6, False),
        ([range(0, 6, 2), range(3, 6)], 6, False),  # of two steps
        ([], 1, False),
    ],
)
def test_spans_cover_each_place_once(spans, length, whole):
    assert tiles(spans, length) == whole


@pytest.mark.parametrize(
    ("parts", "shape", "whole"),
    [
        ([(slice(0, 2), slice(0, 3)), (slice(2, 4), slice(0, 3))], (4, 3), True),
        ([(slice(0, 4), slice(0, 1)), (slice(0, 4), slice(1, 3))], (4, 3), True),
        ([(slice(0, 4), slice(0, 1)), (slice(0, 3), slice(1, 3))], (4, 3), False),
        # Two experts in one tensor, each with its gate and its up rows.
        ([(e, slice(0, 3), rows) for e in (0, 1) for rows in (GATE, UP)], (2, 3, 6), True),
        ([(0, slice(0, 3), rows) for rows in (GATE, UP)], (2, 3, 6), False),
        ([(e, slice(0, 3), GATE) for e in (0, 1) for _ in (GATE, UP)], (2, 3, 6), False),
    ],
)
def test_parts_of_a_tensor_make_it_up_or_not(parts, shape, whole):
    assert fills(parts, shape) == whole
