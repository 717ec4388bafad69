"""config.json of the supported architectures -> decoder, one function each."""

from collections.abc import Mapping
from typing import Any

from megatron_cpgd.errors import ConversionError
from megatron_cpgd.weights.decoder import Decoder, Experts, LatentAttention

HfConfig = Mapping[str, Any]
"""config.json, parsed."""


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
