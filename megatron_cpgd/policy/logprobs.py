"""Log-probs and entropy from vocabulary-parallel logits, a chunk of tokens at a time.

`chunked_logprobs` is the `output_processor` of Megatron's GPTModel (gpt_model.py): it gets the
hidden states instead of the logits, so that no more than one chunk of logits exists, in the
forward and in the backward pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobSettings:
    """How hidden states become log-probs."""

    vocab_size: int
    """Tokens of the model; the padding rows above take no probability."""
    temperature: float
    """Logits are divided by it, as the sampler does."""
    chunk_tokens: int
    """Tokens whose logits exist at one time."""


_BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""fp32 logits that go through all elementwise steps together: what a cache holds or a GPU fills."""


class _LinearLogprob(torch.autograd.Function):
    """fp32 log-prob and entropy of the logits hidden @ weight.T, columns split over a TP group.

    One buffer holds the logits of a chunk and, in the backward pass, their gradient. That pass goes
    from the last chunk, whose logits are still there, to the first and computes the others again.
    With z = logits / temperature: d logp / dz = onehot - p.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        settings: LogprobSettings,
        group: Any,
    ) -> tuple[Tensor, Tensor]:
        first = group.rank() * len(weight)
        width = min(max(settings.vocab_size - first, 0), len(weight))
        head = weight[:width]
        here = (targets >= first) & (targets < first + width)
        column = torch.where(here, targets - first, 0)
        buffer = _buffer(hidden, head, settings.chunk_tokens)
        local = hidden.new_zeros(4, len(hidden), dtype=torch.float32)
        for chunk in _slices(len(hidden), settings.chunk_tokens):
            logits = _multiply(hidden[chunk], head, buffer)
            _reduce_columns(logits, column[chunk], settings.temperature, out=local[:, chunk])
        largest = local[0].clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        # From z - local maximum to z - maximum of all shards.
        shift = local[0] - largest
        picked = torch.where(here, local[1] + shift, 0.0)
        sums = torch.stack([picked, local[2], local[3] + local[2] * shift])
        sums[1:] *= shift.exp()
        dist.all_reduce(sums, group=group)
        log_total = sums[1].log()
        entropy = log_total - sums[2] / sums[1]
        ctx.save_for_backward(hidden, weight, column, here, largest + log_total)
        ctx.settings, ctx.width, ctx.buffer = settings, width, buffer
        ctx.mark_non_differentiable(entropy)
        return sums[0] - log_total, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprob: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, column, here, log_sum = ctx.saved_tensors
        head, chunks = weight[: ctx.width], _slices(len(hidden), ctx.settings.chunk_tokens)
        # Freed on return, because the layers below need the memory; a second pass starts anew.
        buffer, ctx.buffer = ctx.buffer, None
        in_buffer = chunks[-1] if buffer is not None else None
        if buffer is None:
            buffer = _buffer(hidden, head, ctx.settings.chunk_tokens)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for chunk in reversed(chunks):
            if chunk == in_buffer:
                logits = buffer[: chunk.stop - chunk.start]
            else:
                logits = _multiply(hidden[chunk], head, buffer)
            _replace_by_gradient(
                logits,
                column[chunk],
                log_sum[chunk],
                onehot=here[chunk].float(),
                grad=grad_logprob[chunk],
                temperature=ctx.settings.temperature,
            )
            torch.mm(logits, head, out=grad_hidden[chunk])
            grad_weight[: ctx.width].addmm_(logits.t(), hidden[chunk])
        return grad_hidden, grad_weight, None, None, None


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _buffer(hidden: Tensor, head: Tensor, chunk_tokens: int) -> Tensor:
    return hidden.new_empty(min(chunk_tokens, len(hidden)), len(head))


def _multiply(hidden: Tensor, head: Tensor, buffer: Tensor) -> Tensor:
    """[n, Vt] logits of a chunk, in the buffer's first rows."""
    return torch.mm(hidden, head.t(), out=buffer[: len(hidden)])


def _blocks(logits: Tensor) -> list[slice]:
    """Row ranges of about `_BLOCK_BYTES` in fp32; none if this shard has only padding."""
    if not logits.size(1):
        return []
    return _slices(len(logits), max(1, _BLOCK_BYTES[logits.device.type] // (4 * logits.size(1))))


def _scaled(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """The logits over the temperature, in fp32, in the first rows of `out`."""
    z = out[: len(logits)].copy_(logits)
    return z if temperature == 1.0 else z.div_(temperature)


def _reduce_columns(logits: Tensor, column: Tensor, temperature: float, *, out: Tensor) -> None:
    """What a shard knows of its rows: all that TP ranks exchange.

    Args:
        logits: [n, Vt].
        out: [4, n] float32, gets the maximum m of z, then with x = z - m: x at `column`, sum e^x
            and sum x e^x.
    """
    blocks = _blocks(logits)
    if not blocks:
        out[0] = torch.finfo(torch.float32).min
        return
    # Fresh memory for every step would cost more than the arithmetic.
    z, weight = logits.new_empty(2, blocks[0].stop, logits.size(1), dtype=torch.float32)
    for rows in blocks:
        x = _scaled(logits[rows], temperature, z)
        largest = x.amax(-1)
        x.sub_(largest.unsqueeze(-1))
        picked = x.gather(-1, column[rows].unsqueeze(-1)).squeeze(-1)
        exp = torch.exp(x, out=weight[: len(x)])
        out[:, rows] = torch.stack([largest, picked, exp.sum(-1), x.mul_(exp).sum(-1)])


def _replace_by_gradient(
    logits: Tensor,
    column: Tensor,
    log_sum: Tensor,
    *,
    onehot: Tensor,
    grad: Tensor,
    temperature: float,
) -> None:
    """Overwrite logits [n, Vt] by d loss / d logits = grad (onehot - p) / temperature.

    Args:
        log_sum: [n] log of the sum of e^z over the whole vocabulary.
        onehot: [n] what to put at `column`: 1, or 0 where another shard holds the target.
        grad: [n] d loss / d logp.
    """
    blocks, grad = _blocks(logits), (grad / temperature).unsqueeze(-1)
    if not blocks:
        return
    z = logits.new_empty(blocks[0].stop, logits.size(1), dtype=torch.float32)
    for rows in blocks:
        p = _scaled(logits[rows], temperature, z).sub_(log_sum[rows].unsqueeze(-1)).exp_()
        p.mul_(-grad[rows])
        p.scatter_add_(-1, column[rows].unsqueeze(-1), grad[rows] * onehot[rows].unsqueeze(-1))
        logits[rows] = p


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, settings: LogprobSettings, group: Any
) -> tuple[Tensor, Tensor]:
    """Log-prob of the targets, and entropy, which carries no gradient. Collective over the group.

    Args:
        hidden: [N, H].
        weight: [Vt, H] this rank's rows of the output weight, padding included.
        targets: [N] int64 token ids over the whole vocabulary.
        group: the TP group.

    Returns:
        Two [N] float32 tensors, equal on all ranks of the group.
    """
    outputs: tuple[Tensor, Tensor] = _LinearLogprob.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, settings, group
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

    No gradient flows through the entropies: an objective is a force on log-probs.

    Args:
        hidden_states: [S, B, H], or [S / tp, B, H] with sequence parallel.
    """
    if config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden_states)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden_states)
    logprobs, entropy = linear_logprobs(
        hidden.flatten(0, 1),
        output_layer.weight if output_weight is None else output_weight,
        labels.transpose(0, 1).flatten(),
        context,
        parallel_state.get_tensor_model_parallel_group(),
    )
    per_token = torch.stack([logprobs, entropy]).view(2, *hidden.shape[:2])
    return per_token.transpose(1, 2).contiguous()
