from pathlib import Path

import pytest

from megatron_cpgd.errors import RolloutError
from megatron_cpgd.rollout.engine import RefreshReport, Sampling
from megatron_cpgd.rollout.reused_engine import ReusedEngine
from megatron_cpgd.types import Rollout

ONE_TOKEN = Sampling(
    n=1, temperature=1.0, top_p=1.0, top_k=-1, max_tokens=1, stop_token_ids=[0], seed=0
)


class StrictEngine:
    """Keeps the contract of versions: they never fall, and only the one it holds may sample."""

    held = 0

    def generate(self, prompts, sampling, *, seeds=None, version):
        if version != self.held:
            raise RolloutError(f"holds {self.held}, asked for {version}")
        rollout = Rollout(
            token_ids=[0], logprobs=[0.0], finish_reason="stop", weight_version=version
        )
        return [[rollout] for _ in prompts]

    def refresh(self, arena, version):
        if version < self.held:
            raise RolloutError(f"holds {self.held}, refreshed to {version}")
        self.held = version
        return RefreshReport(seconds=0.0, tensors=0, nbytes=0, fingerprints={})

    def close(self):
        pass


def test_every_run_counts_its_versions_from_zero():
    engine = ReusedEngine(StrictEngine())
    for _ in range(3):
        engine.begin_run()
        for version in (0, 1, 2):
            engine.refresh(Path("arena"), version)
            [[rollout]] = engine.generate([[1]], ONE_TOKEN, version=version)
            assert rollout.weight_version == version


def test_within_a_run_versions_still_only_grow():
    engine = ReusedEngine(StrictEngine())
    engine.begin_run()
    engine.refresh(Path("arena"), 2)
    with pytest.raises(RolloutError, match="holds 2, refreshed to 1"):
        engine.refresh(Path("arena"), 1)


def test_weights_of_the_last_run_never_pass_for_those_of_this_one():
    engine = ReusedEngine(StrictEngine())
    engine.begin_run()
    engine.refresh(Path("arena"), 0)
    engine.begin_run()
    with pytest.raises(RolloutError, match="holds 0, asked for 1"):
        engine.generate([[1]], ONE_TOKEN, version=0)
