"""Text does not repeat itself, loops do."""

import random
import time

import pytest

from megatron_cpgd.stability.repetition import repetition_frac


def counted(tokens: list[int]) -> float:
    """The definition, with tuples in a set."""
    grams = [tuple(tokens[i : i + 16]) for i in range(len(tokens) - 15)]
    return 1 - len(set(grams)) / len(grams)


# Period p in L tokens: p different 16-grams of L - 15.
@pytest.mark.parametrize(("period", "length"), [(1, 100), (7, 200), (40, 1000)])
def test_a_loop_is_close_to_one(period, length):
    tokens = [i % period for i in range(length)]
    assert repetition_frac(tokens) == pytest.approx(1 - period / (length - 15))


def test_text_and_short_responses_are_zero():
    words = random.Random(0)
    assert repetition_frac([words.randrange(150_000) for _ in range(4000)]) == 0
    assert repetition_frac([5] * 16) == 0 == repetition_frac([])
    # One repeated opening of 15 tokens is not enough, of 16 it is one of 4000 - 15.
    tokens = list(range(4000))
    tokens[2000:2015] = tokens[:15]
    assert repetition_frac(tokens) == 0
    tokens[2015] = tokens[15]
    assert repetition_frac(tokens) == pytest.approx(1 / 3985)


@pytest.mark.parametrize("seed", range(20))
def test_the_hash_counts_what_tuples_count(seed):
    words = random.Random(seed)
    phrases = [[words.randrange(4) for _ in range(words.randrange(5, 40))] for _ in range(5)]
    tokens = [token for _ in range(40) for token in words.choice(phrases)]
    assert repetition_frac(tokens) == counted(tokens)


def test_a_batch_of_a_thousand_long_responses_takes_seconds_at_most():
    words = random.Random(0)
    tokens = [words.randrange(150_000) for _ in range(4000)]
    start = time.process_time()
    for _ in range(100):
        repetition_frac(tokens)
    assert time.process_time() - start < 1.0  # 0.1 s on one quiet core
