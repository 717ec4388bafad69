"""Jobs for `run_distributed`: they run on every rank and return plain data."""

from pathlib import Path
from typing import Any

import torch

from megatron_cpgd.algorithm.objective import Objective
from megatron_cpgd.config.algorithm import AlgorithmConfig
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.policy.parallel import init_model_parallel
from megatron_cpgd.policy.policy import Policy
from megatron_cpgd.types import LossSequence
from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
from megatron_cpgd.weights.registry import weight_table
from megatron_cpgd.weights.tensor_file import TensorFile

OBJECTIVE = Objective(config=AlgorithmConfig.model_validate({"drift": {"coef": 0.1}}))


def build_policy(config: ExperimentConfig) -> Policy:
    info = init_model_parallel(config.parallel, seed=config.run.seed)
    with HfCheckpoint.open(config.model.path) as checkpoint:
        return Policy(config, info, checkpoint, weight_table(checkpoint.config))


def with_old_logprobs(
    sequences: list[LossSequence], logprobs: list[torch.Tensor]
) -> list[LossSequence]:
    """Old log-probs around the given ones, so that clip and drift both act."""
    generator = torch.Generator().manual_seed(3)
    for sequence, values in zip(sequences, logprobs, strict=True):
        noise = 0.3 * torch.randn(len(values), generator=generator)
        sequence.tensors |= {
            "old_logprobs": values + noise,
            "log_clip_low": torch.full((len(values),), -0.2),
            "log_clip_high": torch.full((len(values),), 0.2),
        }
    return sequences


def logprobs_job(config: ExperimentConfig, sequences: list[LossSequence]) -> list[torch.Tensor]:
    return build_policy(config).compute_logprobs(sequences)


def train_job(
    config: ExperimentConfig,
    sequences: list[LossSequence],
    weights: Path,
    steps: int = 3,
    objective: Objective = OBJECTIVE,
) -> dict[str, Any]:
    """Log-probs before, then `steps` Adam steps; the final HF tensors go to `weights`."""
    policy = build_policy(config)
    logprobs = policy.compute_logprobs(sequences)
    results = [policy.train_step(sequences, objective) for _ in range(steps)]
    write_weights(policy, weights)
    return {
        "logprobs": torch.cat(logprobs),
        "grad_norms": [result.grad_norm for result in results],
        "metrics": [result.metrics for result in results],
        "skipped": [result.skipped for result in results],
    }


def write_weights(policy: Policy, path: Path) -> None:
    """Full HF tensors of the policy, fp32, into one safetensors file."""
    shapes = policy._table.hf_shapes.items()
    if policy.info.rank == 0:
        TensorFile.create(path, {n: (torch.float32, s) for n, s in shapes}, {"format": "pt"})
    torch.distributed.barrier()
    file = TensorFile.open(path, writable=True)
    policy.write_weights(file.view)
    file.close()
