"""Rewards to advantages: centred in the group, weighted by the prompt (arXiv:2505.12504, Eq. 2)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PromptWeight = Literal["equal", "std", "clip_filter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """A_omega(x, y) = omega(x) * (R(x, y) - mean of R over the group of x)."""

    values: Tensor
    """[P, G] float32, A_omega; exactly 0 in a group of equal rewards."""
    prompt_weight: Tensor
    """[P] float32, omega. A group of equal rewards has 1 under `std`; nothing depends on it."""
    zero_variance: Tensor
    """[P] bool, True where all rewards of the group are equal."""


def compute_advantages(
    rewards: Tensor, *, prompt_weight: PromptWeight, max_weight: float
) -> Advantages:
    """Advantages of one rollout batch; `clip_filter` needs all its groups in one call.

    Rewards are rounded to float32 first, so that sums like 0.1 + 0.2 and 0.3 count as equal: their
    difference of 6e-17, divided by the standard deviation, would be an advantage of order 1.

    Args:
        rewards: [P, G] real, one row per prompt.
        prompt_weight: omega(x). `equal`: 1; `std`: 1 / standard deviation of the group (divisor
            G - 1); `clip_filter`: min(max_weight, P / groups with unequal rewards), one number
            for the batch, 1 if there is no such group.
        max_weight: bound of `clip_filter`; not read by the others.

    Raises:
        ValueError: wrong shape, fewer than two rollouts per prompt, or a reward that is not finite.
    """
    rewards = _checked(rewards)
    # Not std == 0: a mean taken as sum * (1 / G), as some kernels do, is a bit off equal numbers.
    zero_variance = rewards.amax(dim=1) == rewards.amin(dim=1)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    centred = centred.masked_fill(zero_variance[:, None], 0.0)
    weight = _prompt_weight(rewards, zero_variance, kind=prompt_weight, max_weight=max_weight)
    return Advantages(
        values=(weight[:, None] * centred).float(),
        prompt_weight=weight.float(),
        zero_variance=zero_variance,
    )


def _checked(rewards: Tensor) -> Tensor:
    """The rewards in float64, rounded to float32 precision."""
    if rewards.ndim != 2 or rewards.shape[0] == 0:
        raise ValueError(
            f"rewards: expected [prompts, rollouts per prompt], got shape {list(rewards.shape)}"
        )
    if rewards.shape[1] < 2:
        raise ValueError(
            "rewards: 1 rollout per prompt has no group to be compared with, its advantage would "
            "always be 0; sample at least 2 responses per prompt"
        )
    rounded = rewards.float()
    bad = (~rounded.isfinite()).nonzero()
    if len(bad):
        prompt, rollout = bad[0].tolist()
        raise ValueError(
            f"rewards: {len(bad)} of {rewards.numel()} are not finite, the first is "
            f"{rewards[prompt, rollout].item()} at prompt {prompt}, rollout {rollout}; "
            "reward functions must return finite numbers"
        )
    return rounded.double()


def _prompt_weight(
    rewards: Tensor, zero_variance: Tensor, *, kind: PromptWeight, max_weight: float
) -> Tensor:
    """omega: [P] float64."""
    ones = torch.ones_like(rewards[:, 0])
    if kind == "equal":
        return ones
    if kind == "std":
        return ones / rewards.std(dim=1, correction=1).masked_fill(zero_variance, 1.0)
    if kind == "clip_filter":
        informative = int((~zero_variance).sum())
        return ones * min(max_weight, len(rewards) / informative) if informative else ones
    raise ValueError(f"prompt_weight: expected equal, std or clip_filter, got {kind!r}")
