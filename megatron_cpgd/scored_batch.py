"""The batch of one step as rank 0 knows it: scored, filtered, and what is to be said of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from megatron_cpgd.algorithm.advantages import Advantages, equal_rewards
from megatron_cpgd.rewards.base import RewardResult, join_results
from megatron_cpgd.stability.repetition import repetition_frac
from megatron_cpgd.types import RolloutGroup, Routes, TrainSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBatch:
    """What one step trains on, and what is to be said of all that was sampled for it."""

    groups: list[RolloutGroup]
    """May be empty: a filter may leave none."""
    rewards: list[list[float]]
    """[P, G] weighted sums."""
    reward_parts: dict[str, list[list[float]]]
    """Reward function -> [P, G], unweighted."""
    advantages: Advantages
    version: int
    """Of the weights that sampled it."""
    metrics: dict[str, int | float]
    """Of all that was sampled, also of what is not trained on."""


class SampledResponses:
    """All responses that were sampled for a step, without their tokens; flat, in order."""

    def __init__(self, group_size: int) -> None:
        """None yet."""
        self.lengths: list[int] = []
        self._truncated: list[bool] = []
        self._repetition: list[float] = []
        self._rewards: list[RewardResult] = []
        self._route_bytes = 0
        self._group_size = group_size

    @property
    def batches(self) -> int:
        """Batches of prompts."""
        return len(self._rewards)

    def add(self, groups: Sequence[RolloutGroup], rewards: RewardResult) -> list[bool]:
        """The responses to one batch of prompts; returns which groups have equal rewards."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        self.lengths += [len(rollout.token_ids) for rollout in rollouts]
        self._truncated += [rollout.finish_reason == "length" for rollout in rollouts]
        self._repetition += [repetition_frac(rollout.token_ids) for rollout in rollouts]
        self._route_bytes += sum(len(r.routes.experts) for r in rollouts if r.routes is not None)
        self._rewards.append(rewards)
        return equal_rewards(self.per_group(rewards.total)).tolist()

    def rewards(self) -> RewardResult:
        """Of all responses."""
        return join_results(self._rewards)

    def per_group(self, values: Sequence[float]) -> Tensor:
        """[groups, G] float64 of a flat list."""
        return torch.tensor(values, dtype=torch.float64).view(-1, self._group_size)

    def metrics(self, kept: Sequence[int]) -> dict[str, int | float]:
        """Of all responses: over `kept` alone a filter would move the rewards to the middle.

        Args:
            kept: places of the groups that are trained on.
        """
        result = self.rewards()
        rewards, lengths = self.per_group(result.total), self.per_group(self.lengths)
        equal = equal_rewards(rewards)
        dropped = torch.ones_like(equal)
        dropped[list(kept)] = False
        return {
            "reward/mean": rewards.mean().item(),
            "reward/std": rewards.std(correction=0).item(),
            "reward/accuracy": accuracy(result),
            "reward/timeouts": result.timeouts,
            "reward/errors": result.errors,
            "reward/zero_variance_frac": equal.double().mean().item(),
            "rollout/sampled_batches": self.batches,
            "rollout/filtered_groups": int((dropped & equal).sum()),
            "rollout/surplus_groups": int((dropped & ~equal).sum()),
            "rollout/response_tokens": lengths.sum().item(),
            "rollout/response_tokens_mean": lengths.mean().item(),
            "rollout/response_tokens_max": lengths.max().item(),
            "rollout/truncated_frac": fmean(self._truncated),
            "rollout/repetition_frac": fmean(self._repetition),
            "rollout/repetition_frac_max": max(self._repetition),
            **{f"reward/{name}_mean": fmean(values) for name, values in result.columns.items()},
            **({"routing/engine_bytes": self._route_bytes} if self._route_bytes else {}),
        }


def accuracy(rewards: RewardResult) -> float:
    """Share of responses whose first reward is above 0."""
    first = next(iter(rewards.columns.values()))
    return fmean(value > 0 for value in first)


def train_sequences(batch: ScoredBatch) -> list[TrainSequence]:
    """The batch as the trainer takes it."""
    return [
        TrainSequence(
            group=i,
            prompt_ids=torch.tensor(group.prompt.token_ids),
            response_ids=torch.tensor(rollout.token_ids, dtype=torch.int64),
            rollout_logprobs=torch.tensor(rollout.logprobs, dtype=torch.float32),
            advantage=advantage,
            truncated=rollout.finish_reason == "length",
            rollout_routes=None if rollout.routes is None else _with_last_token(rollout.routes),
        )
        for i, (group, row) in enumerate(
            zip(batch.groups, batch.advantages.values.tolist(), strict=True)
        )
        for rollout, advantage in zip(group.rollouts, row, strict=True)
    ]


def _with_last_token(routes: Routes) -> Tensor:
    """[L, MoE layers, top_k] int16: the last token, which the engine never fed, has no route."""
    experts = routes.tensor().to(torch.int16)
    return torch.cat([experts, experts.new_full((1, *experts.shape[1:]), -1)])


def batch_metrics(batch: ScoredBatch, step: int) -> dict[str, float]:
    """What the batch of a step says before any training on it."""
    weights = batch.advantages.prompt_weight.double()
    return {
        **batch.metrics,
        **({"reward/prompt_weight_mean": weights.mean().item()} if batch.groups else {}),
        "rollout/staleness": step - 1 - batch.version,
    }
