"""The weight table of a decoder.

Megatron names: megatron-core 0.19 GPTModel. HF names: the files that transformers 5 saves.
"""

from collections.abc import Iterator

from megatron_cpgd.weights.decoder import Decoder, Experts, LatentAttention
from megatron_cpgd.weights.table import (
    Entry,
    Ignored,
    WeightTable,
    gated_mlp,
    qkv,
    rename,
    vocab,
)


def decoder_table(model: Decoder) -> WeightTable:
    """The table of a decoder."""
    embedding_shape = (model.vocab, model.hidden)
    embedding = "model.embed_tokens.weight"
    ignored = [Ignored(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "is recomputed")]
    head = embedding if model.tied else "lm_head.weight"
    if model.prediction_layers:
        ignored += _prediction_layers(model, embedding, head)
    if model.tied:
        ignored.append(Ignored(r"lm_head\.weight", "tied to the embedding by config.json"))
    entries = [vocab("embedding.word_embeddings.weight", embedding, embedding_shape)]
    for layer in range(model.layers):
        prefixes = (f"decoder.layers.{layer}.", f"model.layers.{layer}.")
        if model.latent is None:
            entries += _attention(model, *prefixes)
        else:
            entries += _latent_attention(model, model.latent, *prefixes)
        if model.experts is None or layer in model.experts.dense_layers:
            entries += _dense_layer(model, *prefixes)
        else:
            entries += _expert_layer(model.experts, model.hidden, *prefixes)
    entries.append(
        rename(("decoder.final_layernorm.weight",), "model.norm.weight", (model.hidden,))
    )
    # A tied head exists under pipeline parallelism, where the last stage keeps its own copy.
    entries.append(vocab("output_layer.weight", head, embedding_shape, alias=model.tied))
    return WeightTable(tuple(entries), tuple(ignored))


def _prediction_layers(model: Decoder, embedding: str, head: str) -> Iterator[Ignored]:
    """The layers behind the last one, each with the embedding and the output layer once more."""
    numbers = "|".join(str(model.layers + i) for i in range(model.prediction_layers))
    reason = "predicts further tokens, which is not trained"
    for name, original in (
        (r"embed_tokens\.weight", embedding),
        (r"shared_head\.head\.weight", head),
        (".*", None),
    ):
        pattern = rf"model\.layers\.({numbers})\.{name}"
        yield Ignored(pattern, reason, carried=True, copy_of=original)


def _attention(model: Decoder, megatron: str, hf: str) -> Iterator[Entry]:
    """Norm and self-attention of one layer; the arguments are the name prefixes of the layer."""
    attention, hf_attention = f"{megatron}self_attention.", f"{hf}self_attn."
    norm_names = (f"{megatron}input_layernorm.weight", f"{attention}linear_qkv.layer_norm_weight")
    yield rename(norm_names, f"{hf}input_layernorm.weight", (model.hidden,))
    columns: dict[str, tuple[int, ...]] = {"weight": (model.hidden,), "bias": ()}
    for kind in _kinds(bias=model.qkv_bias):
        yield qkv(
            f"{attention}linear_qkv.{kind}",
            f"{hf_attention}{{}}_proj.{kind}",
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            columns=columns[kind],
        )
    yield from _row_parallel(
        f"{attention}linear_proj",
        f"{hf_attention}o_proj",
        (model.hidden, model.heads * model.head_dim),
        bias=model.output_bias,
    )
    if model.sinks:
        name = (f"{attention}core_attention.softmax_offset",)
        yield rename(name, f"{hf_attention}sinks", (model.heads,), "rows")
    if model.qk_norm:
        for side in "qk":
            name = (f"{attention}{side}_layernorm.weight",)
            yield rename(name, f"{hf_attention}{side}_norm.weight", (model.head_dim,))


def _latent_attention(
    model: Decoder, latent: LatentAttention, megatron: str, hf: str
) -> Iterator[Entry]:
    """Norm and self-attention of one layer; `megatron` and `hf` are its name prefixes."""
    norm = "input_layernorm.weight"
    yield rename((f"{megatron}{norm}",), f"{hf}{norm}", (model.hidden,))
    attention, hf_attention = f"{megatron}self_attention.", f"{hf}self_attn."
    query_rows = model.heads * (latent.qk_head_dim + latent.rotary_dim)
    # The rotated part of the keys bypasses the second projection.
    down_rows = latent.kv_rank + latent.rotary_dim
    up_rows = model.heads * (latent.qk_head_dim + latent.v_head_dim)
    sides = []
    if latent.q_rank is None:
        name, shape = (f"{attention}linear_q_proj.weight",), (query_rows, model.hidden)
        yield rename(name, f"{hf_attention}q_proj.weight", shape, "rows")
    else:
        sides.append(("q", latent.q_rank, latent.q_rank, query_rows, "q_a_proj"))
    sides.append(("kv", latent.kv_rank, down_rows, up_rows, "kv_a_proj_with_mqa"))
    for side, rank, down_rows, up_rows, hf_down in sides:
        down = (f"{attention}linear_{side}_down_proj.weight",)
        yield rename(down, f"{hf_attention}{hf_down}.weight", (down_rows, model.hidden))
        up = f"{attention}linear_{side}_up_proj."
        norms = (f"{attention}{side}_layernorm.weight", f"{up}layer_norm_weight")
        yield rename(norms, f"{hf_attention}{side}_a_layernorm.weight", (rank,))
        name = (f"{up}weight",)
        yield rename(name, f"{hf_attention}{side}_b_proj.weight", (up_rows, rank), "rows")
    shape = (model.hidden, model.heads * latent.v_head_dim)
    yield from _row_parallel(f"{attention}linear_proj", f"{hf_attention}o_proj", shape, bias=False)


def _dense_layer(model: Decoder, megatron: str, hf: str) -> Iterator[Entry]:
    """Norm and gated MLP of one layer; the arguments are the name prefixes of the layer."""
    norm_names = (
        f"{megatron}pre_mlp_layernorm.weight",
        f"{megatron}mlp.linear_fc1.layer_norm_weight",
    )
    yield rename(norm_names, f"{hf}post_attention_layernorm.weight", (model.hidden,))
    shape = (model.intermediate, model.hidden)
    yield from _mlp(f"{megatron}mlp.", f"{hf}mlp.", shape, bias=model.mlp_bias)


def _mlp(megatron: str, hf: str, shape: tuple[int, int], *, bias: bool = False) -> Iterator[Entry]:
    """A gated MLP of the given [intermediate, hidden]; `megatron` and `hf` are its prefixes."""
    for kind in _kinds(bias=bias):
        gate, up = (f"{hf}{part}_proj.{kind}" for part in ("gate", "up"))
        size = shape if kind == "weight" else shape[:1]
        yield gated_mlp((f"{megatron}linear_fc1.{kind}",), gate, up, size)
    yield from _row_parallel(f"{megatron}linear_fc2", f"{hf}down_proj", shape[::-1], bias=bias)


def _expert_layer(experts: Experts, hidden: int, megatron: str, hf: str) -> Iterator[Entry]:
    """Norm, router and experts of one layer; `megatron` and `hf` are its name prefixes."""
    mlp, hf_mlp = f"{megatron}mlp.", f"{hf}{experts.hf_block}."
    norm = f"{hf}post_attention_layernorm.weight"
    yield rename((f"{megatron}pre_mlp_layernorm.weight",), norm, (hidden,))
    if experts.packed:
        yield from _packed_experts(experts, hidden, mlp, hf_mlp)
        return
    yield rename((f"{mlp}router.weight",), f"{hf_mlp}gate.weight", (experts.count, hidden))
    if experts.score_correction:
        bias = f"{hf_mlp}gate.e_score_correction_bias"
        yield rename((f"{mlp}router.expert_bias",), bias, (experts.count,), fp32=True)
    if experts.shared_intermediate:
        shape = (experts.shared_intermediate, hidden)
        yield from _mlp(f"{mlp}shared_experts.", f"{hf_mlp}shared_experts.", shape)
    rows = experts.intermediate
    for expert in range(experts.count):
        fc1, fc2 = (_expert_names(mlp, layer, "weight", expert) for layer in ("fc1", "fc2"))
        gate, up, down = (
            f"{hf_mlp}experts.{expert}.{part}.weight" for part in experts.hf_projections
        )
        yield gated_mlp(fc1, gate, up, (rows, hidden), expert=True)
        yield rename(fc2, down, (hidden, rows), "columns", expert=True)


def _packed_experts(experts: Experts, hidden: int, mlp: str, hf_mlp: str) -> Iterator[Entry]:
    """Router and experts of one layer, the projections of all experts in one HF tensor."""
    for kind, columns in (("weight", (hidden,)), ("bias", ())):
        router = (f"{mlp}router.{kind}",)
        yield rename(router, f"{hf_mlp}router.{kind}", (experts.count, *columns))
    rows = experts.intermediate
    for expert in range(experts.count):
        fc1, fc2 = (_expert_names(mlp, layer, "weight", expert) for layer in ("fc1", "fc2"))
        gate_up, down = (f"{hf_mlp}experts.{part}_proj" for part in ("gate_up", "down"))
        yield gated_mlp(fc1, gate_up, gate_up, (rows, hidden), expert=True, packed=expert)
        yield rename(fc2, down, (hidden, rows), "columns", expert=True, packed=expert)
        fc1, fc2 = (_expert_names(mlp, layer, "bias", expert) for layer in ("fc1", "fc2"))
        gate_up, down = f"{gate_up}_bias", f"{down}_bias"
        yield gated_mlp(fc1, gate_up, gate_up, (rows,), expert=True, packed=expert)
        yield rename(fc2, down, (hidden,), expert=True, packed=expert)


def _expert_names(mlp: str, layer: str, kind: str, expert: int) -> tuple[str, str]:
    """One module per expert, or one grouped module with a parameter per expert."""
    return (
        f"{mlp}experts.local_experts.{expert}.linear_{layer}.{kind}",
        f"{mlp}experts.linear_{layer}.{kind}{expert}",
    )


def _row_parallel(megatron: str, hf: str, shape: tuple[int, int], *, bias: bool) -> Iterator[Entry]:
    """A linear layer whose input is cut; its bias is added once, after the sum over ranks."""
    yield rename((f"{megatron}.weight",), f"{hf}.weight", shape, "columns")
    if bias:
        yield rename((f"{megatron}.bias",), f"{hf}.bias", shape[:1])


def _kinds(*, bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)
