"""A refresh is complete or an error: what the engine read is compared with what was written."""

from pathlib import Path

import pytest
import torch

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.rollout.engine import RefreshReport
from megatron_cpgd.weight_sync.arena_weights import ArenaWeights
from megatron_cpgd.weight_sync.sync import sync_weights
from megatron_cpgd.weights.fingerprint import whole_fingerprint
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
                seconds=0.0,
                tensors=len(file.names),
                nbytes=file.nbytes,
                fingerprints=file.fingerprints(),
            )


class FakePolicy:
    """Its sums are those of its own weights, not of what it has written."""

    def write_engine_weights(self, view, format):
        weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.full((5,), 0.5).bfloat16()}
        for name, weight in weights.items():
            view(name).copy_(weight)
        return {name: whole_fingerprint(weight) for name, weight in weights.items()}

    def release(self) -> None:
        pass


def route(arena: TensorFile) -> ArenaWeights:
    return ArenaWeights(FakePolicy(), arena, "fp32")


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

    sync_weights(ArenaWeights(Policy(), arena, "fp32"), Engine(), version=1)
    assert events == [("released", [0.5] * 5), "refreshed"]


@pytest.mark.parametrize("name", SHAPES)
def test_one_number_that_changed_on_the_way_stops_the_run(arena, name):
    with pytest.raises(
        WeightSyncError, match=rf"version 3: .* from {arena.path}: {name}; in all 1 of 2 tensors"
    ):
        sync_weights(route(arena), FakeEngine(damage=name), version=3)


def test_a_rank_without_the_engine_only_writes(arena):
    assert sync_weights(route(arena), None, version=1) == {}
    assert arena.view("b").tolist() == [0.5] * 5
