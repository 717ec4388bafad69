"""CPGD as the policy runs it: per-token tensors of a mini-batch, their loss, their metrics.

Everything that depends on more than one token (denominators, clip positions, weights) is fixed in
`build_loss_sequences`, on the whole mini-batch. What is left is a plain sum over tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpgd.algorithm.coefficients import (
    group_token_coefficients,
    log_clip_bounds,
    truncated_epoch_weight,
)
from megatron_cpgd.algorithm.cpgd import cpgd_loss
from megatron_cpgd.algorithm.diagnostics import (
    Statistics,
    empty_statistics,
    merge_statistics,
    token_statistics,
)
from megatron_cpgd.config.schema import (
    AlgorithmConfig,
    Clip,
    ConstantClip,
    NoClip,
    TightToLooseClip,
)
from megatron_cpgd.types import LossSequence, TrainSequence

Tokens = dict[str, Tensor]
"""Per-token tensors of one micro-batch, all of one shape, `loss_mask` among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpgdObjective:
    """Loss, statistics and their reduction for one choice of drift."""

    drift_coef: float
    drift_clip: float

    def loss(self, logprobs: Tensor, tokens: Tokens) -> Tensor:
        """Scalar sum of the CPGD loss over `tokens["loss_mask"]`."""
        return cpgd_loss(logprobs, **self._arguments(tokens))

    def statistics(self, logprobs: Tensor, entropy: Tensor, tokens: Tokens) -> Statistics:
        """Totals over the same tokens."""
        return token_statistics(
            logprobs,
            entropy=entropy,
            **self._arguments(tokens),
        )

    def reduce(
        self, parts: list[Statistics], all_reduce: Callable[[Tensor, Any], None]
    ) -> dict[str, float]:
        """Metrics over the parts of all ranks; `all_reduce` works in place."""
        merged = merge_statistics(parts or [empty_statistics()])
        all_reduce(merged.totals, dist.ReduceOp.SUM)
        all_reduce(merged.maxima, dist.ReduceOp.MAX)
        return merged.finish()

    def _arguments(self, tokens: Tokens) -> dict[str, Any]:
        return {
            "old_logprobs": tokens["old_logprobs"],
            "advantages": tokens["advantages"],
            "coefficients": tokens["coefficients"],
            "mask": tokens["loss_mask"],
            "log_clip_low": tokens.get("log_clip_low"),
            "log_clip_high": tokens.get("log_clip_high"),
            "drift_coef": self.drift_coef,
            "drift_clip": self.drift_clip,
        }


def build_objective(config: AlgorithmConfig) -> CpgdObjective:
    """The objective of a configuration."""
    return CpgdObjective(drift_coef=config.drift.coef, drift_clip=config.drift.gradient_clip)


def build_loss_sequences(
    sequences: Sequence[TrainSequence], config: AlgorithmConfig
) -> list[LossSequence]:
    """Sequences of ONE optimizer step with everything that the loss reads per token.

    Args:
        sequences: all responses to the step's prompts, `old_logprobs` set.
    """
    coefficients = _coefficients(sequences)
    return [
        _loss_sequence(sequence, coefficient, config.clip)
        for sequence, coefficient in zip(sequences, coefficients, strict=True)
    ]


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


def set_epoch_weights(
    sequences: Sequence[TrainSequence], logprobs: Sequence[Tensor], clip: Clip
) -> None:
    """Give every sequence the truncated importance weight of an epoch after the first.

    Args:
        logprobs: [T] each, of the policy at the start of the epoch.
    """
    assert not isinstance(clip, NoClip), "the configuration refuses epochs > 1 without a clip range"
    for sequence, current in zip(sequences, logprobs, strict=True):
        assert sequence.old_logprobs is not None
        sequence.epoch_weight = truncated_epoch_weight(
            current, sequence.old_logprobs, low=clip.low, high=clip.high
        )


def _coefficients(sequences: Sequence[TrainSequence]) -> list[float]:
    """1 / (prompts * tokens of the group) for each sequence."""
    groups = sorted({sequence.group for sequence in sequences})
    row = {group: i for i, group in enumerate(groups)}
    lengths = torch.zeros(len(groups), 1, dtype=torch.int64)
    for sequence in sequences:
        lengths[row[sequence.group]] += len(sequence.response_ids)
    per_group = group_token_coefficients(lengths).tolist()
    return [per_group[row[sequence.group]] for sequence in sequences]


def _loss_sequence(sequence: TrainSequence, coefficient: float, clip: Clip) -> LossSequence:
    length = len(sequence.response_ids)
    assert sequence.old_logprobs is not None, "compute the old log-probs first"
    advantages = torch.full((length,), sequence.advantage)
    if sequence.epoch_weight is not None:
        advantages = advantages * sequence.epoch_weight
    tensors = {
        "advantages": advantages,
        "coefficients": torch.full((length,), coefficient),
        "old_logprobs": sequence.old_logprobs,
        **_clip_tensors(length, clip),
    }
    [plain] = without_loss([sequence])
    return LossSequence(
        input_ids=plain.input_ids, prompt_length=plain.prompt_length, tensors=tensors
    )


def _clip_tensors(length: int, clip: ConstantClip | TightToLooseClip | NoClip) -> Tokens:
    if isinstance(clip, NoClip):
        return {}
    start = clip.start if isinstance(clip, TightToLooseClip) else 1.0
    low, high = log_clip_bounds(length, low=clip.low, high=clip.high, start=start)
    return {"log_clip_low": low, "log_clip_high": high}
