"""Whether parts of a tensor make it up: each element in one of them."""

from collections.abc import Sequence

Index = tuple[int | slice, ...]
"""Place of a part in a tensor, dimension by dimension."""


def fills(parts: Sequence[Index], shape: tuple[int, ...]) -> bool:
    """Whether parts of a tensor, cut alike along each dimension, make it up without an overlap."""
    if not shape:
        return list(parts) == [()]
    first: dict[Index, list[int | slice]] = {}
    for index, *rest in parts:
        first.setdefault(tuple(rest), []).append(index)
    tiled = all(tiles(list(map(span, indices)), shape[0]) for indices in first.values())
    return tiled and fills(list(first), shape[1:])


def span(index: int | slice) -> range:
    """The places that an index selects."""
    if isinstance(index, int):
        return range(index, index + 1)
    return range(index.start, index.stop, index.step or 1)


def tiles(spans: list[range], length: int) -> bool:
    """Whether spans of one step cover 0 to `length` - 1 once."""
    steps = {part.step for part in spans}
    if len(steps) != 1:
        return False
    [step] = steps
    ends = [0] * step  # of the rows k, k + step, k + 2 * step, ...
    for part in sorted(spans, key=lambda part: part.start):
        turn, row = part.start % step, part.start // step
        if row != ends[turn]:
            return False
        ends[turn] += len(part)
    return ends == [len(range(turn, length, step)) for turn in range(step)]
