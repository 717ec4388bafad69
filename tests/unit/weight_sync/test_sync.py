"""A refresh is complete or an error: what the engine read is compared with what was written."""

from pathlib import Path

import pytest
import torch

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.rollout.engine import RefreshReport
from megatron_cpgd.weight_sync.arena import Arena
from megatron_cpgd.weight_sync.arena_weights import ArenaWeights
from megatron_cpgd.weight_sync.sync import sync_weights
from megatron_cpgd.weights.tensor_file import TensorFile

SHAPES = {"a": (torch.float32, (2, 3)), "b": (torch.bfloat16, (5,))}


class FakeEngine:
    """Reads an arena as an engine does; `damage` first writes into it."""

    def __init__(self, damage: str | None = None) -> None:
        self.damage = damage
        self.version: int | None = None
        self.tensors: dict[str, torch.Tensor] = {}

    def refresh(self, arena: Path, version: int) -> RefreshReport:
        with TensorFile.open(arena, writable=True) as file:
            if self.damage:
                file.view(self.damage)[0] += 1
            self.tensors = {name: file.view(name).clone() for name in file.names}
            self.version = version
            return RefreshReport(
                seconds=0.0, tensors=len(file.names), nbytes=file.nbytes, digest=file.digest()
            )


class FakePolicy:
    def write_weights(self, view) -> None:
        view("a").copy_(torch.arange(6.0).view(2, 3))
        view("b").fill_(0.5)

    def release(self) -> None:
        pass


def route(arena: TensorFile) -> ArenaWeights:
    return ArenaWeights(FakePolicy(), Arena(arena))


@pytest.fixture
def arena(tmp_path):
    with TensorFile.create(tmp_path / "arena.safetensors", SHAPES, {}) as file:
        yield file


def test_the_engine_gets_what_the_policy_wrote_and_its_version(arena):
    engine = FakeEngine()
    metrics = sync_weights(route(arena), engine, version=7)
    assert engine.version == 7
    assert engine.tensors["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert engine.tensors["b"].tolist() == [0.5] * 5
    # 6 floats of 4 bytes and 5 of 2.
    assert metrics == {"weights/version": 7, "weights/digest": arena.digest(), "weights/bytes": 34}


def test_the_policy_has_written_and_left_the_gpus_before_the_engine_wakes(arena):
    events = []

    class Policy(FakePolicy):
        def release(self) -> None:
            events.append(("released", arena.view("b").tolist()))

    class Engine(FakeEngine):
        def refresh(self, arena: Path, version: int) -> RefreshReport:
            events.append("refreshed")
            return super().refresh(arena, version)

    sync_weights(ArenaWeights(Policy(), Arena(arena)), Engine(), version=1)
    assert events == [("released", [0.5] * 5), "refreshed"]


@pytest.mark.parametrize("name", SHAPES)
def test_one_number_that_changed_on_the_way_stops_the_run(arena, name):
    with pytest.raises(
        WeightSyncError, match=r"version 3: the policy wrote \w{8}, the engine read"
    ):
        sync_weights(route(arena), FakeEngine(damage=name), version=3)


def test_a_rank_without_the_engine_only_writes(arena):
    assert sync_weights(route(arena), None, version=1) == {}
    assert arena.view("b").tolist() == [0.5] * 5
