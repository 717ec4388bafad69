"""CPGD: the clipped policy gradient and the policy drift (arXiv:2505.12504, Eq. 2).

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

import torch
from torch import Tensor

from megatron_cpgd.algorithm.surrogate import (
    MAX_LOG_RATIO,
    Term,
    TokenInputs,
    clip_log_ratio,
    inside_clip,
)


def log_ratio_term(tokens: TokenInputs) -> Term:
    """-Phi of every token, with the force -A * M."""
    log_ratio, advantages = tokens.log_ratio, tokens.advantages
    # min(l * A, clip(l) * A) with A drawn out of the minimum, which turns it round for A < 0.
    # Comparing the products would tie where both round to one number.
    return Term(
        value=-(clip_log_ratio(log_ratio, tokens) * advantages),
        force=-(advantages * inside_clip(log_ratio, tokens)),
        log_ratio=log_ratio,
    )


def drift_weight(log_ratio: Tensor, drift_clip: float) -> Tensor:
    """min(r - 1, c): the force of the drift, and what E multiplies log pi_theta with.

    expm1 keeps the digits of r - 1 that exp(l) - 1 cancels near r = 1.
    """
    return torch.expm1(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).clamp(max=drift_clip)
