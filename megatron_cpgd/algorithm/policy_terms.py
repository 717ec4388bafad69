"""Policy terms of other methods, one token at a time; `algorithm/cpgd.py` has CPGD's.

With r = pi_theta / pi_old, w = pi_theta / mu (mu is the sampler) and PPO's mask M of `inside_clip`.
Each function returns the value of the term and its force on log pi_theta. At r = w = 1 every force
is -A.
"""

import torch
from torch import Tensor

from megatron_cpgd.algorithm.surrogate import (
    Term,
    TokenInputs,
    bounded_exp,
    clip_log_ratio,
    inside_clip,
)


def clipped_ratio_term(
    log_ratio: Tensor, tokens: TokenInputs, *, dual_clip: float | None = None
) -> Term:
    """PPO (arXiv:1707.06347) on any ratio: -min(r A, clip(r) A), force -r A M.

    Without a clip range M = 1. Two epsilons make DAPO's decoupled clip.

    Args:
        log_ratio: ln r of the token, its prefix or its sequence.
        dual_clip: c > 1 of arXiv:1912.09729: where A < 0 and r > c the loss is -c A, without force.
            None is PPO.
    """
    advantages = tokens.advantages
    ratio, passes = bounded_exp(log_ratio), inside_clip(log_ratio, tokens)
    counted = bounded_exp(clip_log_ratio(log_ratio, tokens))
    if dual_clip is not None:
        too_large = (advantages < 0) & (ratio > dual_clip)
        counted, passes = counted.where(~too_large, dual_clip), passes & ~too_large
    return Term(
        value=-counted * advantages, force=-ratio * advantages * passes, log_ratio=log_ratio
    )


def capped_weight_term(tokens: TokenInputs, *, low: float, high: float) -> Term:
    """CISPO (arXiv:2506.13585): -sg(clip(r, low, high)) A log pi; no token loses its gradient."""
    weight = bounded_exp(tokens.log_ratio).clamp(min=low, max=high)
    return _weighted_logprob(weight, tokens)


def soft_gate_term(tokens: TokenInputs, *, positive: float, negative: float) -> Term:
    """SAPO (arXiv:2511.20347): -4 / tau sigmoid(tau (r - 1)) A, force -4 s (1 - s) r A.

    Args:
        positive: tau where A > 0.
        negative: tau elsewhere.
    """
    ratio = bounded_exp(tokens.log_ratio)
    temperature = torch.full_like(ratio, negative).masked_fill(tokens.advantages > 0, positive)
    gate = torch.sigmoid(temperature * (ratio - 1.0))
    return Term(
        value=-4.0 / temperature * gate * tokens.advantages,
        force=-4.0 * gate * (1.0 - gate) * ratio * tokens.advantages,
        log_ratio=tokens.log_ratio,
    )


def probability_mask_term(
    tokens: TokenInputs, log_ratio: Tensor, *, threshold: float, max_ratio: float
) -> Term:
    """DPPO with total variation (arXiv:2602.04879): -sg(min(r, max_ratio)) M A log pi.

    M drops A > 0 where pi_theta - pi_anchor > threshold and A < 0 where it is < -threshold: a bound
    on probabilities, not on their ratio, so a rare token is not masked for a small absolute change.

    Args:
        log_ratio: against the anchor, pi_old or mu.
    """
    difference = tokens.logprobs.exp() - (tokens.logprobs - log_ratio).exp()
    leaves_up = (tokens.advantages > 0) & (difference > threshold)
    leaves_down = (tokens.advantages < 0) & (difference < -threshold)
    weight = bounded_exp(log_ratio).clamp(max=max_ratio) * ~(leaves_up | leaves_down)
    return _weighted_logprob(weight, tokens)


def joint_weight_term(tokens: TokenInputs, *, cap: float) -> Term:
    """MiniRL (arXiv:2512.01374): -M sg(min(w, cap)) A log pi; M is PPO's mask, of r.

    w = pi_theta / mu corrects staleness and sampler at once. Whether the paper truncates w or only
    pi_old / mu could not be established; the two differ where w > cap. The other reading is
    `ratio` with a truncated train-inference weight.
    """
    weight = bounded_exp(tokens.full_log_ratio).clamp(max=cap)
    return _weighted_logprob(weight * inside_clip(tokens.log_ratio, tokens), tokens)


def _weighted_logprob(weight: Tensor, tokens: TokenInputs) -> Term:
    """-sg(weight) A log pi: REINFORCE with a weight."""
    force = -weight * tokens.advantages
    return Term(value=force * tokens.logprobs, force=force, log_ratio=tokens.log_ratio)
