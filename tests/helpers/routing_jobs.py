"""Jobs for `run_distributed` about routing replay."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.policy.routing_replay import LayerReplay, RoutingReplay
from megatron_cpgd.policy.share import share_sequences
from megatron_cpgd.types import LossSequence, TrainSequence
from tests.helpers.policy_jobs import OBJECTIVE, build_policy, write_weights


def record_job(
    config: ExperimentConfig, sequences: list[LossSequence]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probs with free routing, and the routes."""
    logprobs, routes = build_policy(config).record_routes(sequences)
    return torch.cat(logprobs), routes


def own_routes_job(
    config: ExperimentConfig, sequences: list[LossSequence], weights: Path
) -> dict[str, Any]:
    """Log-probs and the weights after one step that replays what the routers have just chosen."""
    policy = build_policy(config)
    recorded, routes = policy.record_routes(sequences)
    routed = [replace(s, routes=own) for s, own in zip(sequences, routes, strict=True)]
    replayed = policy.compute_logprobs(routed)
    policy.train_step(routed, OBJECTIVE)
    write_weights(policy, weights)
    return {
        "recorded": torch.cat(recorded),
        "replayed": torch.cat(replayed),
        "weights": load_file(weights),
    }


def loop_job(
    config: ExperimentConfig, sequences: list[TrainSequence], weights: Path
) -> dict[str, Any]:
    """The loop's part between rollouts and weights; the weights go to a file.

    Returns the metrics, and whether each replaying pass had a backward pass.
    """
    from megatron_cpgd.train import _optimise, _set_old_logprobs, _set_ref_logprobs

    policy = build_policy(config)
    run: Any = SimpleNamespace(config=config, policy=policy, bad_steps=0)
    shared = share_sequences(sequences if policy.info.rank == 0 else None)
    passes: list[bool] = []
    replaying = RoutingReplay.replaying

    def note(routing: RoutingReplay, sequences: list[LossSequence], *, backward: bool) -> Any:
        passes.append(backward)
        return replaying(routing, sequences, backward=backward)

    with patch.object(RoutingReplay, "replaying", note):
        metrics = _set_old_logprobs(run, shared, step=1) | _set_ref_logprobs(run, shared)
        metrics |= _optimise(run, shared, step=1)
    write_weights(policy, weights)
    return {"metrics": metrics, "passes": passes}


def passes_job(config: ExperimentConfig, sequences: list[LossSequence]) -> dict[str, Any]:
    """What passes over sequences with routes do."""
    policy = build_policy(config)
    free = [replace(sequence, routes=None) for sequence in sequences]
    nowhere = [replace(s, routes=torch.full_like(s.routes, -1)) for s in sequences]
    result = {
        "free": torch.cat(policy.compute_logprobs(free)),
        "nowhere": torch.cat(policy.compute_logprobs(nowhere)),
        "disagreement_nowhere": policy.routing_disagreement(),
        "replayed": torch.cat(policy.compute_logprobs(sequences)),
        "disagreement": policy.routing_disagreement(),
        "reference": torch.cat(policy.compute_reference_logprobs(sequences)),
    }
    uses: list[tuple[int, int]] = []
    finish = LayerReplay.finish

    def note(replay: LayerReplay) -> None:
        uses.append((replay.forwards, replay.recomputed))
        finish(replay)

    with patch.object(LayerReplay, "finish", note):
        policy.train_step(sequences, OBJECTIVE)
    return result | {"uses": uses}
