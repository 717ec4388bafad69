"""Jobs for `run_distributed` about the model itself: logits, weights, log-prob function."""

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.policy.logprobs import vocab_parallel_logprobs
from tests.helpers.policy_jobs import build_policy, write_weights


def logits_job(config: ExperimentConfig, tokens: torch.Tensor) -> torch.Tensor:
    """[B, S, vocabulary] logits of Megatron's own output layer, on one rank."""
    policy = build_policy(config)
    [model] = policy._chunks
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    with torch.no_grad():
        logits = model(tokens, positions, None)
    return logits[..., : policy._schedule.logprobs.vocab_size].float()


def round_trip_job(config: ExperimentConfig, target: Path) -> None:
    """Load the Hugging Face model and write its tensors again."""
    write_weights(build_policy(config), target)


def save_weights_job(config: ExperimentConfig, folder: Path) -> None:
    build_policy(config).save(folder, {})


def load_weights_job(config: ExperimentConfig, folder: Path, target: Path) -> None:
    """Load a checkpoint into a model with other weights and write its tensors."""
    policy = build_policy(config)
    with torch.no_grad():
        for chunk in policy._chunks:
            for parameter in chunk.parameters():
                parameter.fill_(0.5)
    policy.load(folder)
    write_weights(policy, target)


def sharded_logprobs_job(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, ...]:
    """(log-probs, entropy, gradient) of logits whose columns are split evenly over the ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    width = -(-logits.size(1) // size)
    first = min(rank * width, logits.size(1))
    mine = logits[:, first : first + width].clone().requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(
        mine, targets, temperature=temperature, first=first, group=dist.group.WORLD
    )
    (2.0 * logprobs + 0.5 * entropy).sum().backward()
    assert mine.grad is not None
    return logprobs.detach(), entropy.detach(), mine.grad


def rng_job() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws of Megatron's model-parallel stream: first, after an excursion, and the default one."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megatron_cpgd.config.schema import ParallelConfig
    from megatron_cpgd.policy.parallel import init_model_parallel

    init_model_parallel(ParallelConfig(), seed=5)
    before = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        torch.rand(3)
    after = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        second = torch.rand(3)
    return before, after, second
