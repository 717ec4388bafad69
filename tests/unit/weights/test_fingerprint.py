"""Fingerprints of parts add up to that of the whole, and show every change."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.weights import fingerprint as module
from megatron_cpgd.weights.fingerprint import (
    combine,
    describe_difference,
    fingerprint,
    merge_fingerprints,
    whole_fingerprint,
)

DTYPES = [torch.float32, torch.bfloat16]


def of(tensor, dtype=None):
    place = tuple(slice(0, size) for size in tensor.shape)
    return int(fingerprint(tensor, place, dtype or tensor.dtype))


def random(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wrapped(number):
    """As an int32."""
    return (number + 2**31) % 2**32 - 2**31


def splitmix(number):
    """The generator of Steele et al. on its `number`-th state from 0, 64 bits."""
    x = number * 0x9E3779B97F4A7C15 % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_the_factors_are_those_of_splitmix64_made_odd():
    # The first output for seed 0 as published, https://prng.di.unimi.it/splitmix64.c.
    assert splitmix(1) == 0xE220A8397B1DCDAF
    factors = module._odd_numbers(1, range(3, 6), torch.device("cpu")).tolist()
    assert factors == [wrapped(splitmix(n + (2 << 40)) | 1) for n in (3, 4, 5)]


def test_a_matrix_of_two_numbers_by_hand():
    # The bits of 1.0 in bfloat16 are 0x3f80 = 16256, those of -0.0 are 0x8000 = -32768.
    row, *columns = [splitmix(n) | 1 for n in (1 << 40, 2 << 40, (2 << 40) + 1)]
    expected = row * columns[0] * 16256 + row * columns[1] * -32768
    assert of(torch.tensor([[1.0, -0.0]], dtype=torch.bfloat16)) == wrapped(expected)


@st.composite
def cut_tensors(draw):
    """A tensor of one to three dimensions, and a grid of cuts along each."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    cuts = [sorted({0, size, *draw(st.lists(st.integers(0, size)))}) for size in shape]
    tensor = random(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 9)))
    return tensor, [[slice(a, b) for a, b in pairwise(c)] for c in cuts]


def grid(cuts):
    if not cuts:
        return [()]
    return [(first, *rest) for first in cuts[0] for rest in grid(cuts[1:])]


@given(cut_tensors(), st.sampled_from([1, 4, 2**18]))
@settings(deadline=None)
def test_parts_add_up_to_the_whole_however_it_is_cut(case, chunk):
    tensor, cuts = case
    whole = of(tensor)
    module._CHUNK["cpu"], before = chunk, module._CHUNK["cpu"]
    try:
        parts = [int(fingerprint(tensor[place], place, tensor.dtype)) for place in grid(cuts)]
    finally:
        module._CHUNK["cpu"] = before
    assert wrapped(sum(parts)) == whole


def test_rows_in_turns_and_single_matrices_of_a_packed_tensor_add_up_too():
    # As gpt-oss has them: [experts, columns, rows], gate and up row by row in turns, transposed.
    packed = random((3, 5, 8), torch.bfloat16)
    parts = 0
    for expert in range(3):
        for first in range(2):
            place = (expert, slice(0, 5), slice(first, 8 + first, 2))
            view = packed[place].t().contiguous().t()
            parts += int(fingerprint(view, place, torch.bfloat16))
    assert wrapped(parts) == of(packed)


@given(st.sampled_from(DTYPES), st.integers(0, 34), st.integers(0, 31))
@settings(deadline=None)
def test_one_bit_that_flips_changes_it(dtype, element, bit):
    tensor = random((5, 7), dtype)
    expected = of(tensor)
    integers = tensor.view({2: torch.int16, 4: torch.int32}[dtype.itemsize]).view(-1)
    bits = 8 * dtype.itemsize
    integers[element] ^= wrapped_bit(bit % bits, bits)
    assert of(tensor) != expected


def wrapped_bit(bit, bits):
    return -(1 << bit) if bit == bits - 1 else 1 << bit


@given(st.permutations(range(5)), st.permutations(range(4)))
@settings(deadline=None)
def test_rows_and_columns_in_another_order_change_it(rows, columns):
    tensor = random((5, 4), torch.bfloat16)
    moved = tensor[list(rows)][:, list(columns)]
    assert (of(moved) == of(tensor)) == moved.equal(tensor)


@pytest.mark.parametrize("size", [2, 6])
def test_a_transposed_or_an_older_tensor_changes_it(size):
    tensor = random((size, size), torch.float32)
    assert of(tensor.t()) != of(tensor)
    assert of(tensor + 1e-6) != of(tensor)


def test_it_is_that_of_the_rounded_tensor():
    tensor = random((300, 5), torch.float32)
    assert of(tensor, torch.bfloat16) == of(tensor.bfloat16())


def test_keys_in_the_place_of_values_change_the_digest():
    tensors = {"k_proj": (torch.float32, (2, 3)), "v_proj": (torch.float32, (2, 3))}
    sums = {"k_proj": 1, "v_proj": 2}
    assert combine(tensors, sums) != combine(tensors, {"k_proj": 2, "v_proj": 1})
    assert combine(tensors | {"v_proj": (torch.float32, (3, 2))}, sums) != combine(tensors, sums)
    assert combine(tensors | {"v_proj": (torch.int32, (2, 3))}, sums) != combine(tensors, sums)
    assert len(combine(tensors, sums)) == 16


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 2), (2, 3, 2)])
def test_a_whole_tensor_may_have_any_number_format_and_shape(dtype, shape):
    tensor = random(shape, torch.float32).mul(8).to(dtype)
    sum_ = whole_fingerprint(tensor)
    assert 0 <= sum_ < 2**32 and whole_fingerprint(tensor.clone()) == sum_
    if tensor.numel():
        changed = tensor.clone()
        changed.view(-1).view(torch.uint8)[-1] ^= 1
        assert whole_fingerprint(changed) != sum_


def test_readers_of_different_tensors_add_up_and_two_of_the_same_must_agree():
    assert merge_fingerprints([{"a": 1}, {"b": 2}, {"a": 1}]) == {"a": 1, "b": 2}
    with pytest.raises(WeightSyncError, match="different values of a"):
        merge_fingerprints([{"a": 1, "b": 2}, {"a": 3}])


def test_a_message_names_the_first_tensors_that_differ_or_are_missing():
    first = {name: 0 for name in "abcdefgh"}
    assert describe_difference(first, dict(first)) is None
    assert describe_difference(first, first | {"c": 1}) == "c; in all 1 of 8 tensors"
    assert describe_difference({"a": 1}, {"a": 1, "x": 0}) == "x; in all 1 of 1 tensors"
    changed = {name: 1 for name in first}
    expected = "a, b, c, d, e and 3 more; in all 8 of 8 tensors"
    assert describe_difference(first, changed) == expected
