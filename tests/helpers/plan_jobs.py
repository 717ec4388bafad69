"""What a rank of a real Megatron policy holds, counted by the storages of its tensors."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.policy.memory import PeakMemory
from megatron_cpgd.policy.parallel import init_model_parallel
from megatron_cpgd.policy.policy import Policy
from megatron_cpgd.types import LossSequence
from megatron_cpgd.weight_sync.arena import open_arena, remove_arena
from megatron_cpgd.weights.engine_format import engine_tensors
from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
from megatron_cpgd.weights.registry import weight_table
from tests.helpers.policy_jobs import OBJECTIVE, build_policy, with_old_logprobs
from tests.helpers.tiny import tiny_sequences


@dataclass(frozen=True, kw_only=True)
class HeldBytes:
    """Of one rank, after its first optimizer step."""

    weights: int
    gradients: int
    optimizer: int


def held_bytes_job(config: ExperimentConfig) -> HeldBytes:
    policy = build_policy(config)
    sequences = tiny_sequences()
    with_old_logprobs(sequences, policy.compute_logprobs(sequences))
    policy.train_step(sequences, OBJECTIVE)
    return held_bytes(policy)


def held_bytes(policy: Policy) -> HeldBytes:
    """Of a policy that has made a step."""
    weights = _storages(_weights(policy))
    gradients = _storages(
        buffer.grad_data
        for model in policy._models
        for buffer in [*model.buffers, *model.expert_parallel_buffers]
    )
    optimizer = _storages(_optimizer_tensors(policy))
    return HeldBytes(
        weights=sum(weights.values()),
        gradients=sum(gradients.values()),
        optimizer=sum(size for key, size in optimizer.items() if key not in weights),
    )


def saved_bytes_job(config: ExperimentConfig) -> int:
    """Bytes that autograd keeps of one micro-batch of 4 * 128 tokens, weights aside."""
    policy = build_policy(config)
    generator = torch.Generator().manual_seed(5)
    sequences = [
        LossSequence(
            input_ids=torch.randint(100, (128,), generator=generator),
            prompt_length=1,
            tensors={"advantages": torch.ones(127), "coefficients": torch.full((127,), 0.01)},
        )
        for _ in range(4)
    ]
    with_old_logprobs(sequences, [torch.zeros(127)] * 4)
    weights = _storages(_weights(policy))
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            saved.setdefault(address, tensor)  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.train_step(sequences, OBJECTIVE)
    return sum(_storages(saved.values()).values())


def resident_bytes_job(config: ExperimentConfig, sequences: list[LossSequence]) -> float:
    """`perf/memory_peak_gib` after loading, filling the arena, and three steps."""
    memory = PeakMemory()
    info = init_model_parallel(config.parallel, seed=0)
    with HfCheckpoint.open(config.model.path) as checkpoint:
        table = weight_table(checkpoint.config)
        policy = Policy(config, info, checkpoint, table)
        format = config.precision.engine_weights
        arena = open_arena(engine_tensors(table, format))
        assert arena is not None
        try:
            policy.write_engine_weights(arena.view, format)
            with_old_logprobs(sequences, policy.compute_logprobs(sequences))
            for _ in range(3):
                policy.train_step(sequences, OBJECTIVE)
            return memory.gib()
        finally:
            remove_arena(arena)


def _weights(policy: Policy) -> list[Tensor]:
    """Parameters, and what a router has beside its weight."""
    return [
        tensor
        for chunk in policy._chunks
        for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]
        if isinstance(tensor, torch.nn.Parameter) or name.endswith("expert_bias")
    ]


def _optimizer_tensors(policy: Policy) -> Iterable[Tensor]:
    """Main parameters and Adam's moments."""
    optimizer: Any = policy._optimizer
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (state["exp_avg"], state["exp_avg_sq"])


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address, each storage once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
