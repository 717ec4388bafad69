"""Jobs for `run_distributed` about the reference policy."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from megatron_cpgd.algorithm.loss_sequences import build_loss_sequences, without_loss
from megatron_cpgd.algorithm.objective import build_objective
from megatron_cpgd.algorithm.reference_kl import reference_metrics
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.policy import reference
from megatron_cpgd.types import LossSequence, TrainSequence
from tests.helpers.policy_jobs import OBJECTIVE, build_policy, write_weights


def interleaved_job(
    config: ExperimentConfig, sequences: list[LossSequence], weights: Path, steps: int = 3
) -> dict[str, Any]:
    """As `train_job`, with a reference pass before, between and after the steps.

    The parameters are exchanged in pieces of 1000 bytes, so that most of them have several.
    """
    with patch.object(reference, "PIECE_BYTES", 1000):
        policy = build_policy(config)
        logprobs = policy.compute_logprobs(sequences)
        passes = [policy.compute_reference_logprobs(sequences)]
        for _ in range(steps):
            policy.train_step(sequences, OBJECTIVE)
            passes.append(policy.compute_reference_logprobs(sequences))
        write_weights(policy, weights)
        return {
            "logprobs": torch.cat(logprobs),
            "passes": [torch.cat(each) for each in passes],
            "trained": torch.cat(policy.compute_logprobs(sequences)),
        }


def broken_pass_job(config: ExperimentConfig, sequences: list[LossSequence]) -> dict[str, Any]:
    """A reference pass that raises in the model, which then holds the reference's weights."""
    policy = build_policy(config)
    [chunk] = policy._chunks
    weight = chunk.embedding.word_embeddings.weight
    seen, before = [], policy.compute_logprobs(sequences)

    def fail(*_: Any) -> None:
        seen.append(weight.detach().clone())
        raise RuntimeError("broken")

    own, hook = weight.detach().clone(), chunk.register_forward_pre_hook(fail)
    message = None
    try:
        policy.compute_reference_logprobs(sequences)
    except RuntimeError as error:
        message = str(error)
    hook.remove()
    return {
        "message": message,
        "holds_the_reference_inside": not torch.equal(seen[0], own),
        "before": torch.cat(before),
        "after": torch.cat(policy.compute_logprobs(sequences)),
        "reference": torch.cat(policy.compute_reference_logprobs(sequences)),
    }


def pull_job(
    config: ExperimentConfig, sequences: list[TrainSequence], steps: int
) -> list[dict[str, float]]:
    """The reference metrics before each of `steps` optimizer steps, and after the last."""
    policy, objective = build_policy(config), build_objective(config.algorithm)
    metrics = []
    for step in range(steps + 1):
        old = policy.compute_logprobs(without_loss(sequences))
        ref = policy.compute_reference_logprobs(without_loss(sequences))
        metrics.append(reference_metrics(torch.cat(old), torch.cat(ref)))
        for sequence, old_values, ref_values in zip(sequences, old, ref, strict=True):
            sequence.old_logprobs, sequence.ref_logprobs = old_values, ref_values
        if step < steps:
            policy.train_step(build_loss_sequences(sequences, config.algorithm), objective)
    return metrics
