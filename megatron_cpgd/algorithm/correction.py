"""Weights and masks against the difference between trainer and sampler, on whole responses.

With d = log pi_old - log mu per token and rho = e^d. pi_old (the trainer) and mu (the sampler) have
the same weights; they differ by kernels, precision and routing. Both log-probs are known before
the first update, so all of this is computed once, before a batch is split, and only multiplies the
coefficients of the loss: of the policy term and of the drift, not of a reference KL.

The order is fixed: masks from the raw d; weights, truncated after they are aggregated to their
level; division by the mean weight of the kept tokens, if asked for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_cpgd.algorithm.surrogate import bounded_exp
from megatron_cpgd.config.algorithm import (
    BandWeight,
    ClippedWeight,
    Correction,
    NoCorrection,
    RejectionConfig,
    TruncatedWeight,
)


def correction_weights(
    differences: Sequence[Tensor], correction: Correction, rejection: RejectionConfig
) -> list[Tensor]:
    """The factor of every token's coefficient, [T] float32 for each response.

    Args:
        differences: [T] float32 d of all responses of ONE optimizer step.
    """
    weights = [
        _weights(d.double(), correction) * _is_kept(d.double(), rejection) for d in differences
    ]
    if not isinstance(correction, NoCorrection) and correction.normalise and weights:
        # != 0, not > 0: a weight of nan must not vanish here.
        kept = torch.cat(weights)[torch.cat(weights) != 0]
        mean = kept.mean() if len(kept) else 1.0
        weights = [weight / mean for weight in weights]
    return [weight.float() for weight in weights]


def correction_metrics(
    differences: Sequence[Tensor], correction: Correction, rejection: RejectionConfig
) -> dict[str, float]:
    """What the correction does to a rollout batch; none if it is off or there is no token."""
    differences = [d.double() for d in differences if len(d)]
    is_off = isinstance(correction, NoCorrection) and rejection == RejectionConfig()
    if not differences or is_off:
        return {}
    raw = torch.cat([_ratio(d, correction) for d in differences])
    weights = torch.cat([_weights(d, correction) for d in differences])
    keeps = [_is_kept(d, rejection) for d in differences]
    kept = torch.cat([keep.expand(len(d)) for keep, d in zip(keeps, differences, strict=True)])
    used = weights * kept
    return {
        "rollout/correction_mean": used.mean().item(),
        "rollout/correction_ess": effective_sample_size(used),
        "rollout/correction_cut_frac": (weights != raw).double().mean().item(),
        "rollout/rejected_token_frac": (used == 0).double().mean().item(),
        "rollout/rejected_response_frac": 1.0 - torch.stack(keeps).double().mean().item(),
    }


def effective_sample_size(weights: Tensor) -> float:
    """(sum w)^2 / (n * sum w^2): the share of tokens that carry the estimate; 0 without any."""
    squares = len(weights) * weights.square().sum()
    return (weights.sum().square() / squares).item() if squares else 0.0


def _ratio(d: Tensor, correction: Correction) -> Tensor:
    """rho at the level of the correction, [T]."""
    if isinstance(correction, NoCorrection) or not len(d):
        return torch.ones_like(d)
    match correction.level:
        case "token":
            return bounded_exp(d)
        case "sequence":
            return bounded_exp(d.sum()).expand_as(d)
        case "geometric":
            return bounded_exp(d.mean()).expand_as(d)


def _weights(d: Tensor, correction: Correction) -> Tensor:
    ratio = _ratio(d, correction)
    match correction:
        case NoCorrection():
            return ratio
        case TruncatedWeight():
            return ratio.clamp(max=correction.high)
        case ClippedWeight():
            return ratio.clamp(min=correction.low, max=correction.high)
        case BandWeight():
            return ratio * ~((ratio < correction.low) | (ratio > correction.high))


def _is_kept(d: Tensor, rejection: RejectionConfig) -> Tensor:
    """Scalar bool: does the response pass all masks. One without tokens does."""
    kept = torch.ones((), dtype=torch.bool)
    if not len(d):
        return kept
    if rejection.veto is not None:
        kept = kept & ~(bounded_exp(d.amin()) < rejection.veto)
    mean = bounded_exp(d.mean())
    if rejection.geometric_low is not None:
        kept = kept & ~(mean < rejection.geometric_low)
    if rejection.geometric_high is not None:
        kept = kept & ~(mean > rejection.geometric_high)
    return kept
