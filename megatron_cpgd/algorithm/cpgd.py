"""The CPGD objective: clipped policy gradient with policy drift (arXiv:2505.12504, Eq. 2).

For the prompts x of one optimizer step D, G responses each, and the tokens i of a response y_k:

    l_i    = log pi_theta(y_i) - log pi_old(y_i)               log-ratio;  r_i = exp(l_i)
    Phi_i  = min( l_i * A,  clip(l_i, ln(1 - eps_low), ln(1 + eps_high)) * A )
    E_i    = min( sg(r_i) - 1, c ) * log pi_theta(y_i)         sg: stop-gradient
    loss   = - sum_x 1 / (|D| * sum_k |y_k|) * sum_k sum_i ( Phi_i - alpha * E_i )

A = omega(x) * (R - mean of the group's R), times the truncated weight of a later epoch; omega does
not scale the drift. Per token, the loss has the gradient

    G_i = d loss / d log pi_theta(y_i) = coefficient * ( -A * M_i + alpha * min(r_i - 1, c) )

where M_i is PPO's mask: 0 if (A > 0 and l_i > ln(1 + eps_high)) or (A < 0 and l_i < ln(1 -
eps_low)), else 1; a log-ratio exactly at a bound is inside. Differences to PPO: no factor r in
front of A, so a large ratio cannot blow up the step of a token with A < 0; and a drift that pulls
the ratio back, whichever side it left.

E_i is a gradient surrogate of KL(pi_old || pi_theta): its gradient is that of the k3 estimator
r - 1 - l with the weight r - 1 capped at c. Its value is no KL. Capping the estimator instead of
its gradient would leave -1 where r > 1 + c and push the ratio further up.

Without drift this is CPG, without clip PGD, without both PG. At r = 1 all have the same gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""exp never sees more, in either direction: e^20 = 4.9e8 is past every cap and finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CPGDTerms:
    """Per-token terms of Eq. 2, before coefficients and sum; shaped like the log-probs."""

    policy: Tensor
    """Phi, to be maximised."""
    drift: Tensor | None
    """E, to be minimised: a gradient surrogate whose value is no KL. None if not asked for."""


def cpgd_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    log_clip_low: Tensor | None,
    log_clip_high: Tensor | None,
    drift_clip: float | None,
) -> CPGDTerms:
    """Phi and E of every token; see the module's docstring.

    Args:
        logprobs: [...] log pi_theta of the sampled tokens; carries gradient.
        old_logprobs: [...] log pi_old under the trainer, not the sampler's.
        advantages: [...] A, with omega and the epoch weight.
        log_clip_low: ln(1 - eps_low), broadcastable to `logprobs`; None does not clip below.
        log_clip_high: ln(1 + eps_high), broadcastable to `logprobs`; None does not clip above.
        drift_clip: c > 0; None leaves the drift out.
    """
    log_ratio = logprobs - old_logprobs.detach()
    # clamp, not minimum: at the bound clamp passes the whole gradient, minimum half of it.
    below_high = log_ratio if log_clip_high is None else log_ratio.clamp(max=log_clip_high)
    above_low = log_ratio if log_clip_low is None else log_ratio.clamp(min=log_clip_low)
    # min(l * A, clip(l) * A) with A drawn out of the minimum, which turns it round for A < 0.
    # Comparing the products would tie, and halve the gradient, where both round to one number.
    advantages = advantages.detach()
    policy = torch.where(advantages > 0, below_high, above_low) * advantages
    if drift_clip is None:
        return CPGDTerms(policy=policy, drift=None)
    return CPGDTerms(policy=policy, drift=drift_weight(log_ratio, drift_clip) * logprobs)


def drift_weight(log_ratio: Tensor, drift_clip: float) -> Tensor:
    """min(r - 1, c) without gradient: what the drift multiplies grad log pi_theta with.

    expm1 keeps the digits of r - 1 that exp(l) - 1 cancels near r = 1.
    """
    return torch.expm1(log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).clamp(
        max=drift_clip
    )


def cpgd_loss(
    logprobs: Tensor,
    *,
    old_logprobs: Tensor,
    advantages: Tensor,
    coefficients: Tensor,
    mask: Tensor,
    log_clip_low: Tensor | None = None,
    log_clip_high: Tensor | None = None,
    drift_coef: float,
    drift_clip: float,
) -> Tensor:
    """Scalar: plain sum over the masked tokens of coefficient * (-Phi + drift_coef * E).

    Nothing is averaged here, so the losses of micro-batches, ranks and context-parallel slices add
    up to that of the batch. Outside the mask every tensor may hold anything, also inf and nan: the
    gradient there is exactly 0. With no token at all the result is a 0 that still has a gradient.
    A value that is not finite inside the mask is not repaired: the loss is not finite either.

    Args:
        logprobs: [...] float32, log pi_theta of the sampled tokens; carries gradient.
        old_logprobs: [...] float32, log pi_old under the trainer.
        advantages: [...] float32, A with omega and the epoch weight.
        coefficients: [...] float32, see `group_token_coefficients`.
        mask: [...] bool, True on response tokens.
        log_clip_low: ln(1 - eps_low), broadcastable; None does not clip below.
        log_clip_high: ln(1 + eps_high), broadcastable; None does not clip above.
        drift_coef: alpha >= 0; at 0 the drift is not computed.
        drift_clip: c > 0, cap of the drift's gradient weight.
    """
    # Before any arithmetic: a product would turn junk * 0 into nan, in the backward pass as well.
    terms = cpgd_terms(
        _masked(logprobs, mask),
        _masked(old_logprobs, mask),
        _masked(advantages, mask),
        log_clip_low=None if log_clip_low is None else _masked(log_clip_low, mask),
        log_clip_high=None if log_clip_high is None else _masked(log_clip_high, mask),
        drift_clip=drift_clip if drift_coef else None,
    )
    losses = -terms.policy
    if terms.drift is not None:
        losses = losses + drift_coef * terms.drift
    return (_masked(coefficients, mask).detach() * losses).sum()


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """0 outside the mask, in the value and in the gradient."""
    return torch.where(mask, x, 0.0)
