"""Jobs for `run_distributed` about single layers."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpgd.policy.context_parallel import packed_rank_positions, rank_positions
from megatron_cpgd.policy.cpu_layers import Attention


def attention_job(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    boundaries: list[int] | None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> dict[str, Tensor]:
    """This context-parallel rank's part of the attention and of its gradients.

    Args:
        query, key, value: packed [T, heads, d] with boundaries, else [S, B, heads, d].
        weight: [T, heads * d] or [S, B, heads * d]; the loss is (output * weight).sum().
        window: tokens that a query sees before its own; None: all.
        sinks: [heads] logits.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    if boundaries is None:
        positions = rank_positions(len(query), rank=rank, size=size)
        packed = None
    else:
        positions = packed_rank_positions(boundaries, rank=rank, size=size)
        packed = SimpleNamespace(cu_seqlens_q_padded=torch.tensor(boundaries))
    config = SimpleNamespace(
        attention_dropout=0.0,
        window_size=None if window is None else (window, 0),
        window_attn_skip_freq=None,
        softmax_type="vanilla" if sinks is None else "learnable",
        num_attention_heads=query.size(-2),
        tensor_model_parallel_size=1,
        params_dtype=torch.float32,
    )
    cp_group = SimpleNamespace(cp=dist.group.WORLD)
    layer = Attention(config, 1, None, "self", pg_collection=cp_group)
    if sinks is not None:
        layer.softmax_offset.data.copy_(sinks)
    local = [x[positions].requires_grad_() for x in (query, key, value)]
    output = layer(*local, None, packed_seq_params=packed)
    (output * weight[positions]).sum().backward()
    gradients = {name: x.grad for name, x in zip("qkv", local, strict=True)}
    if sinks is not None:
        gradients["sinks"] = layer.softmax_offset.grad
    return {"positions": positions, "output": output.detach(), **gradients}


def unequal_parts_job(rows: list[int]) -> tuple[list[float], list[float], list[float]]:
    """(all parts, gradient of this rank's part, this rank's part of the sum over ranks)."""
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )

    rank, world = dist.get_rank(), dist.group.WORLD
    every = torch.arange(sum(rows), dtype=torch.float32)[:, None]
    part = every.split(rows)[rank].clone().requires_grad_()
    whole = gather_from_sequence_parallel_region(part, group=world, output_split_sizes=rows)
    (whole * (every + 10 * rank)).sum().backward()
    scattered = reduce_scatter_to_sequence_parallel_region(
        whole.detach(), group=world, input_split_sizes=rows
    )
    assert part.grad is not None
    return tuple(x.flatten().tolist() for x in (whole, part.grad, scattered))
