"""An objective as the policy runs it: per-token tensors of a mini-batch, their loss, their metrics.

Every method is one sum over tokens (docs/objectives.md):

    G_t = c_t m_t W_t ( policy force + alpha * min(r_t - 1, c) ) + c_t beta * reference force

What depends on more than one token and not on the live policy (denominators c, weights W and masks
m against the sampler, clip positions, advantages) is fixed on the whole mini-batch, in
algorithm/loss_sequences.py. What depends on a whole response under the live policy goes through
`Sequences`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_cpgd.algorithm.cpgd import drift_weight, log_ratio_term
from megatron_cpgd.algorithm.diagnostics import (
    Statistics,
    empty_statistics,
    merge_statistics,
    token_statistics,
)
from megatron_cpgd.algorithm.policy_terms import (
    capped_weight_term,
    clipped_ratio_term,
    joint_weight_term,
    probability_mask_term,
    soft_gate_term,
)
from megatron_cpgd.algorithm.reference_kl import reference_kl
from megatron_cpgd.algorithm.sequence_terms import (
    geometric_mean_term,
    prefix_min_term,
    sequence_ratio_term,
    sequence_weight_term,
)
from megatron_cpgd.algorithm.sequences import Sequences
from megatron_cpgd.algorithm.surrogate import Term, TokenInputs, masked, surrogate_loss
from megatron_cpgd.config.algorithm import (
    AlgorithmConfig,
    CappedWeightTerm,
    GeometricMeanTerm,
    JointWeightTerm,
    LogRatioTerm,
    PolicyTerm,
    PrefixMinTerm,
    ProbabilityMaskTerm,
    RatioTerm,
    SequenceRatioTerm,
    SequenceWeightTerm,
    SoftGateTerm,
)

Tokens = dict[str, Tensor]
"""Per-token tensors of one micro-batch, all of one shape, `loss_mask` among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Loss, statistics and their reduction of one configuration."""

    config: AlgorithmConfig

    def evaluate(
        self, logprobs: Tensor, entropy: Tensor, tokens: Tokens, sequences: Sequences
    ) -> tuple[Tensor, Statistics]:
        """The plain sum of the loss over `tokens["loss_mask"]`, and totals over the same tokens.

        Nothing is averaged here, so the losses of micro-batches, ranks and context-parallel slices
        add up to that of the batch. Outside the mask every tensor may hold anything, also inf and
        nan: the gradient there is exactly 0. With no token at all the loss is a 0 that still has a
        gradient. A value that is not finite inside the mask is not repaired: the loss is not finite
        either. Collective over the context-parallel group if the method looks at whole responses.
        """
        mask = tokens["loss_mask"]
        # Before any arithmetic: a product would turn junk * 0 into nan.
        tokens = {name: masked(x, mask) for name, x in tokens.items() if x.is_floating_point()}
        live = masked(logprobs, mask)
        inputs = _inputs(live.detach(), tokens)
        term = policy_term(self.config.policy, inputs, sequences)
        coefficients = self._live_coefficients(tokens["coefficients"], inputs, sequences)
        value, force = self._combine(term, coefficients, inputs, tokens)
        loss = surrogate_loss(live, value=value, force=force)
        statistics = token_statistics(
            inputs,
            term,
            coefficients=coefficients,
            mask=mask,
            entropy=entropy,
            loss=loss.detach(),
            drift_coef=self.config.drift.coef,
            drift_clip=self.config.drift.gradient_clip,
        )
        return loss, statistics

    def reduce(
        self, parts: list[Statistics], all_reduce: Callable[[Tensor, Any], None]
    ) -> dict[str, float]:
        """Metrics over the parts of all ranks; `all_reduce` works in place."""
        merged = merge_statistics(parts or [empty_statistics()])
        all_reduce(merged.totals, dist.ReduceOp.SUM)
        all_reduce(merged.maxima, dist.ReduceOp.MAX)
        return merged.finish()

    def _live_coefficients(
        self, coefficients: Tensor, inputs: TokenInputs, sequences: Sequences
    ) -> Tensor:
        """The coefficients, 0 in responses that the off-policy sequence mask rejects."""
        delta = self.config.rejection.off_policy_delta
        if delta is None:
            return coefficients
        divergence = sequences.mean(-inputs.full_log_ratio)
        rejected = (inputs.advantages < 0) & (divergence > delta)
        return coefficients.masked_fill(rejected, 0.0)

    def _combine(
        self, term: Term, coefficients: Tensor, inputs: TokenInputs, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        """(loss, force per token) of policy term, drift and reference KL."""
        drift, reference = self.config.drift, self.config.reference
        losses, force = term.value, coefficients * term.force
        if drift.coef:
            weight = drift_weight(inputs.log_ratio, drift.gradient_clip)
            losses = losses + drift.coef * (weight * inputs.logprobs)
            force = force + coefficients * drift.coef * weight
        value = (coefficients * losses).sum()
        if reference.coef:
            kl, kl_force = reference_kl(
                inputs.logprobs, tokens["ref_logprobs"], reference.estimator
            )
            scale = reference.coef * tokens["ref_coefficients"]
            value, force = value + (scale * kl).sum(), force + scale * kl_force
        return value, force


def policy_term(config: PolicyTerm, tokens: TokenInputs, sequences: Sequences) -> Term:
    """The policy term that a configuration names."""
    match config:
        case LogRatioTerm():
            return log_ratio_term(tokens)
        case RatioTerm():
            return clipped_ratio_term(tokens.log_ratio, tokens, dual_clip=config.dual_clip)
        case SequenceRatioTerm():
            return sequence_ratio_term(tokens, sequences)
        case GeometricMeanTerm():
            return geometric_mean_term(tokens, sequences)
        case CappedWeightTerm():
            return capped_weight_term(tokens, low=config.low, high=config.high)
        case SoftGateTerm():
            return soft_gate_term(
                tokens, positive=config.positive_temperature, negative=config.negative_temperature
            )
        case ProbabilityMaskTerm():
            return probability_mask_term(
                tokens,
                tokens.log_ratio if config.anchor == "old" else tokens.full_log_ratio,
                threshold=config.threshold,
                max_ratio=config.max_ratio,
            )
        case JointWeightTerm():
            return joint_weight_term(tokens, cap=config.cap)
        case SequenceWeightTerm():
            return sequence_weight_term(
                tokens,
                tokens.log_ratio if config.anchor == "old" else tokens.full_log_ratio,
                sequences,
                positive=(config.positive_power, config.positive_decay),
                negative=(config.negative_power, config.negative_decay),
            )
        case PrefixMinTerm():
            return prefix_min_term(tokens, sequences)


def build_objective(config: AlgorithmConfig) -> Objective:
    """The objective of a configuration."""
    return Objective(config=config)


def _inputs(logprobs: Tensor, tokens: Tokens) -> TokenInputs:
    return TokenInputs(
        logprobs=logprobs,
        old_logprobs=tokens["old_logprobs"].detach(),
        advantages=tokens["advantages"].detach(),
        log_clip_low=tokens.get("log_clip_low"),
        log_clip_high=tokens.get("log_clip_high"),
        rollout_logprobs=tokens.get("rollout_logprobs"),
    )
