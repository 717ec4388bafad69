import pytest

from megatron_cpgd.tracking.timer import StepTimer


class Clock:
    """Shows what it is set to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_the_parts_and_the_rest_add_up_to_the_step(clock):
    timer = StepTimer(clock)
    clock.now = 101.0  # 1 s before
    for seconds in (2.0, 3.0):  # 5 s in two pieces
        with timer("generate"):
            clock.now += seconds
    with timer("train"):
        clock.now += 4.0
    clock.now += 0.5
    assert timer.finish_step() == {
        "time/generate_s": 5.0,
        "time/train_s": 4.0,
        "time/other_s": 1.5,
        "time/total_s": 10.5,
    }


def test_the_next_step_begins_where_the_last_one_ended(clock):
    timer = StepTimer(clock)
    with timer("train"):
        clock.now += 4.0
    timer.finish_step()
    clock.now += 1.0
    assert timer.finish_step() == {"time/other_s": 1.0, "time/total_s": 1.0}


def test_a_part_that_fails_is_timed_and_frees_the_timer(clock):
    timer = StepTimer(clock)
    with pytest.raises(RuntimeError), timer("score"):
        clock.now += 2.0
        raise RuntimeError
    with timer("train"):
        clock.now += 1.0
    assert timer.finish_step()["time/score_s"] == 2.0


def test_nested_parts_would_count_twice_and_are_refused(clock):
    timer = StepTimer(clock)
    with pytest.raises(AssertionError, match="inside"), timer("train"), timer("sync"):
        pass
