"""Jobs for `run_distributed` about routing replay."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.policy.routing_replay import LayerReplay
from megatron_cpgd.types import LossSequence
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
