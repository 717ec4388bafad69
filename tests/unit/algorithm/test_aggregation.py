import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpgd.algorithm.aggregation import response_coefficients

KINDS = [
    "group_token_mean",
    "token_mean",
    "sequence_mean_token_mean",
    "sequence_mean_token_sum",
    "sequence_sum_over_length",
]


def coefficients(rows, kind, **options):
    """Of [P, G] response lengths, flat."""
    lengths = torch.tensor(rows)
    groups = torch.arange(len(lengths))[:, None].expand(lengths.shape)
    return response_coefficients(lengths.flatten(), groups.flatten(), kind, **options)


# Lengths 3, 5 | 2, 0: ten tokens, three responses, two groups of 8 and 2 tokens.
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("group_token_mean", [1 / 16, 1 / 16, 1 / 4, 0]),
        ("token_mean", [1 / 10, 1 / 10, 1 / 10, 0]),
        ("sequence_mean_token_mean", [1 / 9, 1 / 15, 1 / 6, 0]),
        ("sequence_mean_token_sum", [1 / 3, 1 / 3, 1 / 3, 0]),
        ("sequence_sum_over_length", [1 / 24, 1 / 24, 1 / 24, 0]),
    ],
)
def test_denominators_by_hand(kind, expected):
    result = coefficients([[3, 5], [2, 0]], kind, constant_length=8)
    assert result.tolist() == pytest.approx(expected)
    assert result.dtype == torch.float32


def test_a_group_without_tokens_still_counts_as_a_prompt_of_the_group_mean():
    # |D| = 3: 1 / (3 * 4), nothing, 1 / (3 * 1)
    result = coefficients([[4, 0], [0, 0], [0, 1]], "group_token_mean")
    assert result.tolist() == pytest.approx([1 / 12, 0, 0, 0, 0, 1 / 3])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_empty_responses_has_zero_coefficients(kind):
    assert coefficients([[0, 0, 0], [0, 0, 0]], kind).tolist() == [0.0] * 6


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=6))
def test_the_coefficients_of_a_mean_sum_to_one(rows):
    lengths = torch.tensor(rows)
    groups = (lengths.sum(dim=1) > 0).float().mean().item()
    some = float(lengths.sum() > 0)
    totals = {"group_token_mean": groups, "token_mean": some, "sequence_mean_token_mean": some}
    for kind, total in totals.items():
        result = (coefficients(rows, kind) * lengths.flatten()).sum().item()
        assert result == pytest.approx(total, abs=1e-6)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
    st.sampled_from(KINDS),
)
def test_order_and_names_of_the_groups_do_not_matter(responses, random, kind):
    lengths, groups = (torch.tensor(x) for x in zip(*responses, strict=True))
    order = random.sample(range(len(responses)), len(responses))
    expected = response_coefficients(lengths, groups, kind)
    shuffled = response_coefficients(lengths[order], 7 - groups[order], kind)
    assert torch.equal(shuffled, expected[order])
