"""Which sequence goes to which rank and micro-batch: balanced, within a token budget."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Literal

BatchFormat = Literal["packed", "padded"]
Bin = list[int]


def round_up(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `value`."""
    return -(-value // unit) * unit


def plan_micro_batches(
    lengths: Sequence[int],
    *,
    dp_size: int,
    token_budget: int,
    format: BatchFormat,
    align: int = 1,
    multiple_of: int = 1,
    common_shape: bool = False,
) -> list[list[list[int]]]:
    """Indices into `lengths`, as [dp_rank][micro_batch][sequence]; deterministic.

    Tokens are balanced over the ranks first: two ranks differ by at most the longest sequence.
    All ranks get the same number of micro-batches, at least one; those beyond a rank's need are
    empty. A sequence that exceeds the budget alone has a micro-batch of its own.

    Args:
        lengths: tokens of each sequence; each counts rounded up to `align`.
        token_budget: bound of one micro-batch; packed: sum of the lengths; padded: rows times the
            longest row. A multiple of the packed length's unit, or that rounding comes on top.
        multiple_of: the number of micro-batches is a multiple of this (interleaved pipeline).
        common_shape: padded only: all micro-batches will get the same row length, so every row
            counts as the longest sequence of all.
    """
    assert dp_size >= 1 and token_budget >= 1 and align >= 1 and multiple_of >= 1
    assert all(length >= 1 for length in lengths), "every sequence needs at least one token"
    sizes = [round_up(length, align) for length in lengths]
    ranks = _spread(range(len(sizes)), sizes, dp_size)
    if format == "packed":
        bins = [_fill_packed(rank, sizes, token_budget) for rank in ranks]
    else:
        width = max(sizes, default=1) if common_shape else None
        bins = [_fill_padded(rank, sizes, token_budget, width) for rank in ranks]
    count = round_up(max(1, *map(len, bins)), multiple_of)
    if format == "packed":
        return [
            _even_out(rank, rank_bins, sizes, token_budget, count)
            for rank, rank_bins in zip(ranks, bins, strict=True)
        ]
    return [rank_bins + [[] for _ in range(count - len(rank_bins))] for rank_bins in bins]


def _by_size(indices: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Longest first; ties in the given order of the batch."""
    return sorted(indices, key=lambda i: (-sizes[i], i))


def _spread(indices: Sequence[int], sizes: Sequence[int], count: int) -> list[Bin]:
    """`count` bins of about equal total size: the longest first, each to the least loaded bin."""
    bins: list[Bin] = [[] for _ in range(count)]
    loads = [(0, position) for position in range(count)]
    for index in _by_size(indices, sizes):
        load, position = heapq.heappop(loads)
        bins[position].append(index)
        heapq.heappush(loads, (load + sizes[index], position))
    return bins


def _fill_packed(indices: Sequence[int], sizes: Sequence[int], budget: int) -> list[Bin]:
    """Few bins of total size <= budget: the longest first, each to the fullest bin that fits."""
    bins: list[Bin] = []
    free: list[tuple[int, int]] = []  # (room left, bin), sorted
    for index in _by_size(indices, sizes):
        slot = bisect_left(free, (sizes[index], 0))
        if slot < len(free):
            room, target = free.pop(slot)
        else:
            room, target = budget, len(bins)
            bins.append([])
        bins[target].append(index)
        insort(free, (room - sizes[index], target))
    return bins


def _fill_padded(
    indices: Sequence[int], sizes: Sequence[int], budget: int, width: int | None
) -> list[Bin]:
    """Bins of similar lengths with rows * longest <= budget; `width` replaces the longest."""
    bins: list[Bin] = []
    for index in _by_size(indices, sizes):
        longest = width or (sizes[bins[-1][0]] if bins else 0)
        if bins and (len(bins[-1]) + 1) * longest <= budget:
            bins[-1].append(index)
        else:
            bins.append([index])
    return bins


def _even_out(
    indices: Sequence[int], filled: list[Bin], sizes: Sequence[int], budget: int, count: int
) -> list[Bin]:
    """`count` bins of about equal size, if the budget allows that; else `filled` and empty ones.

    Equal bins lower the peak memory and, where all share one shape, the padding.
    """
    even = _spread(indices, sizes, count)
    if all(len(members) <= 1 or sum(sizes[i] for i in members) <= budget for members in even):
        return even
    return filled + [[] for _ in range(count - len(filled))]
