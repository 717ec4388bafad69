"""Jobs for `run_distributed` about state that leaves the device between steps."""

from pathlib import Path
from typing import Any

import torch

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.policy import offload
from megatron_cpgd.types import LossSequence
from tests.helpers.plan_jobs import held_bytes
from tests.helpers.policy_jobs import OBJECTIVE, build_policy, write_weights


def away_between_steps_job(
    config: ExperimentConfig, sequences: list[LossSequence], weights: Path, folder: Path
) -> dict[str, Any]:
    """As `train_job`, but the state is away before, between and after the steps, once saved there.

    The host memory has pieces of 1000 bytes, so that tensors are cut and share pieces.
    """
    offload.PIECE_BYTES = 1000
    policy = build_policy(config)
    policy.release()
    policy.release()  # is away already
    policy.reload()
    logprobs = policy.compute_logprobs(sequences)
    grad_norms, held = [], []
    for step in range(3):
        grad_norms.append(policy.train_step(sequences, OBJECTIVE).grad_norm)
        here = held_bytes(policy)
        policy.release()
        held.append((here, held_bytes(policy)))
        if step == 1:
            policy.save(folder, {"step": 2})  # brings it back
            policy.release()
        policy.reload()
        assert held_bytes(policy) == here
    policy.release()
    write_weights(policy, weights)  # brings it back
    return {
        "logprobs": torch.cat(logprobs),
        "grad_norms": grad_norms,
        "held": held,
        "trained": torch.cat(policy.compute_logprobs(sequences)),
    }
