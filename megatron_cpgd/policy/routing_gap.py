"""How much of the difference between trainer and engine is routing.

A mixture of experts sends a token elsewhere when its router rounds differently, so the log-probs of
equal weights may part (arXiv:2510.11370, arXiv:2512.01374). Two passes over the same responses tell
how far: in one the trainer's routers choose, in the other the engine's choices are replayed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_cpgd.algorithm.loss_sequences import without_loss
from megatron_cpgd.algorithm.mismatch import compute_mismatch
from megatron_cpgd.policy.policy import Policy
from megatron_cpgd.policy.routing_replay import RouteAgreement
from megatron_cpgd.types import TrainSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedPass:
    """A pass without gradient over responses whose routes the engine has returned."""

    logprobs: Tensor
    """[T] of all responses."""
    agreement: RouteAgreement
    """Of the trainer's routers, given what the layers before have computed, with the engine."""


def rollout_routes(sequences: Sequence[TrainSequence]) -> list[Tensor] | None:
    """Those of every sequence; None if the engine was not asked for them."""
    routes = [each.rollout_routes for each in sequences if each.rollout_routes is not None]
    return routes or None


def measure_routing_gap(
    policy: Policy,
    sequences: Sequence[TrainSequence],
    routes: Sequence[Tensor],
    done: Mapping[bool, RoutedPass],
) -> dict[str, float]:
    """Metrics of both passes under the current weights. Collective over the world.

    Args:
        routes: the engine's, of each sequence.
        done: passes under the same weights that need not be made again, by whether they replayed.
    """
    free, replayed = (
        done.get(replays) or _routed_pass(policy, sequences, routes, replays=replays)
        for replays in (False, True)
    )
    rollout_logprobs = torch.cat([sequence.rollout_logprobs for sequence in sequences])
    metrics = {
        "routing/disagreement": replayed.agreement.disagreement,
        "routing/free_disagreement": free.agreement.disagreement,
        "routing/free_disagreement_layer_max": max(free.agreement.by_layer),
        "routing/free_disagreement_token_frac": free.agreement.token_frac,
        "routing/fallback_frac": policy.fallback_frac(),
    }
    if not len(rollout_logprobs):
        return metrics
    own = compute_mismatch(free.logprobs, rollout_logprobs)
    engines = compute_mismatch(replayed.logprobs, rollout_logprobs)
    return metrics | {
        "routing/free_logprob_abs_diff_mean": own["rollout/logprob_abs_diff_mean"],
        "routing/free_logprob_abs_diff_max": own["rollout/logprob_abs_diff_max"],
        "routing/free_kl_k3": own["rollout/kl_k3"],
        "routing/replayed_logprob_abs_diff_mean": engines["rollout/logprob_abs_diff_mean"],
        "routing/replayed_logprob_abs_diff_max": engines["rollout/logprob_abs_diff_max"],
        "routing/replayed_kl_k3": engines["rollout/kl_k3"],
    }


def _routed_pass(
    policy: Policy, sequences: Sequence[TrainSequence], routes: Sequence[Tensor], *, replays: bool
) -> RoutedPass:
    batch = [
        replace(sequence, routes=own if replays else None)
        for sequence, own in zip(without_loss(sequences), routes, strict=True)
    ]
    logprobs = torch.cat(policy.compute_logprobs(batch, compare_with=routes))
    return RoutedPass(logprobs=logprobs, agreement=policy.route_agreement())
