"""What a rank of a real Megatron policy holds, counted by the storages of its tensors."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.policy.policy import Policy
from tests.helpers.policy_jobs import OBJECTIVE, build_policy, with_old_logprobs
from tests.helpers.tiny import tiny_sequences


@dataclass(frozen=True, kw_only=True)
class HeldBytes:
    """Of one rank, after its first optimizer step."""

    weights: int
    gradients: int
    optimizer: int
    saved: int
    """Largest sum of the storages that autograd kept for the backward passes, weights aside."""


def held_bytes_job(config: ExperimentConfig) -> HeldBytes:
    policy = build_policy(config)
    sequences = tiny_sequences()
    with_old_logprobs(sequences, policy.compute_logprobs(sequences))
    policy.train_step(sequences, OBJECTIVE)
    weights = {
        **_storages(x for chunk in policy._chunks for x in chunk.parameters()),
        **_storages(_expert_biases(policy)),
    }
    gradients = _storages(buffer.grad_data for buffer in _buffers(policy))
    optimizer = _storages(_optimizer_tensors(policy))
    for key in weights.keys() | gradients.keys():
        optimizer.pop(key, None)
    return HeldBytes(
        weights=sum(weights.values()),
        gradients=sum(gradients.values()),
        optimizer=sum(optimizer.values()),
        saved=0,
    )


def _buffers(policy: Policy) -> list[Any]:
    return [
        buffer for model in policy._models for buffer in [*model.buffers, *model.expert_parallel_buffers]
    ]


def _expert_biases(policy: Policy) -> list[Tensor]:
    return [
        buffer
        for chunk in policy._chunks
        for name, buffer in chunk.named_buffers()
        if name.endswith("expert_bias")
    ]


def _optimizer_tensors(policy: Policy) -> Iterable[Tensor]:
    """Main parameters and Adam's moments."""
    for part in getattr(policy._optimizer, "chained_optimizers", [policy._optimizer]):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (state[name] for name in ("exp_avg", "exp_avg_sq"))


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address, each storage once."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found
