"""How engines share the work; with real engines: tests/e2e/test_vllm_engine.py."""

import threading
from pathlib import Path

import pytest

from megatron_cpgd.errors import RolloutError, WeightSyncError
from megatron_cpgd.rollout.engine import RefreshReport, Sampling, stream_seeds
from megatron_cpgd.rollout.engine_group import EngineGroup
from megatron_cpgd.types import Rollout

SAMPLING = Sampling(n=2, max_tokens=1, seed=100)


class EchoEngine:
    """Answers with the prompt's first token and the seed; keeps what it was asked."""

    def __init__(self, fingerprint: int = 1) -> None:
        self.prompts: list[list[int]] = []
        self.asleep = self.closed = False
        self._fingerprint = fingerprint

    def generate(self, prompts, sampling, *, seeds=None, version):
        self.prompts += prompts
        first = stream_seeds(sampling, len(prompts), seeds)
        return [
            [
                Rollout(
                    token_ids=[prompt[0], seed + i], logprobs=[0.0, 0.0], finish_reason="length",
                    weight_version=version,
                )
                for i in range(sampling.n)
            ]
            for prompt, seed in zip(prompts, first, strict=True)
        ]  # fmt: skip

    def refresh(self, arena, version):
        read = {"a": 1, "b": self._fingerprint}
        return RefreshReport(seconds=1.0, tensors=2, nbytes=1, fingerprints=read)

    def sleep(self):
        self.asleep = True

    def close(self):
        self.closed = True


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_engines_gives_the_responses_of_one_in_the_order_of_the_prompts(count):
    prompts = [[i] for i in range(5)]
    alone = EchoEngine().generate(prompts, SAMPLING, version=3)
    engines = [EchoEngine() for _ in range(count)]
    assert EngineGroup(engines).generate(prompts, SAMPLING, version=3) == alone
    shares = [len(engine.prompts) for engine in engines]
    assert sum(shares) == 5 and max(shares) - min(shares) <= 1


def test_seeds_of_the_caller_go_with_their_prompts():
    groups = EngineGroup([EchoEngine(), EchoEngine()]).generate(
        [[0], [1], [2]], SAMPLING, seeds=[7, 50, 90], version=0
    )
    assert [[r.token_ids for r in group] for group in groups] == [
        [[0, 7], [0, 8]], [[1, 50], [1, 51]], [[2, 90], [2, 91]],
    ]  # fmt: skip


def test_the_engines_generate_at_the_same_time():
    meeting = threading.Barrier(2, timeout=10)

    class MeetingEngine(EchoEngine):
        def generate(self, prompts, sampling, *, seeds=None, version):
            meeting.wait()
            return super().generate(prompts, sampling, seeds=seeds, version=version)

    group = EngineGroup([MeetingEngine(), MeetingEngine()])
    assert len(group.generate([[0], [1]], SAMPLING, version=0)) == 2


def test_an_engine_that_fails_is_reported_before_the_others_are_done():
    release = threading.Event()

    class SlowEngine(EchoEngine):
        def generate(self, prompts, sampling, *, seeds=None, version):
            assert release.wait(10)
            return super().generate(prompts, sampling, seeds=seeds, version=version)

    class DeadEngine(EchoEngine):
        def generate(self, prompts, sampling, *, seeds=None, version):
            raise RolloutError("engine 1 died")

    group = EngineGroup([SlowEngine(), DeadEngine()])
    with pytest.raises(RolloutError, match="engine 1 died"):
        group.generate([[0], [1]], SAMPLING, version=0)
    release.set()
    group.close()


def test_engines_that_read_different_weights_are_an_error():
    group = EngineGroup([EchoEngine(), EchoEngine(2)])
    with pytest.raises(
        WeightSyncError,
        match="version 4: engine 0 and engine 1 have read different values from arena: b; in all 1",
    ):
        group.refresh(Path("arena"), 4)


def test_close_ends_every_engine():
    engines = [EchoEngine(), EchoEngine()]
    EngineGroup(engines).close()
    assert all(engine.closed for engine in engines)


def test_all_engines_go_to_sleep():
    engines = [EchoEngine() for _ in range(3)]
    EngineGroup(engines).sleep()
    assert all(engine.asleep for engine in engines)
