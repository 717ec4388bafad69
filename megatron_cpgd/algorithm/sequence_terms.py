"""Policy terms whose ratio belongs to a whole response or to a prefix of it.

A coefficient that differs between the tokens of a response (a per-token importance weight) scales
the force of its token, as in GSPO's token variant. With equal coefficients that is the exact
gradient of the response's term. All functions are collective over the context-parallel group.
"""

import torch
from torch import Tensor

from megatron_cpgd.algorithm.policy_terms import clipped_ratio_term
from megatron_cpgd.algorithm.sequences import Sequences
from megatron_cpgd.algorithm.surrogate import (
    MAX_LOG_RATIO,
    Term,
    TokenInputs,
    bounded_exp,
    clip_log_ratio,
    inside_clip,
)


def sequence_ratio_term(tokens: TokenInputs, sequences: Sequences) -> Term:
    """GSPO (arXiv:2507.18071): PPO's term with s = exp(mean of ln r over the response).

    -min(s A, clip(s) A) at every token. Summed with the coefficients 1 / (N T) it is the paper's
    loss, and the force on a token is -s A M(s) / (N T): d s / d log pi_t = s / T, times T tokens.
    """
    return clipped_ratio_term(sequences.mean(tokens.log_ratio), tokens)


def geometric_mean_term(tokens: TokenInputs, sequences: Sequences) -> Term:
    """GMPO (arXiv:2507.20673): -A g, g = exp(mean of the clipped ln r), force -A g M_t.

    Each token's ln r is clipped by itself, on the side where its advantage clips; clipped tokens
    count in the mean but have no force.
    """
    log_ratio = tokens.log_ratio
    mean = bounded_exp(sequences.mean(clip_log_ratio(log_ratio, tokens)))
    value = -tokens.advantages * mean
    return Term(value=value, force=value * inside_clip(log_ratio, tokens), log_ratio=log_ratio)


def sequence_weight_term(
    tokens: TokenInputs,
    log_ratio: Tensor,
    sequences: Sequences,
    *,
    positive: tuple[float, float],
    negative: tuple[float, float],
) -> Term:
    """VESPO (arXiv:2602.10693): -sg(phi(W)) A log pi, phi(W) = W^k exp(lambda (1 - W)).

    W is the product of the ratios of the whole response; phi(1) = 1, and phi falls to 0 both ways
    from its peak at k / lambda. Formula and defaults are those of the authors' code, whose
    docstring has other numbers.

    Args:
        log_ratio: against pi_old, or against mu to correct the sampler too (never truncated).
        positive: (k, lambda) where A >= 0.
        negative: (k, lambda) where A < 0.
    """
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    log_weight = sequences.sum(bounded).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    power, decay = (
        torch.full_like(log_ratio, below).masked_fill(tokens.advantages >= 0, above)
        for above, below in zip(positive, negative, strict=True)
    )
    phi = torch.exp(decay + power * log_weight - decay * log_weight.exp())
    force = -phi * tokens.advantages
    return Term(value=force * tokens.logprobs, force=force, log_ratio=tokens.log_ratio)


def prefix_min_term(tokens: TokenInputs, sequences: Sequences) -> Term:
    """MinPRO (arXiv:2601.22718): PPO's term with r~_t = sg(min over j < t of r_j) * r_t.

    The minimum stands for the product over the prefix, which is the exact weight but too noisy; on
    the first token it is 1. Read from the abstract and a third party's code: whether the paper's
    main variant clips like PPO or like CISPO, and its epsilons, could not be established.
    """
    bounded = tokens.log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return clipped_ratio_term(sequences.prefix_min(bounded) + tokens.log_ratio, tokens)
