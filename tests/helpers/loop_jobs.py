"""Jobs for `run_distributed` that run parts of the training loop."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_cpgd.algorithm.loss_sequences import without_loss
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.train import _optimise
from megatron_cpgd.types import TrainSequence
from tests.helpers.policy_jobs import build_policy, write_weights


def optimise_job(
    config: ExperimentConfig, sequences: list[TrainSequence], weights: Path
) -> dict[str, Any]:
    """All optimizer steps on one rollout batch; the final HF tensors go to `weights`."""
    policy = build_policy(config)
    old_logprobs = policy.compute_logprobs(without_loss(sequences))
    for sequence, values in zip(sequences, old_logprobs, strict=True):
        sequence.old_logprobs = values
    run: Any = SimpleNamespace(config=config, policy=policy, bad_steps=0)
    metrics = _optimise(run, sequences, step=1)
    write_weights(policy, weights)
    return metrics
