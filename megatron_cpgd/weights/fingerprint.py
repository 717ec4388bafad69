"""A sum over the bits of a tensor that does not depend on how the tensor is cut.

F = sum of f_0(i_0) * f_1(i_1) * ... * bits modulo 2^32 over all elements, with their places (i_0,
i_1, ...) in the whole tensor, odd pseudo-random factors f and an element's bits as an integer. The
sums of disjoint parts add up to that of the whole. A change of one element always shows: it adds
odd numbers times a number other than 0 below 2^32, which 2^32 does not divide. Other changes
(swapped rows, another tensor) go unseen about as rarely as by CRC-32.
"""

import hashlib
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.weights.quantize import Tensors
from megatron_cpgd.weights.tiling import Index, span

type Fingerprints = dict[str, int]
"""Sums of whole tensors modulo 2^32, by HF name."""

_NAMED = 5
"""Tensors in a message."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_CHUNK = {"cpu": 2**18, "cuda": 2**24}
"""Elements that are multiplied at a time: on CPU the products stay in the cache."""


def fingerprint(part: Tensor, place: Index, dtype: torch.dtype) -> Tensor:
    """Scalar int32 on the part's device: the share of `part` in the sum of the whole tensor.

    Args:
        part: without the dimensions of which `place` selects one number.
        place: of the part in the whole tensor.
        dtype: the number format to be summed, into which the part is rounded.
    """
    row_factors, column_factors = _factors(tuple(map(span, place)), part.device)
    rows = part.reshape(len(row_factors), len(column_factors))
    step = max(1, _CHUNK[part.device.type] // max(1, len(column_factors)))
    room = torch.empty(min(step, len(rows)), rows.size(1), dtype=torch.int32, device=part.device)
    total = torch.zeros((), dtype=torch.int32, device=part.device)
    for chunk, factors in zip(rows.split(step), row_factors.split(step), strict=True):
        # Faster than a product of two integer formats, and always in the same memory.
        products = room[: len(chunk)].copy_(chunk.to(dtype).view(_INTEGERS[dtype.itemsize]))
        total += _sum(_sum(products.mul_(column_factors), 1) * factors, 0)
    return total


def whole_fingerprint(tensor: Tensor) -> int:
    """That of a whole tensor of any number format and shape."""
    if tensor.dtype.itemsize > 4:  # as pairs of int32
        tensor = tensor.reshape(-1).view(torch.int32)
    tensor = tensor.reshape(tensor.shape or (1,))
    place = tuple(slice(0, size) for size in tensor.shape)
    return int(fingerprint(tensor, place, tensor.dtype)) % 2**32


def combine(tensors: Tensors, fingerprints: Fingerprints) -> str:
    """16 hex digits over names, dtypes, shapes and fingerprints of all tensors, in order."""
    lines = [
        f"{name} {dtype} {shape} {fingerprints[name]:08x}"
        for name, (dtype, shape) in tensors.items()
    ]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


def merge_fingerprints(parts: Iterable[Fingerprints]) -> Fingerprints:
    """Those of several readers together.

    Raises:
        WeightSyncError: two have read the same tensor with different values.
    """
    merged: Fingerprints = {}
    for part in parts:
        for name in part.keys() & merged.keys():
            if part[name] != merged[name]:
                raise WeightSyncError(f"workers have read different values of {name}")
        merged |= part
    return merged


def describe_difference(first: Fingerprints, second: Fingerprints) -> str | None:
    """Which tensors differ, for a message; None: none does."""
    different = [name for name in first | second if first.get(name) != second.get(name)]
    if not different:
        return None
    more = f" and {len(different) - _NAMED} more" if len(different) > _NAMED else ""
    return f"{', '.join(different[:_NAMED])}{more}; in all {len(different)} of {len(first)} tensors"


@lru_cache(maxsize=128)
def _factors(places: tuple[range, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Products of the factors of all dimensions but the last, flat, and the factors of the last."""
    rows = torch.ones(1, dtype=torch.int32, device=device)
    *leading, last = (_odd_numbers(dim, each, device) for dim, each in enumerate(places))
    for factors in leading:
        rows = (rows[:, None] * factors).flatten()
    return rows, last


def _odd_numbers(dim: int, places: range, device: torch.device) -> Tensor:
    """[len(places)] int32: the lower half of splitmix64 (Steele et al., 2014)."""
    x = torch.arange(places.start, places.stop, places.step, device=device) + ((dim + 1) << 40)
    x *= _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return (x ^ _shift_right(x, 31)).to(torch.int32) | 1


def _sum(numbers: Tensor, dim: int) -> Tensor:
    """Modulo 2^32; torch would widen."""
    return numbers.sum(dim, dtype=torch.int32)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """The shift of unsigned numbers; torch's repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - 2**64
