"""Log-probs and entropy from vocabulary-parallel logits, a chunk of tokens at a time.

`chunked_logprobs` is the `output_processor` of Megatron's GPTModel (gpt_model.py): it gets the
hidden states instead of the logits, so that no more than one chunk of logits exists, in the
forward and in the backward pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobSettings:
    """How hidden states become log-probs."""

    vocab_size: int
    """Tokens of the model; the padding rows above take no probability."""
    temperature: float
    """Logits are divided by it, as the sampler does."""
    chunk_tokens: int
    """Tokens whose logits exist at one time."""


class _VocabParallelLogprob(torch.autograd.Function):
    """fp32 log-prob and entropy of logits [N, Vt] that are split over a TP group.

    Saves the logits in their own dtype and recomputes the softmax in the backward pass. With
    z = logits / temperature: d logp / dz = onehot - p, d H / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, first: int, group: Any
    ) -> tuple[Tensor, Tensor]:
        x = logits.float() / temperature
        largest = x.amax(-1) if x.size(-1) else x.new_full(x.shape[:-1], -torch.inf)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        x = x - largest.unsqueeze(-1)
        here = (targets >= first) & (targets < first + x.size(-1))
        column = torch.where(here, targets - first, 0)
        weight = x.exp()
        sums = torch.stack([_pick(x, column, here), weight.sum(-1), (weight * x).sum(-1)])
        dist.all_reduce(sums, group=group)
        log_total = sums[1].log()
        entropy = log_total - sums[2] / sums[1]
        ctx.save_for_backward(logits, largest + log_total, column, here, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return sums[0] - log_total, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor, None, None, None, None]:
        logits, log_sum, column, here, entropy = ctx.saved_tensors
        logp = logits.float() / ctx.temperature - log_sum.unsqueeze(-1)
        grad = torch.zeros_like(logp)
        if grad_entropy is not None:
            grad -= grad_entropy.unsqueeze(-1) * (logp + entropy.unsqueeze(-1))
        if grad_logprob is not None:
            grad -= grad_logprob.unsqueeze(-1)
        grad *= logp.exp()
        if grad_logprob is not None and grad.size(-1):
            grad.scatter_add_(-1, column.unsqueeze(-1), (grad_logprob * here).unsqueeze(-1))
        return (grad / ctx.temperature).to(logits.dtype), None, None, None, None


def _pick(x: Tensor, column: Tensor, here: Tensor) -> Tensor:
    if not x.size(-1):
        return torch.zeros_like(column, dtype=x.dtype)
    return torch.where(here, x.gather(-1, column.unsqueeze(-1)).squeeze(-1), 0.0)


def vocab_parallel_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float, first: int, group: Any
) -> tuple[Tensor, Tensor]:
    """Log-prob of the targets and entropy. Collective over the TP group.

    Args:
        logits: [N, Vt] this rank's columns, padding columns already cut off; Vt may be 0.
        targets: [N] int64 token ids over the whole vocabulary.
        temperature: the logits are divided by it, in fp32.
        first: vocabulary index of this rank's first column.

    Returns:
        Two [N] float32 tensors, equal on all ranks of the group.
    """
    outputs: tuple[Tensor, Tensor] = _VocabParallelLogprob.apply(  # type: ignore[no-untyped-call]
        logits, targets, temperature, first, group
    )
    return outputs


def chunked_logprobs(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    context: LogprobSettings,
    config: Any,
    **kwargs: Any,
) -> Tensor:
    """[2, B, S] float32: log-probs of `labels` [B, S] and entropies. Collective over the TP group.

    Args:
        hidden_states: [S, B, H], or [S / tp, B, H] with sequence parallel.
    """
    weight = output_layer.weight if output_weight is None else output_weight
    group = parallel_state.get_tensor_model_parallel_group()
    first = group.rank() * weight.size(0)
    real = min(max(context.vocab_size - first, 0), weight.size(0))
    if config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden_states)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden_states)

    def compute(hidden_chunk: Tensor, target_chunk: Tensor) -> Tensor:
        logits = F.linear(hidden_chunk, weight[:real])
        return torch.stack(
            vocab_parallel_logprobs(
                logits, target_chunk, temperature=context.temperature, first=first, group=group
            )
        )

    tokens = hidden.flatten(0, 1).split(context.chunk_tokens)
    targets = labels.transpose(0, 1).flatten().split(context.chunk_tokens)
    if torch.is_grad_enabled() and len(tokens) > 1:
        parts = [
            checkpoint(compute, h, y, use_reentrant=False)
            for h, y in zip(tokens, targets, strict=True)
        ]
    else:
        parts = [compute(h, y) for h, y in zip(tokens, targets, strict=True)]
    per_token = torch.cat(parts, dim=1).view(2, *hidden.shape[:2])
    return per_token.transpose(1, 2).contiguous()
