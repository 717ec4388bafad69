import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpgd.algorithm.sequences import one_rank_sequences

# Two responses of 3 and 2 tokens in a packed row, with prompts and padding between them.
INDEX = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1]])
VALUES = torch.tensor([[0.0, 3.0, 1.0, 2.0, 0.0, 0.0, 5.0, 7.0, 0.0]])


def test_sums_and_means_are_per_response():
    sequences = one_rank_sequences(INDEX)
    assert sequences.sum(VALUES).tolist() == [[0, 6, 6, 6, 0, 0, 12, 12, 0]]
    assert sequences.mean(VALUES).tolist() == [[0, 2, 2, 2, 0, 0, 6, 6, 0]]


def test_prefix_minimum_excludes_the_token_and_starts_anew():
    # first tokens have an empty prefix: 0. 5 is the minimum of a prefix of one, above 0.
    result = one_rank_sequences(INDEX).prefix_min(VALUES)
    assert result.tolist() == [[0, 0, 3, 1, 0, 0, 0, 5, 0]]


def test_a_micro_batch_of_filling_has_no_response():
    sequences = one_rank_sequences(torch.full((2, 3), -1))
    for result in (sequences.sum, sequences.mean, sequences.prefix_min):
        assert result(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


@given(st.lists(st.lists(st.floats(-20, 20, width=32), max_size=6), min_size=1, max_size=6))
def test_any_responses_in_any_rows_agree_with_a_loop(responses):
    width = max(len(r) for r in responses) + 1
    index, values = torch.full((len(responses), width), -1), torch.zeros(len(responses), width)
    expected_min, expected_sum = torch.zeros_like(values), torch.zeros_like(values)
    for row, response in enumerate(responses):
        for t, value in enumerate(response):
            index[row, t + 1], values[row, t + 1] = row, value
            expected_min[row, t + 1] = min(response[:t], default=0.0)
            expected_sum[row, t + 1] = sum(response)
    sequences = one_rank_sequences(index)
    torch.testing.assert_close(sequences.prefix_min(values), expected_min, rtol=0, atol=1e-6)
    torch.testing.assert_close(sequences.sum(values), expected_sum)
