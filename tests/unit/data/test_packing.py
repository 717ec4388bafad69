import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpgd.data.packing import (
    build_micro_batch,
    micro_batch_shape,
    sequence_index,
    unpack_tokens,
)
from megatron_cpgd.data.plan import plan_micro_batches
from megatron_cpgd.types import LossSequence

NAMES = ["advantage", "old_logprobs"]


def make_sequence(prompt, response, **tensors):
    return LossSequence(
        input_ids=torch.tensor(prompt + response),
        prompt_length=len(prompt),
        tensors={name: torch.tensor(values) for name, values in tensors.items()},
    )


A = make_sequence([11, 12], [13, 14], w=[0.5, 0.25])  # length 4
B = make_sequence([21], [22, 23], w=[2.0, 3.0])  # length 3
EMPTY = make_sequence([31, 32], [], w=[])  # length 2


def test_packed_layout_worked_by_hand():
    batch = build_micro_batch([A, B], [1, 0], format="packed", tensor_names=["w"], align=4)
    # B padded to 4, then A: position p predicts token p + 1, the response tokens only.
    assert batch.input_ids.tolist() == [[21, 22, 23, 0, 11, 12, 13, 14]]
    assert batch.targets.tolist() == [[22, 23, 0, 0, 0, 13, 14, 0]]
    assert batch.loss_mask.int().tolist() == [[1, 1, 0, 0, 0, 1, 1, 0]]
    assert batch.tensors["w"].tolist() == [[2.0, 3.0, 0, 0, 0, 0.5, 0.25, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.cu_seqlens == [0, 4, 8]
    assert (batch.indices, batch.lengths) == ([1, 0], [3, 4])
    assert batch.targets.dtype == batch.position_ids.dtype == torch.int64
    assert batch.tensors["w"].dtype == torch.float32


def test_padded_layout_worked_by_hand():
    batch = build_micro_batch([A, B], [0, 1], format="padded", tensor_names=["w"], align=3)
    assert batch.input_ids.tolist() == [[11, 12, 13, 14, 0, 0], [21, 22, 23, 0, 0, 0]]
    assert batch.targets.tolist() == [[0, 13, 14, 0, 0, 0], [22, 23, 0, 0, 0, 0]]
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert batch.tensors["w"].tolist() == [[0, 0.5, 0.25, 0, 0, 0], [2.0, 3.0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert batch.cu_seqlens is None
    assert (batch.indices, batch.lengths) == ([0, 1], [4, 3])


def test_last_packed_sequence_absorbs_the_rest_of_the_total():
    # Extents 4 + 4 = 8 with align 2; the total must be a multiple of 6: 12, so A gets 8.
    batch = build_micro_batch(
        [A, B], [1, 0], format="packed", tensor_names=[], align=2, total_multiple=6
    )
    assert batch.cu_seqlens == [0, 4, 12]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]]


def test_every_extent_stays_a_multiple_of_an_alignment_that_does_not_divide_the_total_multiple():
    # align 4 and total multiple 10: 8 tokens become 20, not 10, which would leave 6 for the last.
    batch = build_micro_batch(
        [A, B], [0, 1], format="packed", tensor_names=[], align=4, total_multiple=10
    )
    assert batch.cu_seqlens == [0, 4, 20]


def test_exact_packed_length():
    batch = build_micro_batch([A], [0], format="packed", tensor_names=[], align=2, length=10)
    assert batch.cu_seqlens == [0, 10]
    assert batch.lengths == [4]


def test_exact_padded_shape_has_filling_rows():
    batch = build_micro_batch([B], [0], format="padded", tensor_names=["w"], length=5, rows=3)
    assert batch.input_ids.shape == (3, 5)
    assert (batch.indices, batch.lengths) == ([0, -1, -1], [3, 1, 1])
    assert batch.loss_mask.sum(dim=1).tolist() == [2, 0, 0]


@pytest.mark.parametrize(
    "exact", [{"length": 6}, {"length": 10, "align": 4}, {"length": 8, "rows": 2}]
)
def test_impossible_packed_shape_is_refused(exact):
    with pytest.raises(AssertionError):
        build_micro_batch([A, B], [0, 1], format="packed", tensor_names=[], **exact)


@pytest.mark.parametrize(("format", "cu_seqlens"), [("packed", [0, 6]), ("padded", None)])
def test_filling_batch_has_the_minimum_length_and_every_tensor(format, cu_seqlens):
    batch = build_micro_batch([], [], format=format, tensor_names=NAMES, align=2, total_multiple=6)
    assert batch.input_ids.shape == (1, 6)
    assert not batch.loss_mask.any()
    assert (batch.indices, batch.lengths, batch.cu_seqlens) == ([-1], [1], cu_seqlens)
    assert sorted(batch.tensors) == sorted(NAMES)
    assert unpack_tokens(torch.ones(1, 6), batch) == {}


@pytest.mark.parametrize("format", ["packed", "padded"])
def test_empty_response_has_no_target_and_unpacks_to_nothing(format):
    batch = build_micro_batch([EMPTY, B], [0, 1], format=format, tensor_names=["w"])
    assert batch.loss_mask.sum() == 2  # those of B
    unpacked = unpack_tokens(batch.tensors["w"], batch)
    assert unpacked[0].shape == (0,)
    assert unpacked[1].tolist() == [2.0, 3.0]


def test_sequences_may_come_as_a_mapping_of_those_that_are_here():
    batch = build_micro_batch({7: B}, [7], format="packed", tensor_names=["w"])
    assert unpack_tokens(batch.tensors["w"], batch)[7].tolist() == [2.0, 3.0]


@st.composite
def batches(draw):
    """Sequences whose tokens are all different, with values that are all different."""
    sequences, token = [], 1
    for _ in range(draw(st.integers(1, 6))):
        prompt, response = draw(st.integers(1, 7)), draw(st.integers(0, 7))
        ids = torch.arange(token, token + prompt + response)
        token += prompt + response
        tensors = {name: torch.rand(response) + 1 for name in NAMES}
        sequences.append(LossSequence(input_ids=ids, prompt_length=prompt, tensors=tensors))
    indices = draw(st.permutations(range(len(sequences))))
    return sequences, indices[: draw(st.integers(1, len(sequences)))]


LAYOUTS = st.fixed_dictionaries(
    {
        "format": st.sampled_from(["packed", "padded"]),
        "align": st.integers(1, 6),
        "total_multiple": st.integers(1, 8),
    }
)


@settings(deadline=None)
@given(batches(), LAYOUTS)
def test_unpacking_is_the_inverse_of_placing(batch, layout):
    sequences, indices = batch
    micro_batch = build_micro_batch(sequences, indices, tensor_names=NAMES, **layout)
    for name in NAMES:
        unpacked = unpack_tokens(micro_batch.tensors[name], micro_batch)
        assert sorted(unpacked) == sorted(indices)
        for index, values in unpacked.items():
            assert torch.equal(values, sequences[index].tensors[name])


@settings(deadline=None)
@given(batches(), LAYOUTS)
def test_targets_are_the_next_tokens_of_the_same_sequence(batch, layout):
    sequences, indices = batch
    micro_batch = build_micro_batch(sequences, indices, tensor_names=NAMES, **layout)
    targets = unpack_tokens(micro_batch.targets, micro_batch)
    inputs = unpack_tokens(micro_batch.input_ids, micro_batch)
    for index in indices:
        sequence = sequences[index]
        assert torch.equal(targets[index], sequence.input_ids[sequence.prompt_length :])
        assert torch.equal(inputs[index] + 1, targets[index])  # tokens count up in a sequence
    assert micro_batch.loss_mask.sum() == sum(sequences[i].response_length for i in indices)
    off = ~micro_batch.loss_mask
    assert not micro_batch.targets[off].any()
    assert not any(values[off].any() for values in micro_batch.tensors.values())


@settings(deadline=None)
@given(batches(), LAYOUTS)
def test_padded_lengths_respect_both_units(batch, layout):
    sequences, indices = batch
    micro_batch = build_micro_batch(sequences, indices, tensor_names=NAMES, **layout)
    length = micro_batch.input_ids.shape[1]
    assert length % layout["total_multiple"] == 0 and length % layout["align"] == 0
    for start, end in zip(
        (micro_batch.cu_seqlens or [])[:-1], (micro_batch.cu_seqlens or [])[1:], strict=True
    ):
        assert (end - start) % layout["align"] == 0
        assert micro_batch.position_ids[0, start:end].tolist() == list(range(end - start))


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 3), st.integers(1, 80), LAYOUTS)
def test_all_micro_batches_of_a_plan_fit_the_common_shape(lengths, dp_size, budget, layout):
    plan = plan_micro_batches(
        lengths,
        dp_size=dp_size,
        token_budget=budget,
        format=layout["format"],
        align=layout["align"],
        common_shape=True,
    )
    shape = micro_batch_shape(plan, lengths, **layout)
    sequences = [make_sequence([1] * length, []) for length in lengths]
    for indices in (indices for rank in plan for indices in rank):
        batch = build_micro_batch(
            sequences, indices, tensor_names=[], length=shape.length, rows=shape.rows, **layout
        )
        assert batch.input_ids.shape == (shape.rows, shape.length)


def test_common_shape_is_the_smallest_that_fits():
    # Packed totals are 4 + 4 = 8 and 2; padded rows are 2 of length 4 and 1 of length 2.
    plan, lengths = [[[0, 1]], [[2]]], [4, 3, 2]
    packed = micro_batch_shape(plan, lengths, format="packed", align=2)
    assert (packed.length, packed.rows) == (8, 1)
    padded = micro_batch_shape(plan, lengths, format="padded", align=2)
    assert (padded.length, padded.rows) == (4, 2)


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("packed", [[0, 0, -1, -1, -1, -1, 2, 2, -1]]),  # B of 3, EMPTY of 2, A of 4
        ("padded", [[0, 0, -1, -1], [-1] * 4, [-1, 2, 2, -1]]),
    ],
)
def test_sequence_index_counts_the_sequences_of_the_micro_batch(format, expected):
    batch = build_micro_batch([A, B, EMPTY], [1, 2, 0], format=format, tensor_names=["w"])
    assert sequence_index(batch).tolist() == expected


def test_filling_belongs_to_no_sequence():
    batch = build_micro_batch([], [], format="padded", tensor_names=[], rows=2)
    assert sequence_index(batch).tolist() == [[-1], [-1]]
