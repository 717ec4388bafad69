"""Jobs for `run_distributed` about what ranks exchange: rollouts and exported weights."""

from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import ConversionError
from megatron_cpgd.policy import shards
from megatron_cpgd.policy.share import share_sequences
from megatron_cpgd.types import TrainSequence
from tests.helpers.policy_jobs import build_policy


def share_job(sequences: list[TrainSequence]) -> list[TrainSequence]:
    return share_sequences(sequences if dist.get_rank() == 0 else None)


def written_job(config: ExperimentConfig) -> dict[str, Tensor]:
    """Which elements of the full HF tensors this rank writes, bool by name."""
    policy = build_policy(config)
    tensors = {name: torch.full(s, torch.nan) for name, s in policy._table.hf_shapes.items()}
    policy.write_weights(tensors.__getitem__)
    return {name: ~tensor.isnan() for name, tensor in tensors.items()}


def incomplete_export_job(config: ExperimentConfig, lost: str) -> str | None:
    """What the export says when the model lacks a parameter; None if it says nothing."""
    policy = build_policy(config)
    tensors = {name: torch.zeros(s) for name, s in policy._table.hf_shapes.items()}
    complete = shards.iter_parameters

    def without_one(chunks: list) -> list:
        return [(name, x) for name, x in complete(chunks) if name != lost]

    with patch.object(shards, "iter_parameters", without_one):
        try:
            policy.write_weights(tensors.__getitem__)
        except ConversionError as error:
            return str(error)
    return None
