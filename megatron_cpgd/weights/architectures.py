"""The weight tables of the supported architectures, one function each.

Megatron names: megatron-core 0.19 GPTModel. HF names: the files that transformers 5 saves.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_cpgd.errors import ConversionError
from megatron_cpgd.weights.table import (
    Entry,
    Ignored,
    WeightTable,
    gated_mlp,
    qkv,
    rename,
    vocab,
)

HfConfig = Mapping[str, Any]
"""config.json, parsed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of gated MLPs, in place of the one MLP of most layers."""

    count: int
    intermediate: int
    """Of each expert."""
    dense_layers: frozenset[int] = frozenset()
    """Layers that keep a single MLP."""
    hf_block: str = "mlp"
    """Name of the block inside a layer."""
    hf_projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Names of an expert's gate, up and down projection."""
    shared_intermediate: int = 0
    """Of the MLP that sees every token beside the experts; 0: there is none."""
    score_correction: bool = False
    """Sigmoid scores, and a bias that corrects them for the choice of experts only."""
    packed: bool = False
    """One HF tensor holds the projections of all experts; they and the router have biases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Attention through low-rank projections of queries, and of keys and values together."""

    q_rank: int | None
    """None: queries have a single projection."""
    kv_rank: int
    qk_head_dim: int
    """Of the part of queries and keys without rotation."""
    rotary_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """What decides names and shapes of a decoder."""

    vocab: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each query and key head."""
    sinks: bool = False
    """A learned logit of each head that takes part in the softmax of attention."""
    latent: LatentAttention | None = None
    """In place of heads with projections of their own."""
    experts: Experts | None = None
    prediction_layers: int = 0
    """Layers behind the last one that predict further tokens; not trained, not computed."""

    @property
    def moe_layers(self) -> list[int]:
        """Places of the layers with experts."""
        if self.experts is None:
            return []
        return [i for i in range(self.layers) if i not in self.experts.dense_layers]


def llama(config: HfConfig) -> Decoder:
    """Llama 3."""
    attention_bias = bool(config.get("attention_bias", False))
    return _decoder(
        config,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def qwen2(config: HfConfig) -> Decoder:
    """Qwen2 and Qwen2.5: biases on query, key and value, always."""
    return _decoder(config, qkv_bias=True)


def qwen3(config: HfConfig) -> Decoder:
    """Qwen3: query and key norms."""
    attention_bias = bool(config.get("attention_bias", False))
    # transformers takes 128, not hidden / heads, when the file has no head_dim.
    if config.get("head_dim") is None:
        config = {**config, "head_dim": 128}
    return _decoder(config, qkv_bias=attention_bias, output_bias=attention_bias, qk_norm=True)


def qwen3_moe(config: HfConfig) -> Decoder:
    """Qwen3-MoE: Qwen3's attention; every `decoder_sparse_step`-th layer has experts."""
    attention_bias = bool(config.get("attention_bias", False))
    step = _positive({"decoder_sparse_step": 1, **config}, "decoder_sparse_step")
    dense = set(config.get("mlp_only_layers") or ())
    dense |= {i for i in range(_positive(config, "num_hidden_layers")) if (i + 1) % step}
    # The released files say num_experts; transformers 5 writes num_local_experts.
    key = "num_experts" if "num_experts" in config else "num_local_experts"
    experts = Experts(
        count=_positive(config, key),
        intermediate=_positive(config, "moe_intermediate_size"),
        dense_layers=frozenset(dense),
    )
    return _decoder(
        config, qkv_bias=attention_bias, output_bias=attention_bias, qk_norm=True, experts=experts
    )


def mixtral(config: HfConfig) -> Decoder:
    """Mixtral: experts in every layer."""
    experts = Experts(
        count=_positive(config, "num_local_experts"),
        intermediate=_positive(config, "intermediate_size"),
        hf_block="block_sparse_moe",
        hf_projections=("w1", "w3", "w2"),
    )
    return _decoder(config, experts=experts)


def glm4_moe(config: HfConfig) -> Decoder:
    """GLM-4.5: biases on query, key and value; shared experts; the first layers are dense."""
    return _decoder(
        config,
        qkv_bias=bool(config.get("attention_bias", False)),
        qk_norm=bool(config.get("use_qk_norm", False)),
        experts=_routed_experts(config),
        prediction_layers=int(config.get("num_nextn_predict_layers") or 0),
    )


def deepseek_v3(config: HfConfig) -> Decoder:
    """DeepSeek-V3: latent attention; shared experts; the first layers are dense."""
    has_q_proj = config.get("q_lora_rank", 0) is None  # transformers takes 1536 for a missing one
    return _decoder(
        config,
        qk_norm=True,
        latent=LatentAttention(
            q_rank=None if has_q_proj else _positive(config, "q_lora_rank"),
            kv_rank=_positive(config, "kv_lora_rank"),
            qk_head_dim=_positive(config, "qk_nope_head_dim"),
            rotary_dim=_positive(config, "qk_rope_head_dim"),
            v_head_dim=_positive(config, "v_head_dim"),
        ),
        experts=_routed_experts(config),
        prediction_layers=int(config.get("num_nextn_predict_layers") or 0),
    )


def gpt_oss(config: HfConfig) -> Decoder:
    """gpt-oss: attention sinks, biases everywhere; experts in every layer."""
    experts = Experts(
        count=_positive(config, "num_local_experts"),
        intermediate=_positive(config, "intermediate_size"),
        packed=True,
    )
    attention_bias = bool(config.get("attention_bias", True))
    # transformers takes 64, not hidden / heads, when the file has no head_dim.
    if config.get("head_dim") is None:
        config = {**config, "head_dim": 64}
    return _decoder(
        config, qkv_bias=attention_bias, output_bias=attention_bias, sinks=True, experts=experts
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


def _decoder(config: HfConfig, **options: Any) -> Decoder:
    heads = _positive(config, "num_attention_heads")
    kv_heads = _positive(config, "num_key_value_heads")
    hidden = _positive(config, "hidden_size")
    if heads % kv_heads:
        raise ConversionError(
            f"config.json: num_key_value_heads={kv_heads} does not divide "
            f"num_attention_heads={heads}"
        )
    has_head_dim = config.get("head_dim") is not None
    return Decoder(
        vocab=_positive(config, "vocab_size"),
        layers=_positive(config, "num_hidden_layers"),
        hidden=hidden,
        intermediate=_positive(config, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_positive(config, "head_dim") if has_head_dim else hidden // heads,
        tied=bool(config.get("tie_word_embeddings", False)),
        **options,
    )


def _routed_experts(config: HfConfig) -> Experts:
    """The experts of DeepSeek-V3 and of those that follow it."""
    intermediate = _positive(config, "moe_intermediate_size")
    return Experts(
        count=_positive(config, "n_routed_experts"),
        intermediate=intermediate,
        dense_layers=frozenset(range(_integer(config, "first_k_dense_replace", least=0))),
        shared_intermediate=intermediate * _positive(config, "n_shared_experts"),
        score_correction=True,
    )


def _positive(config: HfConfig, key: str) -> int:
    return _integer(config, key, least=1)


def _integer(config: HfConfig, key: str, *, least: int) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = "a positive integer" if least else "an integer of at least 0"
        raise ConversionError(f"config.json: {key}={value!r}, expected {kind}")
    return value
