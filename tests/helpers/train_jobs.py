"""Jobs for `run_distributed` about the loop's part between rollouts and weights."""

from types import SimpleNamespace
from typing import Any

import torch

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.policy.policy import Policy
from megatron_cpgd.types import TrainSequence
from tests.helpers.policy_jobs import build_policy


def train_batches_job(
    config: ExperimentConfig, batches: list[list[TrainSequence]]
) -> list[dict[str, Any]]:
    """Train on one rollout batch after the other; metrics and this rank's state after each."""
    from megatron_cpgd.train import _optimise, _set_old_logprobs, _set_ref_logprobs

    policy = build_policy(config)
    run: Any = SimpleNamespace(config=config, policy=policy, bad_steps=0)
    results = []
    for step, sequences in enumerate(batches, 1):
        metrics = _set_old_logprobs(run, sequences, step) | _set_ref_logprobs(run, sequences)
        metrics |= _optimise(run, sequences, step)
        results.append(
            {"metrics": metrics, "clock": policy.optimizer_steps, "state": _state(policy)}
        )
    return results


def _state(policy: Policy) -> list[torch.Tensor]:
    """Copies of this rank's weights and of all that Adam remembers."""
    weights = [parameter for chunk in policy._chunks for parameter in chunk.parameters()]
    adam = [
        value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for part in policy._optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for value in state.values()
    ]
    return [tensor.detach().clone() for tensor in (*weights, *adam)]
