import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpgd.data.stream import PromptStream
from megatron_cpgd.errors import DataError


@st.composite
def streams(draw):
    num_prompts = draw(st.integers(1, 30))
    return {
        "num_prompts": num_prompts,
        "batch_size": draw(st.integers(1, num_prompts)),
        "seed": draw(st.integers(0, 3)),
        "shuffle": draw(st.booleans()),
    }


def draw_batches(stream, count):
    return [stream.next_batch() for _ in range(count)]


def test_unshuffled_batches_run_over_the_end_of_the_data():
    stream = PromptStream(5, 2, seed=0, shuffle=False)
    assert draw_batches(stream, 5) == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]


def test_batch_over_the_end_of_the_data_postpones_what_it_already_holds():
    stream = PromptStream(3, 2, seed=0, shuffle=False)
    # Epochs: 0 1 2 | 0 1 2 | ...; with batches of 2 the boundary batch is [2, 0], then 1 2.
    assert draw_batches(stream, 3) == [[0, 1], [2, 0], [1, 2]]
    stream = PromptStream(3, 3, seed=0, shuffle=False)
    assert draw_batches(stream, 2) == [[0, 1, 2], [0, 1, 2]]
    stream = PromptStream(4, 3, seed=0, shuffle=False)
    # Third batch: 2 3 are left of epoch 1 (0 1 | 2 3), epoch 2 starts with 0: [2, 3, 0].
    assert draw_batches(stream, 4) == [[0, 1, 2], [3, 0, 1], [2, 3, 0], [1, 2, 3]]


@settings(deadline=None)
@given(streams(), st.integers(1, 40))
def test_every_prompt_once_per_epoch_and_none_twice_in_a_batch(options, count):
    batches = draw_batches(PromptStream(**options), count)
    assert all(len(set(batch)) == options["batch_size"] for batch in batches)
    drawn = [index for batch in batches for index in batch]
    n = options["num_prompts"]
    for start in range(0, len(drawn) - n + 1, n):
        assert sorted(drawn[start : start + n]) == list(range(n))


@settings(deadline=None)
@given(streams(), st.integers(0, 25), st.integers(1, 25))
def test_resumed_stream_continues_identically(options, before, after):
    stream = PromptStream(**options)
    draw_batches(stream, before)
    saved = json.loads(json.dumps(stream.state()))
    expected = draw_batches(stream, after)
    resumed = PromptStream(**options)
    draw_batches(resumed, 3)
    resumed.load_state(saved)
    assert draw_batches(resumed, after) == expected
    assert resumed.state() == stream.state()


def test_state_holds_integers_only():
    stream = PromptStream(5, 2, seed=3, shuffle=True, checksum=9)
    stream.next_batch()
    assert stream.state() == {
        "batches": 1, "num_prompts": 5, "batch_size": 2, "seed": 3, "shuffle": 1, "checksum": 9
    }  # fmt: skip
    assert all(type(value) is int for value in stream.state().values())


def test_order_differs_between_epochs_and_between_seeds():
    def epochs(seed):
        return draw_batches(PromptStream(50, 50, seed=seed, shuffle=True), 2)

    first, second = epochs(0)
    assert first != second
    assert first != epochs(1)[0]
    assert first == epochs(0)[0]
    assert first != list(range(50))


@pytest.mark.parametrize(
    "change", [{"num_prompts": 6}, {"batch_size": 1}, {"seed": 1}, {"checksum": 1}]
)
def test_state_of_another_stream_is_refused(change):
    options = {"num_prompts": 5, "batch_size": 2, "seed": 0}
    state = PromptStream(**options, shuffle=True).state()
    with pytest.raises(DataError, match="the saved prompt stream has"):
        PromptStream(**options | change, shuffle=True).load_state(state)


@pytest.mark.parametrize("num_prompts", [0, 3])
def test_batch_larger_than_the_data_is_refused(num_prompts):
    with pytest.raises(DataError, match=rf"prompts_per_step=4 exceeds the {num_prompts} prompts"):
        PromptStream(num_prompts, 4, seed=0, shuffle=True)
