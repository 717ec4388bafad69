import threading
from pathlib import Path

import pytest
import torch

from megatron_cpgd.algorithm.advantages import compute_advantages
from megatron_cpgd.batch_queue import BatchQueue
from megatron_cpgd.errors import RolloutError
from megatron_cpgd.scored_batch import ScoredBatch
from megatron_cpgd.tracking.timer import StepTimer
from megatron_cpgd.types import Prompt, Rollout, RolloutGroup, RouteLayout, Routes

LAYOUT = RouteLayout(layers=[3], top_k=2, num_experts=256)


class CountingSampler:
    """Batch number n, sampled by `version`."""

    def __init__(self) -> None:
        self.batches = 0
        self.steps: list[int] = []
        """For which each batch was said to be."""

    def position(self) -> int:
        return self.batches

    def return_to(self, position: int) -> None:
        self.batches = position

    def sample(self, *, step: int, version: int, timer: StepTimer) -> ScoredBatch:
        self.batches += 1
        self.steps.append(step)
        rollouts = [
            Rollout(
                token_ids=[5, 6], logprobs=[-0.1, -1e-7 / 3], finish_reason="stop",
                weight_version=version, text=f"response {i}", routes=routes,
            )
            for i, routes in enumerate([None, Routes(layout=LAYOUT, experts=bytes([0, 2, 255, 1]))])
        ]  # fmt: skip
        prompt = Prompt(
            id=f"train:{self.batches}", token_ids=[1], text="?", answer=None, fields={"a": [1, "x"]}
        )
        return ScoredBatch(
            groups=[RolloutGroup(prompt=prompt, rollouts=rollouts)],
            rewards=[[0.0, 0.1]],
            reward_parts={"r": [[0.0, 0.1]]},
            advantages=compute_advantages(
                torch.tensor([[0.0, 0.1]]), prompt_weight="std", max_weight=3.0
            ),
            version=version,
            metrics={"reward/mean": 0.1 / 2, "rollout/sampled_batches": 2},
        )


def number_and_version(batch: ScoredBatch) -> tuple[int, int]:
    [group] = batch.groups
    return int(group.prompt.id.removeprefix("train:")), group.rollouts[0].weight_version


@pytest.mark.parametrize(
    ("staleness", "versions"),
    [(0, [0, 1, 2, 3, 4]), (1, [0, 0, 1, 2, 3]), (2, [0, 0, 0, 1, 2]), (9, [0, 0, 0, 0, 0])],
)
def test_a_step_trains_on_what_the_weights_so_many_steps_before_have_sampled(staleness, versions):
    sampler = CountingSampler()
    queue = BatchQueue(sampler, staleness=staleness, last_step=5)
    taken = [number_and_version(queue.take(step, StepTimer())) for step in range(1, 6)]
    assert taken == list(zip([1, 2, 3, 4, 5], versions, strict=True))
    assert sampler.steps == [1, 2, 3, 4, 5]
    assert sampler.batches == 5, "nothing is sampled that no step trains on"


def test_a_checkpoint_holds_the_waiting_batches_bit_by_bit(tmp_path: Path):
    sampler = CountingSampler()
    queue = BatchQueue(sampler, staleness=2, last_step=9)
    queue.take(1, StepTimer())
    for name, content in queue.files().items():
        (tmp_path / name).write_bytes(content)
    resumed = BatchQueue(sampler, staleness=2, last_step=9)
    resumed.load(tmp_path)
    for step in (2, 3):
        expected, actual = queue._batches[step - 2], resumed._batches[step - 2]
        for field in ("groups", "rewards", "reward_parts", "version", "metrics"):
            assert repr(getattr(actual, field)) == repr(getattr(expected, field))
        assert actual.groups == expected.groups  # routes too, which repr leaves out
        for field in ("values", "prompt_weight"):
            left, right = (getattr(b.advantages, field) for b in (actual, expected))
            assert left.dtype == right.dtype and torch.equal(left, right)
    assert number_and_version(resumed.take(2, StepTimer())) == (2, 0)
    assert sampler.batches == 4, "only the one batch that became free is sampled anew"


@pytest.mark.parametrize("staleness", [1, 2, 9])
def test_in_the_background_the_same_batches_are_sampled_as_before_the_step(staleness):
    both = []
    for overlap in (False, True):
        sampler = CountingSampler()
        queue = BatchQueue(sampler, staleness=staleness, last_step=5, overlap=overlap)
        timer, taken = StepTimer(), []
        for step in range(1, 6):
            taken.append(number_and_version(queue.take(step, timer)))
            queue.finish(timer)
        assert sampler.steps == [1, 2, 3, 4, 5]
        both.append(taken)
    assert both[0] == both[1]


class HeldSampler(CountingSampler):
    """From its second batch on it goes on only when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = threading.Event()

    def sample(self, *, step: int, version: int, timer: StepTimer) -> ScoredBatch:
        if self.batches > 0:
            assert self.may_go_on.wait(10)
        return super().sample(step=step, version=version, timer=timer)


def test_a_step_trains_while_the_batch_of_a_later_one_is_sampled():
    sampler = HeldSampler()
    queue = BatchQueue(sampler, staleness=1, last_step=9, overlap=True)
    timer = StepTimer()
    assert number_and_version(queue.take(1, timer)) == (1, 0)
    assert sampler.batches == 1, "here the step trains, the second batch is not there yet"
    sampler.may_go_on.set()
    assert queue.finish(timer)["time/background_s"] > 0
    assert sampler.batches == 2
    assert number_and_version(queue.take(2, timer)) == (2, 0)


def test_a_batch_that_is_abandoned_is_sampled_again_by_later_weights():
    class ClosedEngine(HeldSampler):
        def sample(self, *, step: int, version: int, timer: StepTimer) -> ScoredBatch:
            batch = super().sample(step=step, version=version, timer=timer)
            if self.batches == 3:
                raise RolloutError("the engine was closed")
            return batch

    sampler = ClosedEngine()
    queue = BatchQueue(sampler, staleness=2, last_step=9, overlap=True)
    queue.take(1, StepTimer())
    assert queue.finish(StepTimer(), give_up=lambda: True) is None
    sampler.may_go_on.set()  # the second batch is done, the third fails
    queue.abandon()
    assert sampler.batches == 1 and queue.waiting == ()
    assert number_and_version(queue.take(2, StepTimer())) == (2, 1), "else it would be of version 0"


def test_an_error_in_the_background_is_raised_where_the_step_waits():
    class FailingSampler(CountingSampler):
        def sample(self, *, step: int, version: int, timer: StepTimer) -> ScoredBatch:
            if self.batches == 1:
                raise RolloutError("the engine died")
            return super().sample(step=step, version=version, timer=timer)

    queue = BatchQueue(FailingSampler(), staleness=1, last_step=9, overlap=True)
    queue.take(1, StepTimer())
    with pytest.raises(RolloutError, match="the engine died"):
        queue.finish(StepTimer())


def test_without_staleness_a_checkpoint_needs_no_file():
    queue = BatchQueue(CountingSampler(), staleness=0, last_step=9)
    queue.take(1, StepTimer())
    assert queue.files() == {}


def test_after_clear_the_next_step_samples_with_the_weights_of_now():
    sampler = CountingSampler()
    queue = BatchQueue(sampler, staleness=2, last_step=9)
    queue.take(1, StepTimer())
    queue.clear()
    assert number_and_version(queue.take(2, StepTimer())) == (4, 1)
    assert sampler.steps == [1, 2, 3, 2, 3, 4]
