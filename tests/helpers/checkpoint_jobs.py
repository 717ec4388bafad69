"""Jobs for `run_distributed` about checkpoints and damaged steps."""

from pathlib import Path
from typing import Any

import torch

from megatron_cpgd.algorithm.objective import CpgdObjective
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.types import LossSequence
from tests.helpers.policy_jobs import OBJECTIVE, build_policy, write_weights


def save_job(config: ExperimentConfig, sequences: list[LossSequence], folder: Path) -> torch.Tensor:
    """Two steps, a checkpoint, one more step; returns the log-probs after the third."""
    policy = build_policy(config)
    for _ in range(2):
        policy.train_step(sequences, OBJECTIVE)
    policy.save(folder, {"step": 2})
    policy.train_step(sequences, OBJECTIVE)
    return torch.cat(policy.compute_logprobs(sequences))


def continue_job(
    config: ExperimentConfig, sequences: list[LossSequence], folder: Path
) -> dict[str, Any]:
    """Load the checkpoint and take the third step."""
    policy = build_policy(config)
    state = policy.load(folder)
    policy.train_step(sequences, OBJECTIVE)
    return {
        "state": state,
        "optimizer_steps": policy.optimizer_steps,
        "logprobs": torch.cat(policy.compute_logprobs(sequences)),
    }


class _BrokenObjective(CpgdObjective):
    def loss(self, logprobs: torch.Tensor, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().loss(logprobs, tokens) * torch.nan


def broken_step_job(
    config: ExperimentConfig, sequences: list[LossSequence], before: Path, after: Path
) -> list[str | None]:
    """A step with a gradient of NaN between two good ones; weights around the broken one."""
    policy = build_policy(config)
    broken = _BrokenObjective(drift_coef=0.1, drift_clip=2.0)
    skipped = [policy.train_step(sequences, OBJECTIVE).skipped]
    write_weights(policy, before)
    skipped.append(policy.train_step(sequences, broken).skipped)
    write_weights(policy, after)
    skipped.append(policy.train_step(sequences, OBJECTIVE).skipped)
    return skipped
