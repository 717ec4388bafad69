"""Hugging Face config -> Megatron TransformerConfig."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_cpgd.config.checks import check_passthrough
from megatron_cpgd.config.schema import (
    ExperimentConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
)
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.policy.fp8 import fp8_fields
from megatron_cpgd.policy.rope import rope_arguments, rope_parameters, yarn_attributes
from megatron_cpgd.policy.supported import check_supported, layer_types
from megatron_cpgd.weights.decoder import Decoder, Experts
from megatron_cpgd.weights.registry import read_decoder

# Upstream's fusions; off on a CPU, where most of them do not exist.
_FUSIONS = ("bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion",
            "persist_layer_norm", "apply_rope_fusion", "moe_permute_fusion")  # fmt: skip

# What the model path, the layout and the precision already determine.
FIXED_FIELDS = {
    "num_layers": "model.path",
    "hidden_size": "model.path",
    "num_attention_heads": "model.path",
    "num_query_groups": "model.path",
    "kv_channels": "model.path",
    "ffn_hidden_size": "model.path",
    "layernorm_epsilon": "model.path",
    "normalization": "model.path",
    "gated_linear_unit": "model.path",
    "activation_func": "model.path",
    "activation_func_clamp_value": "model.path",
    "glu_linear_offset": "model.path",
    "softmax_type": "model.path",
    "window_size": "model.path",
    "window_attn_skip_freq": "model.path",
    "add_bias_linear": "model.path",
    "add_qkv_bias": "model.path",
    "qk_layernorm": "model.path",
    "multi_latent_attention": "model.path",
    "q_lora_rank": "model.path",
    "kv_lora_rank": "model.path",
    "qk_head_dim": "model.path",
    "qk_pos_emb_head_dim": "model.path",
    "v_head_dim": "model.path",
    "rope_type": "model.path",
    "rotary_base": "model.path",
    "rotary_percent": "model.path",
    "rotary_scaling_factor": "model.path",
    "original_max_position_embeddings": "model.path",
    "beta_fast": "model.path",
    "beta_slow": "model.path",
    "mscale": "model.path",
    "mscale_all_dim": "model.path",
    "num_moe_experts": "model.path",
    "moe_ffn_hidden_size": "model.path",
    "moe_layer_freq": "model.path",
    "moe_router_topk": "model.path",
    "moe_enable_routing_replay": "algorithm.routing_replay",
    "moe_router_pre_softmax": "model.path",
    "moe_shared_expert_intermediate_size": "model.path",
    "moe_router_score_function": "model.path",
    "moe_router_enable_expert_bias": "model.path",
    "moe_router_topk_scaling_factor": "model.path",
    "moe_router_num_groups": "model.path",
    "moe_router_group_topk": "model.path",
    "moe_router_bias_update_rate": "router.bias_update_rate",
    "moe_aux_loss_coeff": "router.aux_loss_coef",
    "moe_z_loss_coeff": "router.z_loss_coef",
    "moe_router_load_balancing_type": "router.aux_loss_coef",
    "moe_expert_capacity_factor": "no capacity (a dropped token's log-prob depends on its batch)",
    "moe_input_jitter_eps": "no jitter (old and new log-probs come from one function)",
    "expert_model_parallel_size": "parallel.ep",
    "expert_tensor_parallel_size": "parallel.etp",
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "virtual_pipeline_model_parallel_size": "parallel.vpp",
    "pipeline_model_parallel_layout": "parallel.stage_layers",
    "num_layers_in_first_pipeline_stage": "parallel.stage_layers",
    "num_layers_in_last_pipeline_stage": "parallel.stage_layers",
    "account_for_embedding_in_pipeline_split": "parallel.stage_layers",
    "account_for_loss_in_pipeline_split": "parallel.stage_layers",
    "context_parallel_size": "parallel.cp",
    "sequence_parallel": "parallel.sequence_parallel",
    "params_dtype": "precision.train",
    "pipeline_dtype": "precision.train",
    "bf16": "precision.train",
    "fp16": "precision.train",
    "fp8": "precision.train",
    "fp8_recipe": "precision.train",
    "fp8_param": "bf16 parameters (FP8 ones gave NaN after a refit, NVIDIA-NeMo/RL#1164)",
    "fp4": "no such recipe",
    "first_last_layers_bf16": "precision.bf16_layers",
    "num_layers_at_start_in_bf16": "precision.bf16_layers",
    "num_layers_at_end_in_bf16": "precision.bf16_layers",
    "recompute_granularity": "model.recompute",
    "hidden_dropout": "a model without dropout (old and new log-probs come from one function)",
    "attention_dropout": "a model without dropout (old and new log-probs come from one function)",
    "calculate_per_token_loss": "no such scaling (the loss has its own global denominators)",
    "variable_seq_lengths": "equal lengths (micro-batches of a pipeline have one shape)",
    "overlap_p2p_comm": "parallel.vpp",
    "batch_p2p_comm": "parallel.vpp",
}


def torch_dtype(precision: str) -> torch.dtype:
    """The dtype of `bf16` or `fp32`."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def build_transformer_config(
    hf: dict[str, Any], model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig
) -> TransformerConfig:
    """Megatron's description of the model in a Hugging Face config.json.

    Args:
        hf: parsed config.json of a supported model.

    Raises:
        ConfigError: wrong options in `model.megatron`.
        ConversionError: the config asks for something that Megatron would compute differently.
    """
    decoder = read_decoder(hf)
    config_class = TransformerConfig if decoder.latent is None else MLATransformerConfig
    _check_megatron_options(model, config_class)
    check_supported(hf, decoder)
    dtype = torch_dtype(precision.policy_weights)
    interleaved = parallel.vpp > 1
    fields: dict[str, Any] = {
        "num_layers": decoder.layers,
        "hidden_size": decoder.hidden,
        "num_attention_heads": decoder.heads,
        "num_query_groups": decoder.kv_heads,
        "kv_channels": decoder.head_dim,
        "ffn_hidden_size": decoder.intermediate,
        "layernorm_epsilon": hf["rms_norm_eps"],
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": decoder.qkv_bias,
        "qk_layernorm": decoder.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if interleaved else None,
        "pipeline_model_parallel_layout": _stages(parallel),
        "context_parallel_size": parallel.cp,
        "sequence_parallel": parallel.sequence_parallel and parallel.tp > 1,
        # With the interleaved schedule two sends to one rank would be matched by order alone and
        # exchange their contents silently, on gloo and on NCCL.
        "batch_p2p_comm": not interleaved,
        "overlap_p2p_comm": interleaved,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "perform_initialization": False,  # every parameter is loaded
        "gradient_accumulation_fusion": _has_apex_gradient_fusion(),
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": 1,  # set below
        **fp8_fields(precision),
        **_recompute_fields(model.recompute),
        **_expert_fields(hf, decoder),
        **_gpt_oss_fields(hf, decoder, parallel),
        **_latent_fields(hf, decoder),
        **_fusion_fields(hf, decoder),
    }
    try:
        config = config_class(**(fields | model.megatron))
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"Megatron-Core refuses model.megatron={model.megatron} with this model and layout: "
            f"{error}"
        ) from error
    # Upstream refuses biases of experts with etp > 1; policy/expert_bias.py makes them right.
    config.expert_tensor_parallel_size = parallel.etp
    for name, value in yarn_attributes(hf).items():
        setattr(config, name, value)
    if config.apply_rope_fusion and yarn_attributes(hf):
        raise ConfigError(
            "model.megatron.apply_rope_fusion: the fused kernel leaves out YaRN's scale in packed "
            "batches without a word; remove it"
        )
    return config


def computation(hf: dict[str, Any], config: ExperimentConfig) -> dict[str, Any]:
    """All that the logits depend on beside the weights, by Megatron's names.

    Args:
        hf: parsed config.json; two that agree here are one architecture.
    """
    transformer = build_transformer_config(hf, config.model, config.parallel, config.precision)
    # Functions, e.g. of the unused initialisation, are made anew for every config.
    numbers = {name: value for name, value in vars(transformer).items() if not callable(value)}
    own = {"vocab_size": hf["vocab_size"], "tied": hf.get("tie_word_embeddings", False)}
    return numbers | own | rope_arguments(hf)


def _expert_fields(hf: dict[str, Any], decoder: Decoder) -> dict[str, Any]:
    experts = decoder.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.intermediate,
        "moe_layer_freq": [int(i not in experts.dense_layers) for i in range(decoder.layers)],
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": torch.cuda.is_available(),
        **_router_fields(hf, experts),
    }


def _gpt_oss_fields(
    hf: dict[str, Any], decoder: Decoder, parallel: ParallelConfig
) -> dict[str, Any]:
    """Sinks, windows, biases and the clamped, gated activation."""
    if hf["model_type"] != "gpt_oss":
        return {}
    fields = {
        "softmax_type": "learnable",
        "add_bias_linear": True,
        "activation_func": quick_gelu,  # x * sigmoid(1.702 * x)
        "activation_func_clamp_value": 7.0,
        "glu_linear_offset": 1.0,
    }
    windowed = [int(kind == "sliding_attention") for kind in layer_types(hf)]
    if any(windowed):
        # A token sees itself and as many before it as the first number says.
        fields["window_size"] = (hf["sliding_window"] - 1, 0)
        fields["window_attn_skip_freq"] = windowed
    if torch.cuda.is_available() and parallel.cp > 1:
        fields["cp_comm_type"] = "a2a"  # all that Transformer Engine has for sinks
    return fields


def _latent_fields(hf: dict[str, Any], decoder: Decoder) -> dict[str, Any]:
    latent, rope = decoder.latent, rope_parameters(hf)
    if latent is None:
        return {}
    fields = {
        "multi_latent_attention": True,
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": latent.qk_head_dim,
        "qk_pos_emb_head_dim": latent.rotary_dim,
        "v_head_dim": latent.v_head_dim,
        "rope_type": "rope",
        "rotary_base": rope["rope_theta"],
        "rotary_scaling_factor": 1.0,
    }
    if rope["rope_type"] == "yarn":
        original = rope["original_max_position_embeddings"]
        fields |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": rope["factor"],
            "original_max_position_embeddings": original,
            "beta_fast": rope.get("beta_fast") or 32,
            "beta_slow": rope.get("beta_slow") or 1,
            "mscale": rope["mscale"],
            "mscale_all_dim": rope["mscale_all_dim"],
        }
    return fields


def _fusion_fields(hf: dict[str, Any], decoder: Decoder) -> dict[str, bool]:
    """Kernels that do several elementwise steps at once, for less time and fewer activations."""
    if not torch.cuda.is_available():
        return dict.fromkeys(_FUSIONS, False)
    return {
        "bias_activation_fusion": hf["model_type"] != "gpt_oss",
        "bias_dropout_fusion": True,
        # Latent attention turns interleaved pairs, for which there is no such kernel.
        "apply_rope_fusion": decoder.latent is None and not yarn_attributes(hf),
        "moe_permute_fusion": decoder.experts is not None,
    }


def _router_fields(hf: dict[str, Any], experts: Experts) -> dict[str, Any]:
    """How the scores of the experts come about."""
    if not experts.score_correction:
        # Softmax over the chosen experts is softmax over all of them, normalised afterwards.
        always = hf["model_type"] in ("gpt_oss", "mixtral")
        normalised = always or hf.get("norm_topk_prob", False)
        return {"moe_router_pre_softmax": not normalised}
    groups = hf.get("n_group") or 1
    return {
        "moe_shared_expert_intermediate_size": experts.shared_intermediate,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,  # policy/router_balance.py has its own
        "moe_router_topk_scaling_factor": hf["routed_scaling_factor"],
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": hf["topk_group"] if groups > 1 else None,
    }


def _stages(parallel: ParallelConfig) -> str | None:
    """Upstream's spelling of unequal stages: embedding, layers and loss, as in "Ett|ttt|tL"."""
    if parallel.stage_layers is None:
        return None
    return f"E{'|'.join('t' * count for count in parallel.stage_layers)}L"


def _recompute_fields(recompute: str) -> dict[str, Any]:
    if recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _has_apex_gradient_fusion() -> bool:
    """Whether NVIDIA apex's extension is installed (PyPI's `apex` is another package)."""
    if not torch.cuda.is_available():
        return False
    try:
        import fused_weight_gradient_mlp_cuda  # noqa: F401
    except ImportError:
        return False
    return True


def _check_megatron_options(model: ModelConfig, config_class: type[TransformerConfig]) -> None:
    allowed = {field.name for field in dataclasses.fields(config_class)}
    problems = check_passthrough(model.megatron, allowed, FIXED_FIELDS, "model.megatron")
    if problems:
        raise ConfigError("\n  ".join(["wrong settings:", *problems]))
