"""Estimators of KL(pi_theta || pi_ref): value and force per token, and metrics.

With q = log pi_ref - log pi_theta (Schulman's notation, tokens drawn from the policy):

    k1 = -q               force 1        no information: its expectation under pi_theta is 0
    k2 = q^2 / 2          force -q       in expectation the gradient of the reverse KL
    k3 = e^q - 1 - q      force 1 - e^q  GRPO's; in expectation that of the forward KL
"""

from typing import Literal

import torch
from torch import Tensor

from megatron_cpgd.algorithm.surrogate import MAX_LOG_RATIO

Estimator = Literal["k1", "k2", "k3"]


def reference_kl(
    logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator
) -> tuple[Tensor, Tensor]:
    """(value, force) of the estimator at every token, without gradient."""
    q = ref_logprobs - logprobs
    if estimator == "k1":
        return -q, torch.ones_like(q)
    if estimator == "k2":
        return 0.5 * q.square(), -q
    growth = torch.expm1(q.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    return growth - q, -growth


def reference_metrics(logprobs: Tensor, ref_logprobs: Tensor) -> dict[str, float]:
    """Estimates of KL(pi || pi_ref) from tokens that pi has drawn; none if there is no token."""
    if not len(logprobs):
        return {}
    pair = logprobs.double(), ref_logprobs.double()
    return {
        "reference/kl_k1": reference_kl(*pair, "k1")[0].mean().item(),
        "reference/kl_k3": reference_kl(*pair, "k3")[0].mean().item(),
    }
