"""Jobs for `run_distributed` about the model itself: logits, weights, log-prob function."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import ConversionError
from megatron_cpgd.policy.logprobs import LogprobSettings, linear_logprobs
from megatron_cpgd.run import export, save
from megatron_cpgd.tracking.run_folder import RunFolder
from megatron_cpgd.types import LossSequence
from tests.helpers.policy_jobs import OBJECTIVE, build_policy, write_weights


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


def held_experts_job(config: ExperimentConfig) -> int:
    """Elements of the experts that this rank holds."""
    [model] = build_policy(config)._chunks
    return sum(x.numel() for name, x in model.named_parameters() if ".experts." in name)


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


def convert_job(source: Path, folder: Path) -> None:
    """`source` as a bf16 Megatron checkpoint, and that alone as a Hugging Face folder again."""
    from megatron_cpgd.policy.convert import hf_to_megatron, megatron_to_hf

    dist.destroy_process_group()  # the converters make a world of their own
    hf_to_megatron(source, folder / "megatron", dtype="bf16")
    source.rename(folder / "away")
    megatron_to_hf(folder / "megatron", folder / "back", max_shard_bytes=10**9)


def convert_back_job(checkpoint: Path, target: Path) -> str | None:
    """A checkpoint as a Hugging Face folder; the message if it is refused."""
    from megatron_cpgd.policy.convert import megatron_to_hf

    dist.destroy_process_group()
    try:
        megatron_to_hf(checkpoint, target, max_shard_bytes=10**9)
    except ConversionError as error:
        return str(error)
    return None


def export_job(config: ExperimentConfig, sequences: list[LossSequence], folder: Path) -> None:
    """One step, a checkpoint and an export, as a run in `folder` makes them for step 1."""
    policy = build_policy(config)
    policy.train_step(sequences, OBJECTIVE)
    run: Any = SimpleNamespace(
        config=config, policy=policy, table=policy._table, folder=RunFolder(folder),
        prompts=None, bad_steps=0, roll_backs=0,
    )  # fmt: skip
    save(run, 1)
    export(run, 1)


def sharded_logprobs_job(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    upstream: torch.Tensor,
    settings: LogprobSettings,
    backwards: int = 1,
) -> tuple[torch.Tensor, ...]:
    """(log-probs, entropy, gradients of hidden and of weight), the rows of weight split evenly.

    A shard is filled up with padding rows of large logits, as many as the others have rows.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    width = -(-len(weight) // size)
    mine = weight[rank * width : (rank + 1) * width]
    padded = torch.full((width, weight.size(1)), 9.0, dtype=weight.dtype)
    padded[: len(mine)] = mine
    hidden, padded = hidden.clone().requires_grad_(), padded.requires_grad_()
    logprobs, entropy = linear_logprobs(hidden, padded, targets, settings, dist.group.WORLD)
    for _ in range(backwards):
        hidden.grad = padded.grad = None
        (upstream * logprobs).sum().backward(retain_graph=True)
    assert hidden.grad is not None and padded.grad is not None and not entropy.requires_grad
    assert not padded.grad[len(mine) :].any()
    dist.all_reduce(hidden.grad)
    return logprobs.detach(), entropy, hidden.grad, padded.grad[: len(mine)]


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
