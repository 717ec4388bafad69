"""BAPO's clip range (arXiv:2510.18927, Algorithm 1), searched once per optimizer step.

With pi_old, the paper's pi_rollout, and c_low < 1 < c_high, bounds of the ratio r itself, tokens
with A > 0 have this share of PPO's objective:

    share    = positive / (positive + negative)
    positive = sum over A > 0 of pi_old(y_t) * min(r_t, c_high) * A
    negative = sum over A < 0 of pi_old(y_t) * max(r_t, c_low) * |A|

The search begins at (low_start, high_start). While the share is below its target, c_high rises by
its step; when another step would pass high_end, c_low does, until one would pass low_end. The sums
are plain ones over all tokens of the optimizer step, without denominators and corrections.

The denominator of the paper's Eq. 8 is |sum over all tokens|, in which the signs cancel: that is no
share and can be 0. positive + negative is our reading. Raising c_low can only lower the share: a
clipped token with A < 0 has no gradient any more but counts with its value, which grows. So once
c_high is exhausted, c_low always ends at its limit.

The authors' code differs from the paper: it raises c_low first, compares positive / negative with a
target of 1, leaves out pi_old, searches anew in every micro-batch and adds a dual clip of 3.
"""

from collections.abc import Iterator

from torch import Tensor

from megatron_cpgd.algorithm.surrogate import bounded_exp
from megatron_cpgd.config.algorithm import BalancedClip


def balanced_bounds(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: BalancedClip
) -> tuple[float, float]:
    """(c_low, c_high); where the search starts if no token has an advantage.

    Args:
        logprobs: [T] of the live policy, all tokens of ONE optimizer step.
        old_logprobs: [T], the same under pi_old.
        advantages: [T].
    """
    old = old_logprobs.double()
    ratio, weight = bounded_exp(logprobs.double() - old), old.exp() * advantages.double()
    up, down = weight > 0, weight < 0
    up_ratio, up_weight = ratio[up], weight[up]
    down_ratio, down_weight = ratio[down], -weight[down]
    low, high = clip.low_start, clip.high_start
    for low, high in _ranges(clip):
        positive = (up_weight * up_ratio.clamp(max=high)).sum()
        negative = (down_weight * down_ratio.clamp(min=low)).sum()
        if not positive < clip.positive_share * (positive + negative):
            break
    return low, high


def _ranges(clip: BalancedClip) -> Iterator[tuple[float, float]]:
    """All ranges in the order in which they are tried; the last one is taken untested."""
    lows = _steps(clip.low_start, clip.low_end, clip.low_step)
    highs = _steps(clip.high_start, clip.high_end, clip.high_step)
    yield from ((lows[0], high) for high in highs)
    yield from ((low, highs[-1]) for low in lows[1:])


def _steps(start: float, end: float, step: float) -> list[float]:
    # Counted, not added up: 0.6 + 15 * 0.02 must not miss 0.9 by a rounding error.
    return [start + i * step for i in range(int((end - start) / step + 1e-6) + 1)]
