"""Sequences of one optimizer step with all that their loss reads, fixed before any split.

Denominators, weights and masks against the sampler, clip ranges and advantages depend on more than
one token but not on the live policy; `algorithm/objective.py` adds what does.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_cpgd.algorithm.aggregation import response_coefficients
from megatron_cpgd.algorithm.balanced_clip import balanced_bounds
from megatron_cpgd.algorithm.coefficients import log_clip_bounds, truncated_epoch_weight
from megatron_cpgd.algorithm.correction import correction_weights
from megatron_cpgd.config.algorithm import (
    AlgorithmConfig,
    BalancedClip,
    Clip,
    ConstantClip,
    LogRatioTerm,
    NoClip,
    TightToLooseClip,
)
from megatron_cpgd.types import LossSequence, TrainSequence


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
            routes=s.routes,
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
    return replace(plain, tensors=tensors)


def _clip_tensors(length: int, clip: Clip) -> dict[str, Tensor]:
    if isinstance(clip, NoClip):
        return {}
    assert not isinstance(clip, BalancedClip), "search the range of this optimizer step first"
    start = clip.start if isinstance(clip, TightToLooseClip) else 1.0
    low, high = log_clip_bounds(length, low=clip.low, high=clip.high, start=start)
    return {"log_clip_low": low, "log_clip_high": high}
