"""How far trainer and sampler are apart on the same tokens: mu sampled them, pi_old is the trainer.

Both have the same weights, so all of this is rounding unless something is wrong. With
d = log pi_old - log mu: `rollout/kl_*` estimate KL(mu || pi_old), k1 = -mean(d) is noisy and of any
sign, k3 = mean(e^d - 1 - d) >= 0.
"""

import torch
from torch import Tensor

from megatron_cpgd.algorithm.cpgd import MAX_LOG_RATIO


def compute_mismatch(old_logprobs: Tensor, rollout_logprobs: Tensor) -> dict[str, float]:
    """Metrics over all tokens of a rollout batch; none if there is no token.

    Args:
        old_logprobs: [T] float32, log pi_old under the trainer.
        rollout_logprobs: [T] float32, log mu, as the sampler reported them.
    """
    if not len(old_logprobs):
        return {}
    difference = old_logprobs.double() - rollout_logprobs.double()
    bounded = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {
        "rollout/logprob_abs_diff_mean": difference.abs().mean().item(),
        "rollout/logprob_abs_diff_max": difference.abs().max().item(),
        "rollout/kl_k1": -difference.mean().item(),
        "rollout/kl_k3": (torch.expm1(bounded) - bounded).mean().item(),
    }
