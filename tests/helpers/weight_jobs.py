"""Jobs for `run_distributed` about what ranks exchange: rollouts and exported weights."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import ConversionError
from megatron_cpgd.policy import host_memory, shards, share
from megatron_cpgd.types import TrainSequence
from megatron_cpgd.weight_sync import shared_memory
from megatron_cpgd.weight_sync.arena import open_arena, remove_arena
from megatron_cpgd.weights import bucket_stream, buckets
from megatron_cpgd.weights.engine_format import engine_tensors
from megatron_cpgd.weights.fingerprint import Fingerprints
from megatron_cpgd.weights.table import WeightTable, rename
from tests.helpers.policy_jobs import build_policy


def share_job(sequences: list[TrainSequence], hosts: list[str]) -> list[TrainSequence]:
    with patch.object(
        host_memory, "PIECE_BYTES", 24
    ):  # less than a batch, and than most parts of it
        return share.share_sequences(sequences if dist.get_rank() == 0 else None, hosts)


def written_routes_job(sequences: list[TrainSequence], hosts: list[str]) -> int:
    """The first route after the first rank of each host has put its number there."""
    received = share_job(sequences, hosts)
    routes, rank = received[0].rollout_routes, dist.get_rank()
    if hosts.index(hosts[rank]) == rank:
        routes[0, 0, 0] = 100 + rank
    dist.barrier()
    return int(routes[0, 0, 0])


def written_job(config: ExperimentConfig) -> dict[str, Tensor]:
    """Which elements of the full HF tensors this rank writes, bool by name."""
    policy = build_policy(config)
    tensors = {name: torch.full(s, torch.nan) for name, s in policy._table.hf_shapes.items()}
    policy.write_weights(tensors.__getitem__)
    return {name: ~tensor.isnan() for name, tensor in tensors.items()}


def delivered_job(
    config: ExperimentConfig, hosts: list[str], bucket_bytes: int
) -> tuple[dict[str, Tensor], int]:
    """What this rank writes if ranks are on these hosts, nan elsewhere; buckets that it sends."""
    os.environ["SLURMD_NODENAME"] = hosts[dist.get_rank()]
    policy = build_policy(config)
    tensors = {name: torch.full(s, torch.nan) for name, s in policy._table.hf_shapes.items()}
    view = tensors.__getitem__ if policy.info.beside_rank_0 else None
    sent = []

    def send(channels: list[Any], made: Iterable[list[buckets.Piece]]) -> None:
        sent.extend(made)
        bucket_stream.send_buckets(channels, sent)

    with (
        patch.object(buckets, "BUCKET_BYTES", bucket_bytes),
        patch.object(shards, "send_buckets", send),
    ):
        policy.write_weights(view)
    assert all(sum(v.nbytes for _, _, v in bucket) <= bucket_bytes for bucket in sent)
    return tensors, len(sent)


def incomplete_export_job(config: ExperimentConfig, lost: str) -> str | None:
    """What the export says when the model lacks a parameter; None if it says nothing."""
    policy = build_policy(config)
    tensors = {name: torch.zeros(s) for name, s in policy._table.hf_shapes.items()}
    complete = shards.iter_weights

    def without_one(*args: Any) -> list:
        return [(name, x) for name, x in complete(*args) if name != lost]

    with patch.object(shards, "iter_weights", without_one):
        try:
            policy.write_weights(tensors.__getitem__)
        except ConversionError as error:
            return str(error)
    return None


def arena_job(folder: Path) -> dict[str, Any]:
    """Open an arena in `folder`, write this rank's row, read all, leave."""
    rank = dist.get_rank()
    entry = rename(("megatron",), "hf", (2,))
    with patch.object(shared_memory, "SHARED_MEMORY", folder):
        arena = open_arena(WeightTable((entry,)).hf_tensors(torch.bfloat16))
        arena.view("hf")[rank] = rank + 1
        dist.barrier()
        values, mode = arena.view("hf"), arena.path.stat().st_mode & 0o777
        if rank == 1:
            remove_arena(arena)
        dist.barrier()
        after = arena.path.exists()
        dist.barrier()
        if rank == 0:
            remove_arena(arena)
    return {
        "values": values.tolist(),
        "dtype": str(values.dtype).removeprefix("torch."),
        "path": str(arena.path),
        "mode": mode,
        "after_rank_1_left": after,
    }


def quantized_arena_job(
    config: ExperimentConfig, folder: Path, hosts: str
) -> tuple[Fingerprints, Fingerprints | None, list[str]]:
    """Sums of what the ranks sent and of what the engine would read, and the files left when all
    ranks have gone, if they are on these hosts."""
    os.environ["SLURMD_NODENAME"] = hosts[dist.get_rank()]
    policy = build_policy(config)
    with patch.object(shared_memory, "SHARED_MEMORY", folder):
        tensors = engine_tensors(policy._table, "fp8_block")
        arena = open_arena(tensors, beside_rank_0=policy.info.beside_rank_0)
        sent = policy.write_engine_weights(arena.view if arena else None, "fp8_block")
        read = arena.fingerprints() if arena else None
        dist.barrier()
        if arena:
            remove_arena(arena)
        dist.barrier()
        return sent, read, [path.name for path in folder.iterdir()]
