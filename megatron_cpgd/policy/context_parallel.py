"""Which positions of a sequence a context-parallel rank holds, as Megatron cuts them."""

import itertools

import torch
from torch import Tensor


def rank_positions(length: int, *, rank: int, size: int) -> Tensor:
    """[length / size] positions of one rank: chunks `rank` and `2 * size - 1 - rank` of 2 * size.

    The zig-zag order gives every rank the same share of the causal mask. `length` must be a
    multiple of 2 * size when size > 1.
    """
    if size == 1:
        return torch.arange(length)
    assert length % (2 * size) == 0, f"{length=} is not a multiple of {2 * size}"
    chunk = length // (2 * size)
    low = torch.arange(rank * chunk, (rank + 1) * chunk)
    high = torch.arange((2 * size - 1 - rank) * chunk, (2 * size - rank) * chunk)
    return torch.cat([low, high])


def packed_rank_positions(boundaries: list[int], *, rank: int, size: int) -> Tensor:
    """[T / size] positions in a packed batch: every sequence is cut by itself."""
    if size == 1:
        return torch.arange(boundaries[-1])
    return torch.cat(
        [
            start + rank_positions(end - start, rank=rank, size=size)
            for start, end in itertools.pairwise(boundaries)
        ]
    )
