"""Jobs for `run_distributed` about weights that are read in place."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.policy.policy import Policy
from megatron_cpgd.rollout.assemble import AssembledWeights, TrainerMemory
from megatron_cpgd.types import LossSequence
from megatron_cpgd.weight_sync import in_place, shared_memory
from megatron_cpgd.weight_sync.arena import open_arena, remove_arena
from megatron_cpgd.weight_sync.in_place import SharedWeights
from tests.helpers.policy_jobs import OBJECTIVE, build_policy

CPU = torch.device("cpu")


def share(policy: Policy, config: ExperimentConfig) -> SharedWeights:
    format, beside = config.precision.engine_weights, policy.info.beside_rank_0
    return SharedWeights(policy, policy._table, format, beside_rank_0=beside)


def in_place_job(
    config: ExperimentConfig, sequences: list[LossSequence], folder: Path
) -> list[dict[str, Any]]:
    """Of rank 0, before and after an optimizer step: what an engine assembles, against the arena
    of the same weights."""
    policy = build_policy(config)
    shared = share(policy, config)
    with patch.object(shared_memory, "SHARED_MEMORY", folder):
        arena = open_arena(policy._table, config.precision.engine_weights)
    memory = TrainerMemory(shared.path, CPU) if dist.get_rank() == 0 else None
    results = []
    for step in range(2):
        if step:
            assert policy.train_step(sequences, OBJECTIVE).skipped is None
        before = {name: arena.file.view(name).clone() for name in arena.file.names}
        dist.barrier()
        policy.write_weights(arena.view)
        arena.complete()
        digest = shared.digest()
        if memory is not None:
            results.append(_compare(AssembledWeights(memory), arena.file, before, digest))
        dist.barrier()  # nobody trains while the engine reads
    remove_arena(arena)
    return results


def _compare(
    assembled: AssembledWeights, arena: Any, before: dict[str, Tensor], digest: str
) -> dict[str, Any]:
    assert list(assembled.tensors.items()) == list(arena.tensors.items())
    assert assembled.nbytes == arena.nbytes
    read = {name: _bits(assembled.view(name)) for name in assembled.names}
    written = {name: _bits(arena.view(name)) for name in arena.names}
    return {
        "wrong": [name for name in read if not read[name].equal(written[name])],
        "unchanged": [name for name in read if written[name].equal(_bits(before[name]))],
        "digests": {digest, assembled.digest()},
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


def moved_weight_job(config: ExperimentConfig) -> tuple[str, str]:
    """Digests of trainer and engine when a weight has got another storage."""
    policy = build_policy(config)
    shared = share(policy, config)
    [parameter] = [p for n, p in policy._chunks[0].named_parameters() if "final_layernorm" in n]
    parameter.data = parameter.data.clone() + 1
    assembled = AssembledWeights(TrainerMemory(shared.path, CPU))
    for name in assembled.names:
        assembled.view(name)
    return shared.digest(), assembled.digest()
