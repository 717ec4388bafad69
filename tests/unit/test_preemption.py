"""Sampling that is abandoned leaves no trace in the order of the prompts."""

from types import SimpleNamespace

import pytest

from megatron_cpgd.batch_queue import BatchQueue
from megatron_cpgd.data.stream import PromptStream
from megatron_cpgd.in_flight import InFlight
from megatron_cpgd.preemption import _take
from megatron_cpgd.sampler import Sampler as RealSampler
from megatron_cpgd.stop_request import StopRequest
from megatron_cpgd.tracking.timer import StepTimer


class Sampler:
    """A batch is the two prompts that it draws; the request to stop comes after so many draws."""

    def __init__(self, stop: StopRequest, interrupted_draw: int | None) -> None:
        self.stream = PromptStream(7, 2, seed=3, shuffle=True)
        self._prompts = SimpleNamespace(stream=self.stream)
        self.in_flight = InFlight(piece_tokens=1, max_tokens=2)
        self._stop, self._interrupted_draw = stop, interrupted_draw

    position, return_to = RealSampler.position, RealSampler.return_to

    def sample(self, *, step: int, version: int, timer: StepTimer) -> tuple[int, ...]:
        batch = (version, *self.stream.next_batch())
        self.in_flight.begin(batch[1:], seed=0, size=1)
        for group in self.in_flight.groups:
            group.rollouts[0] = version
        if self.stream.batches == self._interrupted_draw:
            self._interrupted_draw = None
            self._stop.asked = True
            self._stop.interrupt()
        return batch


def build_run(staleness: int, interrupted_draw: int | None = None):
    stop = StopRequest()
    sampler = Sampler(stop, interrupted_draw)
    queue = BatchQueue(sampler, staleness=staleness, last_step=9)
    return SimpleNamespace(batches=queue, stop=stop, sampler=sampler)


def state(run):
    groups = [(group.prompt, list(group.rollouts)) for group in run.sampler.in_flight.groups]
    return run.sampler.stream.state(), run.batches.waiting, groups


def take(run, step: int):
    return _take(run, step, StepTimer())


# With staleness 2 the first step draws three batches: the second draw is in the middle of it.
@pytest.mark.parametrize(("staleness", "interrupted_draw"), [(0, 1), (0, 3), (2, 2), (2, 4)])
def test_an_abandoned_step_is_sampled_again_as_if_nothing_had_happened(staleness, interrupted_draw):
    undisturbed = build_run(staleness)
    expected = [take(undisturbed, step) for step in range(1, 6)]
    run = build_run(staleness, interrupted_draw)
    taken = []
    for step in range(1, 6):
        before = state(run)
        batch = take(run, step)
        if batch is None:
            assert state(run) == before
            run.stop.asked = False  # the next start
            batch = take(run, step)
        taken.append(batch)
    assert taken == expected


def test_a_request_that_came_during_the_step_before_prevents_the_sampling():
    run = build_run(0)
    run.stop.asked = True
    assert take(run, 1) is None
    assert run.sampler.stream.batches == 0
