"""What autograd keeps of a micro-batch for its backward pass, and what a pass needs beside it.

The sums follow arXiv:2205.05198, 4, with gated MLPs, grouped queries and fused attention instead of
GPT's layers. They count elements of tensors that exist: on CPU (`policy/cpu_layers.py`) as counted
on real layers, see tests/distributed/test_planned_memory.py; with Transformer Engine as read from
its sources, unmeasured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_cpgd.planning.fp8 import Fp8
from megatron_cpgd.planning.layout import Layout
from megatron_cpgd.planning.model import Model
from megatron_cpgd.planning.state import BYTES, Precision
from megatron_cpgd.weights.placement import padded_vocab_size

Recompute = Literal["none", "selective", "full"]

EXPERT_IMBALANCE = 1.3
"""Tokens of the busiest expert-parallel rank over their mean."""
LOGIT_BLOCK = {True: 256 << 20, False: 4 << 20}
"""As `_BLOCK_BYTES` of policy/logprobs.py; by whether the machine has GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """How the passes over the model are made."""

    precision: Precision
    recompute: Recompute
    accelerator: bool
    fused_activation: bool = False
    """`model.megatron.bias_activation_fusion`; there is none for gpt-oss."""
    fp8: Fp8 | None = None
    """How layers multiply in FP8; None: they do not."""

    @property
    def element(self) -> int:
        return BYTES[self.precision]


def passes_of(
    precision: Precision, recompute: Recompute, megatron: Mapping[str, Any], *, accelerator: bool,
    fp8: Fp8 | None = None,
) -> Passes:  # fmt: skip
    """The passes of a configuration; `megatron` is `model.megatron`."""
    fused = accelerator and bool(megatron.get("bias_activation_fusion", True))
    return Passes(
        precision=precision, recompute=recompute, accelerator=accelerator, fused_activation=fused,
        fp8=fp8,
    )  # fmt: skip


def stage_activations(
    model: Model, layout: Layout, stage: int, tokens: int, passes: Passes
) -> float:
    """Bytes that a rank of a stage keeps at its fullest: of all micro-batches in flight.

    Args:
        tokens: of a micro-batch, over all context-parallel ranks.
    """
    local = tokens / layout.cp
    kept = 0.0
    for chunk in layout.stage(stage, model.decoder.layers):
        for layer in chunk.layers:
            kept += local * (
                _layer_input(model, layout, passes)
                if passes.recompute == "full"
                else layer_bytes(model, layout, layer, passes)
            )
        if chunk.embedding:
            kept += local * _layer_input(model, layout, passes)
    return kept * layout.in_flight(stage)


def working_bytes(model: Model, layout: Layout, stage: int, tokens: int, passes: Passes) -> float:
    """Bytes of the layer whose backward pass runs: with full recompute all that it saves, else
    gradients as large as its widest tensors."""
    local = tokens / layout.cp
    layers = [i for chunk in layout.stage(stage, model.decoder.layers) for i in chunk.layers]
    saved = max(layer_bytes(model, layout, layer, passes) for layer in set(layers))
    return local * saved * (1.5 if passes.recompute == "full" else 0.5)


def head_bytes(
    model: Model, layout: Layout, tokens: int, chunk_tokens: int, passes: Passes
) -> float:
    """Bytes of `policy/logprobs.py:chunked_logprobs` in the last stage's backward pass: the final
    norm, the gathered hidden states and their gradient, the logits of one chunk, their fp32 blocks,
    four numbers per token, and the gradient of the output weight."""
    local, element, hidden = tokens / layout.cp, passes.element, model.decoder.hidden
    rows = padded_vocab_size(model.decoder.vocab, layout.tp) // layout.tp
    chunk = min(local, chunk_tokens)
    norm = local * _norm(hidden, passes) / layout.sequence_shards
    block = 2 * min(LOGIT_BLOCK[passes.accelerator], 4 * rows * chunk)
    per_token = local * (2 * hidden * element + 16)
    return norm + per_token + element * rows * (chunk + hidden) + block


def layer_bytes(model: Model, layout: Layout, layer: int, passes: Passes) -> float:
    """Bytes that one layer keeps per token of this context-parallel rank."""
    decoder, element = model.decoder, passes.element
    sequence = 2 * _norm(decoder.hidden, passes)
    if decoder.latent is None:
        heads = _attention(model, layout, passes)
    else:
        heads, extra = _latent_attention(model, passes)
        sequence += extra
    experts = decoder.experts
    fused = passes.fused_activation and not decoder.sinks
    width = 3 if fused else 5  # gate and up, silu, shifted up, product
    routed = 0.0
    if experts is None or layer in experts.dense_layers:
        heads += width * element * decoder.intermediate
    else:
        heads += width * element * experts.shared_intermediate
        sequence += 8 * experts.count  # scores of the router, fp32, twice
        width += not fused  # the product again, times the gate's probability
        # A copy of the token for each expert; with etp every rank of the group has it.
        copies = model.top_k * expert_imbalance(layout) / layout.sequence_shards
        routed = copies * element * (decoder.hidden * layout.etp + width * experts.intermediate)
    plain = sequence / layout.sequence_shards + heads / layout.tp + routed
    if passes.fp8 is None or not passes.fp8.covers(layer, decoder.layers):
        return plain
    return plain + _fp8_change(model, layout, layer, passes.fp8, element)


def _fp8_change(model: Model, layout: Layout, layer: int, fp8: Fp8, element: int) -> float:
    """Bytes that a layer keeps more in FP8, which is less than 0: inputs of products are saved in
    FP8, and once more as they are where another step reads them too."""
    decoder, experts = model.decoder, model.decoder.experts
    both, instead = fp8.input_bytes, fp8.input_bytes - element
    if decoder.latent is None:
        sequence, heads = instead * decoder.hidden, both * decoder.heads * decoder.head_dim
    else:
        ranks = (decoder.latent.q_rank or 0) + decoder.latent.kv_rank
        # Queries and the compressed form each have a copy of the normed hidden state.
        sequence = (both + instead) * decoder.hidden + instead * ranks
        heads = both * decoder.heads * decoder.latent.v_head_dim
    routed = 0.0
    if experts is None or layer in experts.dense_layers:
        sequence += instead * decoder.hidden
        heads += instead * decoder.intermediate
    else:
        if experts.shared_intermediate:  # the router reads their input too
            sequence += both * decoder.hidden
            heads += instead * experts.shared_intermediate
        copies = model.top_k * expert_imbalance(layout) / layout.sequence_shards
        routed = copies * instead * (decoder.hidden * layout.etp + experts.intermediate)
    return sequence / layout.sequence_shards + heads / layout.tp + routed


def expert_imbalance(layout: Layout) -> float:
    """Load of the busiest rank over the mean; a rank with all experts has the mean."""
    return EXPERT_IMBALANCE if layout.ep > 1 else 1.0


def _norm(width: int, passes: Passes) -> float:
    """Input and output of an RMSNorm; on CPU also the fp32 input and the normed values."""
    extra = 0 if passes.accelerator else 4
    return (2 * passes.element + extra) * width


def _layer_input(model: Model, layout: Layout, passes: Passes) -> float:
    return passes.element * model.decoder.hidden / layout.sequence_shards


def _attention(model: Model, layout: Layout, passes: Passes) -> float:
    """Between the first norm and the second one, over all tensor-parallel ranks."""
    decoder, element = model.decoder, passes.element
    query, key = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    if passes.accelerator:
        # Fused projection, rotated queries and keys, output; a copy of queries before their norm.
        elements = 3 * query + 3 * key + (query if decoder.qk_norm else 0)
    else:
        # Rows of queries, keys (of all context-parallel ranks), values and outputs, the output
        # once more, the rotation's factors; with norms: what they read, and the normed values.
        rows = 0 if passes.recompute == "selective" else query + 2 * key * layout.cp
        elements = 2 * query + rows + 4 * decoder.head_dim
        elements += 3 * (query + key) if decoder.qk_norm else 0
    return element * elements + 4 * decoder.heads


def _latent_attention(model: Model, passes: Passes) -> tuple[float, float]:
    """(cut by heads, cut along the sequence or not at all), as `_attention`."""
    decoder, latent, element = model.decoder, model.decoder.latent, passes.element
    assert latent is not None
    rotated = latent.qk_head_dim + latent.rotary_dim
    up = 2 * rotated + rotated + latent.qk_head_dim + 3 * latent.v_head_dim
    query_rank = latent.q_rank or 0  # None: queries come from the hidden state
    down = query_rank + latent.kv_rank + latent.rotary_dim
    norms = _norm(query_rank + latent.kv_rank, passes)
    return element * decoder.heads * up + 4 * decoder.heads, element * down + norms
