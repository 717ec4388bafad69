"""How far trainer and sampler are apart on the same tokens: mu sampled them, pi_old is the trainer.

Both have the same weights, so all of this is rounding unless something is wrong. With
d = log pi_old - log mu and rho = e^d: `rollout/kl_*` estimate KL(mu || pi_old), k1 = -mean(d) is
noisy and of any sign, k3 = mean(e^d - 1 - d) >= 0 explodes with a single large rho.
`rollout/prob_error` is mean(e^|d|), 1 for equal policies; `rollout/chi2` is mean(rho^2) - 1;
`rollout/ess` is the share of tokens that untruncated weights rho would leave.
"""

import torch
from torch import Tensor

from megatron_cpgd.algorithm.correction import effective_sample_size
from megatron_cpgd.algorithm.surrogate import MAX_LOG_RATIO


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
    ratio = bounded.exp()
    return {
        "rollout/logprob_abs_diff_mean": difference.abs().mean().item(),
        "rollout/logprob_abs_diff_max": difference.abs().max().item(),
        "rollout/kl_k1": -difference.mean().item(),
        "rollout/kl_k3": (torch.expm1(bounded) - bounded).mean().item(),
        "rollout/prob_error": bounded.abs().exp().mean().item(),
        "rollout/chi2": (ratio.square() - 1.0).mean().item(),
        "rollout/ess": effective_sample_size(ratio),
        "rollout/is_ratio_max": ratio.max().item(),
        "rollout/is_ratio_min": ratio.min().item(),
    }
