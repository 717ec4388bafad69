"""Layer modules that Megatron's local specs lack on CPU, chosen through the layer spec.

`RMSNorm` allows sequence parallelism; `Attention` takes grouped queries, packed (THD) and padded
(BSHD) batches, sliding windows, sinks and context parallelism (all-gather of keys and values,
zig-zag chunks). On CUDA the Transformer Engine spec brings its own; this file is then not used.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from megatron_cpgd.policy.context_parallel import rank_positions
from megatron_cpgd.policy.latent_attention import LatentAttention


def use_cpu_layers(block: Any) -> Any:
    """Put our norm and core attention into a local `TransformerBlockSubmodules`; returns it."""
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        self_attention = layer.submodules.self_attention
        if self_attention.module is LatentAttention:
            self_attention.module = CpuLatentAttention
        attention = self_attention.submodules
        attention.core_attention = Attention
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if getattr(getattr(attention, name, None), "__name__", "") == "WrappedTorchNorm":
                setattr(attention, name, RMSNorm)
    return block


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last axis, computed in fp32."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums the gradient over the TP ranks, each of which saw its share of the tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), (x.size(-1),), eps=self.eps)
        return self.weight * normed.to(x.dtype)


class CpuLatentAttention(LatentAttention):
    """Multi-latent attention whose down projections are on every tensor-parallel rank.

    So does Transformer Engine's. The local layer cuts them by rows, and loses the sum over ranks of
    the gradient of the rotary key (multi_latent_attention.py:737).
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        kv_rows = config.kv_lora_rank + config.qk_pos_emb_head_dim
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = _ReplicatedLinear(config, config.q_lora_rank)
        self.linear_kv_down_proj = _ReplicatedLinear(config, kv_rows)


class _ReplicatedLinear(torch.nn.Module):
    def __init__(self, config: Any, rows: int) -> None:
        super().__init__()
        weight = torch.empty(rows, config.hidden_size, dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(weight)
        # As for RMSNorm: each rank sees its share of the tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowLayout:
    """Where the tokens of a packed batch go when every sequence becomes one row."""

    query_index: Tensor
    """[N, Lq] position in this rank's packed tokens; repeats the first token where padded."""
    key_index: Tensor
    """[N, Lk] position in the gathered tokens of all CP ranks."""
    flat_index: Tensor
    """[T] position of each of this rank's tokens in the flattened [N, Lq] rows."""
    query_position: Tensor
    """[N, Lq] position in its sequence."""
    key_position: Tensor
    """[N, Lk] position in its sequence; behind every query where padded."""


class Attention(MegatronModule):  # type: ignore[misc]
    """Causal core attention. Every sequence becomes one row of a batched kernel call.

    A layer with a window sees the token itself and `window` tokens before it. A sink is a learned
    logit of each head that takes its share of the softmax and adds nothing to the output.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert self.dropout == 0.0, "attention dropout is not implemented on CPU"
        group = getattr(pg_collection, "cp", None)
        self.cp_group = group or parallel_state.get_context_parallel_group()
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window: int | None = config.window_size[0] if windowed else None
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            offset = torch.empty(heads, dtype=config.params_dtype)
            self.softmax_offset = torch.nn.Parameter(offset)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The sinks, cut by heads, as upstream's core attention names them."""
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {"softmax_offset": 0}, sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip
        return sharded

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Queries [S, B, heads, d] or packed [T, heads, d]; returns [S, B, heads*d] or [T, ...].

        A given `attention_mask` is ignored: the mask is causal and ends with each sequence.
        """
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        size, rank = self.cp_group.size(), self.cp_group.rank()
        positions = [rank_positions(query.size(0) * size, rank=r, size=size) for r in range(size)]
        mask = self._mask(positions[rank], torch.cat(positions))
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, self._gather(key), self._gather(value)))
        return self._attend(q, k, v, mask).permute(2, 0, 1, 3).flatten(2)

    def _mask(self, query_position: Tensor, key_position: Tensor) -> Tensor | None:
        """[..., Lq, Lk] True where attended; None: plain causal. Positions [..., Lq], [..., Lk]."""
        if self.cp_group.size() == 1 and self.window is None and self.softmax_offset is None:
            return None
        distance = query_position[..., :, None] - key_position[..., None, :]
        visible = distance >= 0
        return visible if self.window is None else visible & (distance <= self.window)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.softmax_offset is not None and mask is not None:
            return self._attend_with_sinks(q, k, v, mask, self.softmax_offset)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale,
            enable_gqa=q.size(1) != k.size(1),
        )  # fmt: skip

    def _attend_with_sinks(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor
    ) -> Tensor:
        """A sink is the product of one more channel of the queries and of one more key."""
        scale = self.scale or q.size(-1) ** -0.5
        channel = (sinks / scale)[:, None, None].expand(*q.shape[:-1], 1)
        k, v = (F.pad(x, (0, 1, 1, 0)) for x in (k, v))
        k[:, :, 0, -1] = 1.0
        output = F.scaled_dot_product_attention(
            torch.cat([q, channel.to(q.dtype)], dim=-1), k, v,
            attn_mask=F.pad(mask, (1, 0), value=True), scale=scale,
            enable_gqa=q.size(1) != k.size(1),
        )  # fmt: skip
        return output[..., :-1]

    def _gather(self, x: Tensor) -> Tensor:
        """All CP ranks' tokens, rank after rank. Collective over the CP group."""
        if self.cp_group.size() == 1:
            return x
        gathered: Tensor = gather_from_sequence_parallel_region(x, group=self.cp_group)
        return gathered

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, params: Any) -> Tensor:
        layout = getattr(params, "row_layout", None)
        if layout is None:  # one per micro-batch, shared by all layers
            layout = _row_layout(
                params.cu_seqlens_q_padded.tolist(), self.cp_group.rank(), self.cp_group.size()
            )
            params.row_layout = layout
        q = query[layout.query_index].transpose(1, 2)
        k, v = (self._gather(t)[layout.key_index].transpose(1, 2) for t in (key, value))
        mask = self._mask(layout.query_position, layout.key_position)
        rows = self._attend(q, k, v, None if mask is None else mask[:, None])
        rows = rows.transpose(1, 2).flatten(2)
        return rows.flatten(0, 1)[layout.flat_index]


def _row_layout(boundaries: list[int], rank: int, size: int) -> _RowLayout:
    """Layout of packed sequences with the given padded boundaries on one CP rank."""
    lengths = [end - start for start, end in itertools.pairwise(boundaries)]
    starts = torch.tensor(boundaries[:-1]) // size
    counts = torch.tensor(lengths) // size
    columns = torch.arange(int(counts.max()))
    real = columns[None] < counts[:, None]
    query_index = torch.where(real, starts[:, None] + columns[None], 0)
    flat_index = real.flatten().nonzero().squeeze(1)
    local = boundaries[-1] // size
    position = torch.full((size, *real.shape), boundaries[-1])
    for row, length in enumerate(lengths):
        for r in range(size):
            position[r, row, : length // size] = rank_positions(length, rank=r, size=size)
    return _RowLayout(
        query_index=query_index,
        key_index=torch.cat([query_index + r * local for r in range(size)], dim=1),
        flat_index=flat_index,
        query_position=position[rank].where(real, 0),
        key_position=torch.cat(list(position), dim=1),
    )
