"""An objective as the policy runs it: per-token tensors of a mini-batch, their loss, their metrics.

Every method is one sum over tokens (docs/objectives.md):

    G_t = c_t m_t W_t ( policy force + alpha * min(r_t - 1, c) ) + c_t beta * reference force

What depends on more than one token and not on the live policy (denominators c, weights W and masks
m against the sampler, clip positions, advantages) is fixed in `build_loss_sequences`, on the whole
mini-batch. What depends on a whole response under the live policy goes through `Sequences`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpgd.algorithm.aggregation import response_coefficients
from megatron_cpgd.algorithm.balanced_clip import balanced_bounds
from megatron_cpgd.algorithm.coefficients import log_clip_bounds, truncated_epoch_weight
from megatron_cpgd.algorithm.correction import correction_weights
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
    BalancedClip,
    CappedWeightTerm,
    Clip,
    ConstantClip,
    GeometricMeanTerm,
    JointWeightTerm,
    LogRatioTerm,
    NoClip,
    PolicyTerm,
    PrefixMinTerm,
    ProbabilityMaskTerm,
    RatioTerm,
    SequenceRatioTerm,
    SequenceWeightTerm,
    SoftGateTerm,
    TightToLooseClip,
)
from megatron_cpgd.types import LossSequence, TrainSequence

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


def build_loss_sequences(
    sequences: Sequence[TrainSequence], config: AlgorithmConfig
) -> list[LossSequence]:
    """Sequences of ONE optimizer step with everything that the loss reads per token.

    Args:
        sequences: all responses to the step's prompts, `old_logprobs` set.
    """
    # The denominators count the masked responses, the mean weight of a correction does not.
    coefficients = _coefficients(sequences, config)
    trained = [sequence for sequence in sequences if not is_masked(sequence, config)]
    weights = iter(
        correction_weights(old_minus_rollout(trained), config.correction, config.rejection)
    )
    return [
        _loss_sequence(sequence, 0.0, torch.zeros(len(sequence.response_ids)), config)
        if is_masked(sequence, config)
        else _loss_sequence(sequence, coefficient, next(weights), config)
        for sequence, coefficient in zip(sequences, coefficients, strict=True)
    ]


def is_masked(sequence: TrainSequence, config: AlgorithmConfig) -> bool:
    """Whether the response was cut at the token limit and such ones bear no loss."""
    return sequence.truncated and config.filter.truncated == "mask"


def bears_loss(sequence: TrainSequence, config: AlgorithmConfig) -> bool:
    """Whether a response has a token in the loss, whatever its advantage."""
    return len(sequence.response_ids) > 0 and not is_masked(sequence, config)


def mask_metrics(sequences: Sequence[TrainSequence], config: AlgorithmConfig) -> dict[str, float]:
    """What the mask leaves out of a rollout batch; none if it is off or there is no response."""
    if config.filter.truncated == "keep" or not sequences:
        return {}
    masked = [is_masked(sequence, config) for sequence in sequences]
    return {"rollout/masked_truncated_frac": sum(masked) / len(masked)}


def without_loss(sequences: Sequence[TrainSequence]) -> list[LossSequence]:
    """The same sequences for a pass that computes log-probs only."""
    return [
        LossSequence(
            input_ids=torch.cat([s.prompt_ids, s.response_ids]),
            prompt_length=len(s.prompt_ids),
            tensors={},
        )
        for s in sequences
    ]


def old_logprobs(sequence: TrainSequence) -> Tensor:
    """[T] float32, which the old-log-prob pass has set."""
    assert sequence.old_logprobs is not None, "compute the old log-probs first"
    return sequence.old_logprobs


def old_minus_rollout(sequences: Sequence[TrainSequence]) -> list[Tensor]:
    """d = log pi_old - log mu of every response, [T] float32 each."""
    return [old_logprobs(sequence) - sequence.rollout_logprobs for sequence in sequences]


def has_epoch_weights(config: AlgorithmConfig) -> bool:
    """Whether epochs after the first need `set_epoch_weights`: the other terms hold the ratio."""
    return isinstance(config.policy, LogRatioTerm)


def set_epoch_weights(
    sequences: Sequence[TrainSequence], logprobs: Sequence[Tensor], clip: Clip
) -> None:
    """Give every sequence the truncated importance weight of an epoch after the first.

    Args:
        logprobs: [T] each, of the policy at the start of the epoch.
    """
    assert isinstance(clip, ConstantClip | TightToLooseClip), "epochs > 1 without a fixed range"
    for sequence, current in zip(sequences, logprobs, strict=True):
        sequence.epoch_weight = truncated_epoch_weight(
            current, old_logprobs(sequence), low=clip.low, high=clip.high
        )


def searched_clip(
    sequences: Sequence[TrainSequence], logprobs: Sequence[Tensor], clip: BalancedClip
) -> ConstantClip:
    """The clip range of ONE optimizer step, balanced under the live policy.

    Args:
        sequences: all responses to the step's prompts, `old_logprobs` set.
        logprobs: [T] each, of the live policy.
    """
    advantages = [torch.full((len(s.response_ids),), s.advantage) for s in sequences]
    old = [old_logprobs(sequence) for sequence in sequences]
    low, high = balanced_bounds(
        torch.cat(list(logprobs)), torch.cat(old), torch.cat(advantages), clip
    )
    return ConstantClip(low=1.0 - low, high=high - 1.0)


def _inputs(logprobs: Tensor, tokens: Tokens) -> TokenInputs:
    return TokenInputs(
        logprobs=logprobs,
        old_logprobs=tokens["old_logprobs"].detach(),
        advantages=tokens["advantages"].detach(),
        log_clip_low=tokens.get("log_clip_low"),
        log_clip_high=tokens.get("log_clip_high"),
        rollout_logprobs=tokens.get("rollout_logprobs"),
    )


def _coefficients(sequences: Sequence[TrainSequence], config: AlgorithmConfig) -> list[float]:
    """Of every sequence, on the whole optimizer step."""
    coefficients = response_coefficients(
        torch.tensor([len(sequence.response_ids) for sequence in sequences]),
        torch.tensor([sequence.group for sequence in sequences]),
        config.aggregation.type,
        constant_length=config.aggregation.length,
    )
    return coefficients.tolist()


def _loss_sequence(
    sequence: TrainSequence, coefficient: float, weight: Tensor, config: AlgorithmConfig
) -> LossSequence:
    length = len(sequence.response_ids)
    advantages = torch.full((length,), sequence.advantage)
    if sequence.epoch_weight is not None:
        advantages = advantages * sequence.epoch_weight
    tensors = {
        "advantages": advantages,
        "coefficients": coefficient * weight,
        "old_logprobs": old_logprobs(sequence),
        **_clip_tensors(length, config.clip),
    }
    if config.reads_rollout_logprobs:
        tensors["rollout_logprobs"] = sequence.rollout_logprobs
    if config.reference.coef:
        assert sequence.ref_logprobs is not None, "compute the reference log-probs first"
        tensors["ref_logprobs"] = sequence.ref_logprobs
        tensors["ref_coefficients"] = torch.full((length,), coefficient)
    [plain] = without_loss([sequence])
    return LossSequence(
        input_ids=plain.input_ids, prompt_length=plain.prompt_length, tensors=tensors
    )


def _clip_tensors(length: int, clip: Clip) -> Tokens:
    if isinstance(clip, NoClip):
        return {}
    assert not isinstance(clip, BalancedClip), "search the range of this optimizer step first"
    start = clip.start if isinstance(clip, TightToLooseClip) else 1.0
    low, high = log_clip_bounds(length, low=clip.low, high=clip.high, start=start)
    return {"log_clip_low": low, "log_clip_high": high}
