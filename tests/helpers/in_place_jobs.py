"""Jobs for `run_distributed` about weights that are read in place."""

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from msgspec.structs import replace
from torch import Tensor

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import ConfigError, WeightSyncError
from megatron_cpgd.policy.policy import Policy
from megatron_cpgd.rollout.assemble import AssembledWeights, TrainerMemory
from megatron_cpgd.rollout.vllm_engine import VllmEngine
from megatron_cpgd.types import LossSequence
from megatron_cpgd.weight_sync import in_place, shared_memory
from megatron_cpgd.weight_sync.arena import open_arena, remove_arena
from megatron_cpgd.weight_sync.arena_weights import ArenaWeights
from megatron_cpgd.weight_sync.in_place import InPlaceWeights
from megatron_cpgd.weight_sync.sync import sync_weights
from megatron_cpgd.weights.engine_format import engine_tensors
from megatron_cpgd.weights.fingerprint import Fingerprints
from megatron_cpgd.weights.pieces import Piece, PieceList
from tests.helpers.engines import PROMPTS, SAMPLING, start_engine
from tests.helpers.policy_jobs import OBJECTIVE, build_policy

CPU = torch.device("cpu")


def share(policy: Policy, config: ExperimentConfig) -> InPlaceWeights:
    format, beside = config.precision.engine_weights, policy.info.beside_rank_0
    return InPlaceWeights(policy, policy._table, format, beside_rank_0=beside)


def in_place_job(
    config: ExperimentConfig, sequences: list[LossSequence], folder: Path
) -> list[dict[str, Any]]:
    """Of rank 0, before and after an optimizer step: what an engine assembles, against the arena
    of the same weights."""
    policy = build_policy(config)
    shared = share(policy, config)
    with patch.object(shared_memory, "SHARED_MEMORY", folder):
        arena = open_arena(engine_tensors(policy._table, config.precision.engine_weights))
    memory = TrainerMemory(shared.path, CPU) if dist.get_rank() == 0 else None
    results = []
    for step in range(2):
        if step:
            assert policy.train_step(sequences, OBJECTIVE).skipped is None
        before = {name: arena.view(name).clone() for name in arena.names}
        dist.barrier()
        policy.write_engine_weights(arena.view, config.precision.engine_weights)
        sums = shared.fingerprints()
        if memory is not None:
            results.append(_compare(AssembledWeights(memory), arena, before, sums))
        dist.barrier()  # nobody trains while the engine reads
    remove_arena(arena)
    return results


def _compare(
    assembled: AssembledWeights, arena: Any, before: dict[str, Tensor], sums: Fingerprints
) -> dict[str, Any]:
    assert list(assembled.tensors.items()) == list(arena.tensors.items())
    assert assembled.nbytes == arena.nbytes
    read = {name: _bits(assembled.view(name)) for name in assembled.names}
    written = {name: _bits(arena.view(name)) for name in arena.names}
    return {
        "wrong": [name for name in read if not read[name].equal(written[name])],
        "unchanged": [name for name in read if written[name].equal(_bits(before[name]))],
        "sums": [sums, assembled.fingerprints()],
        "tensors": len(read),
    }


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def refused_job(config: ExperimentConfig, hosts: list[str], room: int = 2**40) -> str | None:
    """What the start says if ranks are on these hosts, and shared memory is so large."""
    os.environ["SLURMD_NODENAME"] = hosts[dist.get_rank()]
    policy = build_policy(config)
    try:
        with patch.object(in_place, "free_shared_bytes", return_value=room):
            share(policy, config)
    except ConfigError as error:
        return str(error)
    return None


def moved_weight_job(config: ExperimentConfig) -> tuple[Fingerprints, Fingerprints]:
    """Sums of trainer and engine when a weight has got another storage."""
    policy = build_policy(config)
    shared = share(policy, config)
    [parameter] = [p for n, p in policy._chunks[0].named_parameters() if "final_layernorm" in n]
    parameter.data = parameter.data.clone() + 1
    assembled = AssembledWeights(TrainerMemory(shared.path, CPU))
    for name in assembled.names:
        assembled.view(name)
    return shared.fingerprints(), assembled.fingerprints()


def engine_job(
    config: ExperimentConfig, sequences: list[LossSequence], folder: Path, **engine: Any
) -> dict[str, Any]:
    """Of rank 0: what real engines sample from the weights through an arena and in place, before
    and after an optimizer step, and why they refuse piece lists of other models."""
    policy = build_policy(config)
    shared = share(policy, config)
    with patch.object(shared_memory, "SHARED_MEMORY", folder):
        arena = open_arena(engine_tensors(policy._table, config.precision.engine_weights))
    through_arena = ArenaWeights(policy, arena, config.precision.engine_weights)
    versions = count(1)
    engines = start_engine(config.model.path, **engine) if dist.get_rank() == 0 else None

    def sampled(through: Any) -> list[Any] | None:
        version = next(versions)
        sync_weights(through, engines, version=version)
        if engines is None:
            return None
        groups = engines.generate(PROMPTS, SAMPLING, version=version)
        return [[(r.token_ids, r.logprobs) for r in group] for group in groups]

    try:
        results: dict[str, Any] = {
            "arena": [sampled(through_arena)], "in_place": [sampled(shared)]
        }  # fmt: skip
        if engines is not None:
            pieces = PieceList.decode(shared.path.read_bytes())
            results["refused"] = [
                _refusal(engines, folder, spoiled, next(versions)) for spoiled in _spoiled(pieces)
            ]
        results["healed"] = sampled(shared)
        assert policy.train_step(sequences, OBJECTIVE).skipped is None
        results["in_place"].append(sampled(shared))
        results["arena"].append(sampled(through_arena))
        dist.barrier()
        return results
    finally:
        if engines is not None:
            engines.close()
        remove_arena(arena)


def _spoiled(pieces: PieceList) -> Iterator[PieceList]:
    """Without a tensor; with a tensor that lacks a part; with other sizes; of a rank that is gone;
    of a rank whose memory has been replaced."""
    *tensors, last = pieces.tensors
    yield replace(pieces, tensors=tuple(tensors))
    yield replace(pieces, tensors=(*tensors, replace(last, pieces=last.pieces[1:])))
    small = Piece(((0, 1, 1), (0, 1, 1)), last.pieces[0].copies)
    yield replace(pieces, tensors=(*tensors, replace(last, shape=(1, 1), pieces=(small,))))
    for changes in ({"pid": 2**22 + 1}, {"inode": 1}):
        trainer = pieces.ranks[0]
        storages = tuple(replace(storage, **changes) for storage in trainer.storages)
        yield replace(pieces, ranks=pieces.ranks | {0: replace(trainer, storages=storages)})


def _refusal(engines: VllmEngine, folder: Path, pieces: PieceList, version: int) -> str:
    path = folder / "pieces"
    path.write_bytes(pieces.encode())
    with pytest.raises(WeightSyncError) as refused:
        engines.refresh(path, version)
    with pytest.raises(WeightSyncError, match="the last weight refresh failed"):
        engines.generate(PROMPTS, SAMPLING, version=version)
    return f"{refused.value}"
