"""Jobs for `run_distributed` about routing replay."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.policy.policy import Policy
from megatron_cpgd.policy.routing_replay import LayerReplay, RouteAgreement, RoutingReplay
from megatron_cpgd.policy.share import share_sequences
from megatron_cpgd.types import LossSequence, TrainSequence
from tests.helpers.policy_jobs import OBJECTIVE, build_policy, write_weights


def rollouts_of(
    sequences: Sequence[LossSequence], routes: Sequence[torch.Tensor | None]
) -> list[TrainSequence]:
    """The same tokens as an engine might have sampled them, three to a prompt, with its routes."""
    return [
        TrainSequence(
            group=i // 3,
            prompt_ids=each.input_ids[: each.prompt_length],
            response_ids=each.input_ids[each.prompt_length :],
            rollout_logprobs=torch.full((each.response_length,), -4.0),
            advantage=(-1.0) ** i,
            truncated=False,
            rollout_routes=own,
        )
        for i, (each, own) in enumerate(zip(sequences, routes, strict=True))
    ]


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
    from megatron_cpgd.train import (
        _measure_routing,
        _optimise,
        _set_old_logprobs,
        _set_ref_logprobs,
    )

    policy = build_policy(config)
    run: Any = SimpleNamespace(config=config, policy=policy, bad_steps=0)
    shared = share_sequences(sequences if policy.info.rank == 0 else None, policy.info.hosts)
    passes: list[bool] = []
    replaying, forward_logprobs = RoutingReplay.replaying, Policy._forward_logprobs
    without_gradient = 0

    def note(routing: RoutingReplay, sequences: list[LossSequence], *, backward: bool) -> Any:
        passes.append(backward)
        return replaying(routing, sequences, backward=backward)

    def count(*args: Any) -> list[torch.Tensor]:
        nonlocal without_gradient
        without_gradient += 1
        return forward_logprobs(*args)

    with (
        patch.object(RoutingReplay, "replaying", note),
        patch.object(Policy, "_forward_logprobs", count),
    ):
        metrics = _set_old_logprobs(run, shared, step=1)
        if config.measures_routing(step=1):
            metrics |= _measure_routing(run, shared)
        if config.reference_path is not None:
            metrics |= _set_ref_logprobs(run, shared)
        metrics |= _optimise(run, shared, step=1)
    write_weights(policy, weights)
    return {"metrics": metrics, "passes": passes, "without_gradient": without_gradient}


def passes_job(config: ExperimentConfig, sequences: list[LossSequence]) -> dict[str, Any]:
    """What passes over sequences with routes do."""
    policy = build_policy(config)
    free = [replace(sequence, routes=None) for sequence in sequences]
    nowhere = [replace(s, routes=torch.full_like(s.routes, -1)) for s in sequences]
    routes = [s.routes for s in sequences]
    result = {
        "free": torch.cat(policy.compute_logprobs(free)),
        "compared": torch.cat(policy.compute_logprobs(free, compare_with=routes)),
        "recorded": torch.cat(policy.record_routes(free)[0]),
        "nowhere": torch.cat(policy.compute_logprobs(nowhere)),
        "fallback_nowhere": policy.fallback_frac(),
        "replayed": torch.cat(policy.compute_logprobs(sequences, compare_with=routes)),
        "fallback": policy.fallback_frac(),
        "disagreement": policy.route_agreement().disagreement,
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


def agreement_job(
    config: ExperimentConfig, sequences: list[LossSequence], changed: list[list[torch.Tensor]]
) -> list[tuple[RouteAgreement, float]]:
    """Of a free pass beside each of some lists of routes; and the fallbacks of their replay."""
    policy = build_policy(config)
    free = [replace(sequence, routes=None) for sequence in sequences]
    results = []
    for routes in changed:
        policy.compute_logprobs(free, compare_with=routes)
        agreement = policy.route_agreement()
        replayed = [replace(s, routes=own) for s, own in zip(sequences, routes, strict=True)]
        policy.compute_logprobs(replayed)
        results.append((agreement, policy.fallback_frac()))
    return results


def taken_job(config: ExperimentConfig, sequences: list[LossSequence]) -> list[list[torch.Tensor]]:
    """See `taken_experts`."""
    return taken_experts(build_policy(config), sequences)


def taken_experts(policy: Policy, sequences: list[LossSequence]) -> list[list[torch.Tensor]]:
    """[L, MoE layers, experts] bool: where upstream's dispatcher is told to send the tokens of each
    sequence, in a pass with its routes and in one without."""
    taken: list[torch.Tensor] = []
    for chunk in policy._chunks:
        for name, module in chunk.named_modules():
            if name.endswith(".router"):
                module.register_forward_hook(lambda module, args, out: taken.append(out[1].bool()))
    results = []
    for sequence in sequences:  # one at a time: a micro-batch of its tokens, in their order
        both = []
        for each in (sequence, replace(sequence, routes=None)):
            taken.clear()
            policy.compute_logprobs([each])
            both.append(torch.stack(taken, dim=1))
        results.append(both)
    return results
