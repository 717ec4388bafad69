"""Parts of full Hugging Face tensors on their way to another process, in buckets."""

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_cpgd.weights.tiling import Index, span

BUCKET_BYTES = 64 * 2**20
"""Of the buffer that sender and receiver need; a larger tensor is cut by rows."""

Piece = tuple[str, Index, Tensor]
"""Name of a full HF tensor, place in it, values."""


def iter_buckets(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """All pieces; those of a bucket have one number format and at most BUCKET_BYTES, but for a
    single row that is larger."""
    # One is filled for each format, since codes and factors of FP8 come in turns.
    filling: dict[torch.dtype, list[Piece]] = {}
    sizes: Counter[torch.dtype] = Counter()
    for piece in _cut_by_rows(pieces):
        dtype, nbytes = piece[2].dtype, piece[2].nbytes
        if sizes[dtype] and sizes[dtype] + nbytes > BUCKET_BYTES:
            yield filling.pop(dtype)
            del sizes[dtype]
        filling.setdefault(dtype, []).append(piece)
        sizes[dtype] += nbytes
    yield from filling.values()


def _cut_by_rows(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same numbers in pieces of at most BUCKET_BYTES, or of one row."""
    for name, index, values in pieces:
        # The matrix of one expert in a packed tensor has its number before the rows.
        before = [each for each in index if isinstance(each, int)]
        whole, *columns = index[len(before) :]
        rows, step = span(whole), max(1, BUCKET_BYTES * len(values) // max(1, values.nbytes))
        for first, part in zip(range(0, len(values), step), values.split(step), strict=True):
            own = rows[first : first + len(part)]
            yield name, (*before, slice(own.start, own.stop, own.step), *columns), part
