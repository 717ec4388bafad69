"""The algebra that all objectives share: a method is a force on the log-prob of every token.

    G_t = d loss / d log pi_theta(y_t)

A term of a loss says, per token, what it adds to the loss and which force that is; both are plain
tensors without gradient. `surrogate_loss` makes a scalar of them that has this value and this
gradient, and no other: stop-gradients, masks and sequence-level ratios need no autograd of their
own, and a reduction over ranks needs no derivative.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""exp never sees more, in either direction: e^20 = 4.9e8 is past every cap and finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenInputs:
    """What a term reads: the tokens of one micro-batch at this rank, without gradient.

    All tensors have one shape and hold 0 where no loss is taken.
    """

    logprobs: Tensor
    """log pi_theta of the sampled tokens."""
    old_logprobs: Tensor
    """log pi_old under the trainer, not the sampler's."""
    advantages: Tensor
    """A, with prompt weight and epoch weight."""
    log_clip_low: Tensor | None = None
    """ln(1 - eps_low), broadcastable; None does not clip below."""
    log_clip_high: Tensor | None = None
    """ln(1 + eps_high), broadcastable; None does not clip above."""
    rollout_logprobs: Tensor | None = None
    """log mu, as the sampler reported it; None for objectives that do not read it."""

    @property
    def log_ratio(self) -> Tensor:
        """log pi_theta - log pi_old."""
        return self.logprobs - self.old_logprobs

    @property
    def full_log_ratio(self) -> Tensor:
        """log pi_theta - log mu."""
        assert self.rollout_logprobs is not None, "build_loss_sequences adds what a term reads"
        return self.logprobs - self.rollout_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A policy term per token, before coefficients and sum."""

    value: Tensor
    """What the token adds to the loss. Some are surrogates whose value means nothing."""
    force: Tensor
    """Its derivative with respect to the token's log-prob."""
    log_ratio: Tensor
    """What the clip range is compared with: of the token, its prefix or its sequence."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp that stays finite, see MAX_LOG_RATIO."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clip_log_ratio(log_ratio: Tensor, tokens: TokenInputs) -> Tensor:
    """The log-ratio cut on the side where its advantage clips: above for A > 0, else below."""
    low, high = tokens.log_clip_low, tokens.log_clip_high
    below_high = log_ratio if high is None else log_ratio.clamp(max=high)
    above_low = log_ratio if low is None else log_ratio.clamp(min=low)
    return torch.where(tokens.advantages > 0, below_high, above_low)


def inside_clip(log_ratio: Tensor, tokens: TokenInputs) -> Tensor:
    """PPO's mask: False if A > 0 above the range or A < 0 below it; a bound itself is inside."""
    clipped = torch.zeros_like(log_ratio, dtype=torch.bool)
    if tokens.log_clip_high is not None:
        clipped |= (tokens.advantages > 0) & (log_ratio > tokens.log_clip_high)
    if tokens.log_clip_low is not None:
        clipped |= (tokens.advantages < 0) & (log_ratio < tokens.log_clip_low)
    return ~clipped


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """0 outside the mask, in the value and in the gradient, also where x is inf or nan."""
    return torch.where(mask, x, 0.0)


def surrogate_loss(logprobs: Tensor, *, value: Tensor, force: Tensor) -> Tensor:
    """A scalar that equals `value` and whose gradient is `force`.

    Args:
        logprobs: [...] log pi_theta; carries gradient and is 0 outside the mask.
        value: scalar.
        force: [...] d loss / d logprobs, coefficients included.
    """
    # logprobs - logprobs is an exact 0, or nan where a log-prob is not finite: nothing is hidden.
    return value.detach() + (force.detach() * (logprobs - logprobs.detach())).sum()
