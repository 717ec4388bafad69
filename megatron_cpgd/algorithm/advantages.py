"""Rewards to advantages: minus a baseline, times a weight of the prompt, perhaps whitened.

CPGD (arXiv:2505.12504, Eq. 2): group mean and omega(x). All of it on a whole rollout batch.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PromptWeight = Literal["equal", "std", "clip_filter"]
Baseline = Literal["group_mean", "leave_one_out", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """A_omega(x, y) = omega(x) * (R(x, y) - baseline of the group of x)."""

    values: Tensor
    """[P, G] float32, A_omega; with a baseline exactly 0 in a group of equal rewards, unless the
    batch was whitened."""
    prompt_weight: Tensor
    """[P] float32, omega. A group of equal rewards has 1 under `std`; nothing depends on it."""


def compute_advantages(
    rewards: Tensor,
    *,
    prompt_weight: PromptWeight,
    max_weight: float,
    baseline: Baseline = "group_mean",
    whiten_lengths: Tensor | None = None,
) -> Advantages:
    """Advantages of one whole rollout batch: weights and whitening look at all of it.

    Rewards are rounded to float32 first, see `equal_rewards`.

    Args:
        rewards: [P, G] real, one row per prompt; P may be 0.
        prompt_weight: omega(x). `equal`: 1; `std`: 1 / standard deviation of the group (divisor
            G - 1); `clip_filter`: min(max_weight, P / groups with unequal rewards), one number
            for the batch, 1 if there is no such group.
        max_weight: bound of `clip_filter`; not read by the others.
        baseline: `group_mean`; `leave_one_out`: the mean of the group's other rewards (RLOO,
            arXiv:2402.14740), which is G / (G - 1) times `group_mean`; `none`: 0.
        whiten_lengths: [P, G] int64, response tokens; the advantages are then centred and scaled to
            variance 1 over all tokens of the batch (REINFORCE++, arXiv:2501.03262), which makes
            those of groups with equal rewards differ from 0. None does not whiten.

    Raises:
        ValueError: wrong shape, a baseline over fewer than two rollouts per prompt, or a reward
            that is not finite.
    """
    rewards = _checked(rewards, least=1 if baseline == "none" else 2)
    zero_variance = equal_rewards(rewards)
    centred = rewards
    if baseline != "none":
        centred = rewards - rewards.mean(dim=1, keepdim=True)
        centred = centred.masked_fill(zero_variance[:, None], 0.0)
    if baseline == "leave_one_out":
        group_size = rewards.shape[1]
        centred = centred * (group_size / (group_size - 1))
    weight = _prompt_weight(rewards, zero_variance, kind=prompt_weight, max_weight=max_weight)
    values = weight[:, None] * centred
    if whiten_lengths is not None:
        values = _whitened(values, whiten_lengths.double())
    return Advantages(
        values=values.float(),
        prompt_weight=weight.float(),
    )


def equal_rewards(rewards: Tensor) -> Tensor:
    """[P] bool, True where all rewards of a group are equal; `rewards` is [P, G] real.

    They are compared as float32, so that sums like 0.1 + 0.2 and 0.3 count as equal: their
    difference of 6e-17, divided by the standard deviation, would be an advantage of order 1.
    """
    rounded = rewards.float()
    # Not std == 0: a mean taken as sum * (1 / G), as some kernels do, is a bit off equal numbers.
    return rounded.amax(dim=1) == rounded.amin(dim=1)


def overlong_penalty(lengths: Tensor, *, max_tokens: int, buffer_tokens: int) -> Tensor:
    """DAPO's soft punishment of long responses (arXiv:2503.14476, Eq. 13), shaped like `lengths`.

    0 up to max_tokens - buffer_tokens, from there linearly down to -1 at max_tokens; to be added to
    the rewards before the advantages are taken.
    """
    return ((max_tokens - buffer_tokens - lengths) / buffer_tokens).clamp(min=-1.0, max=0.0)


def _whitened(values: Tensor, lengths: Tensor) -> Tensor:
    """Mean 0 and variance 1 (divisor tokens - 1) over tokens; with under two tokens as it is."""
    tokens = lengths.sum()
    if tokens < 2:
        return values
    centred = values - (lengths * values).sum() / tokens
    variance = (lengths * centred.square()).sum() / (tokens - 1)
    return centred * torch.rsqrt(variance + 1e-8)


def _checked(rewards: Tensor, *, least: int) -> Tensor:
    """The rewards in float64, rounded to float32 precision."""
    if rewards.ndim != 2:
        raise ValueError(
            f"rewards: expected [prompts, rollouts per prompt], got shape {list(rewards.shape)}"
        )
    if rewards.shape[1] < least:
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
    if kind == "equal" or not len(rewards):
        return ones
    if kind == "std":
        return ones / rewards.std(dim=1, correction=1).masked_fill(zero_variance, 1.0)
    if kind == "clip_filter":
        informative = int((~zero_variance).sum())
        return ones * min(max_weight, len(rewards) / informative) if informative else ones
    raise ValueError(f"prompt_weight: expected equal, std or clip_filter, got {kind!r}")
