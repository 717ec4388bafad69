"""The zig-zag cut of sequences over context-parallel ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpgd.policy.context_parallel import packed_rank_positions, rank_positions


# 8 tokens, 2 ranks: chunks 01 23 45 67; rank 0 has the first and the last, rank 1 the middle.
def test_two_ranks_take_the_outer_and_the_inner_chunks():
    assert rank_positions(8, rank=0, size=2).tolist() == [0, 1, 6, 7]
    assert rank_positions(8, rank=1, size=2).tolist() == [2, 3, 4, 5]


# Sequences of 4 and 8 tokens, the second starts at 4.
def test_every_packed_sequence_is_cut_by_itself():
    assert packed_rank_positions([0, 4, 12], rank=0, size=2).tolist() == [0, 3, 4, 5, 10, 11]
    assert packed_rank_positions([0, 4, 12], rank=1, size=2).tolist() == [1, 2, 6, 7, 8, 9]


def test_one_rank_has_every_position_and_needs_no_multiple():
    assert rank_positions(5, rank=0, size=1).tolist() == [0, 1, 2, 3, 4]
    assert packed_rank_positions([0, 1, 5], rank=0, size=1).tolist() == [0, 1, 2, 3, 4]


def test_a_length_that_does_not_divide_is_refused():
    with pytest.raises(AssertionError, match="length=6 is not a multiple of 4"):
        rank_positions(6, rank=0, size=2)


@given(st.integers(2, 4), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_ranks_share_the_tokens_and_the_causal_work_evenly(size, chunks):
    boundaries = [0]
    for chunk in chunks:
        boundaries.append(boundaries[-1] + 2 * size * chunk)
    parts = [packed_rank_positions(boundaries, rank=r, size=size) for r in range(size)]
    assert torch.cat(parts).sort().values.tolist() == list(range(boundaries[-1]))
    assert len({len(part) for part in parts}) == 1
    # A token at offset p of its sequence attends to p + 1 keys.
    starts = torch.tensor(boundaries)
    work = [int((p - starts[torch.searchsorted(starts, p, right=True) - 1]).sum()) for p in parts]
    assert len(set(work)) == 1
