"""One position, a softmax over a few tokens: expectations are sums, and gradients exact."""

from typing import Any

import torch
from torch import Tensor

from megatron_cpgd.algorithm.objective import build_objective
from megatron_cpgd.algorithm.sequences import one_rank_sequences
from megatron_cpgd.config.algorithm import AlgorithmConfig


def logit_gradient(
    logits: Tensor, old: Tensor, weights: Tensor, advantages: Tensor, **settings: Any
) -> Tensor:
    """Gradient in the logits of the objective; `weights` are the coefficients per token.

    With the weights mu(token) it is that of the expectation over samples of mu. Without a clip
    range unless `settings`, a section `algorithm`, has one.
    """
    config = AlgorithmConfig.model_validate({"clip": {"type": "none"}, **settings})
    tokens = {"old_logprobs": old, "advantages": advantages, "coefficients": weights}
    if config.clip.type == "constant":
        tokens["log_clip_low"] = torch.full_like(old, 1 - config.clip.low).log()
        tokens["log_clip_high"] = torch.full_like(old, 1 + config.clip.high).log()
    mask = torch.ones_like(old, dtype=torch.bool)
    logits = logits.detach().requires_grad_()
    loss, _ = build_objective(config).evaluate(
        logits.log_softmax(0), 0 * old, tokens | {"loss_mask": mask}, one_rank_sequences(0 * mask)
    )
    return torch.autograd.grad(loss, logits)[0]
