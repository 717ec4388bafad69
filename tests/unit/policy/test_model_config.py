"""config.json -> TransformerConfig: what is taken over, and what is refused by name."""

import math
from pathlib import Path

import pytest
import torch

import megatron_cpgd.policy  # noqa: F401  before anything imports megatron
from megatron_cpgd.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_cpgd.errors import ConfigError, ConversionError
from megatron_cpgd.policy import transformer_config
from megatron_cpgd.policy.rope import rope_arguments, rope_parameters
from megatron_cpgd.policy.transformer_config import FIXED_FIELDS, build_transformer_config
from megatron_cpgd.weights.placement import padded_vocab_size

FP32 = PrecisionConfig(train="fp32")
HF = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-6,
    "vocab_size": 131,
    "rope_theta": 10000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def build(hf: dict, parallel: dict | None = None, precision=FP32, **settings):
    model, sizes = ModelConfig(path=Path("unused"), **settings), ParallelConfig(**(parallel or {}))
    return build_transformer_config(HF | hf, model, sizes, precision)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: expected silu, got gelu"),
        ({"use_sliding_window": True}, "use_sliding_window: .* not supported"),
        ({"attention_bias": True}, "attention_bias: biases of o_proj"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias: biases of o_proj"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias: biases of the MLP"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type: .*got linear"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type: .*got yarn"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}}, "low_freq_factor: .*1.0.*has 2.0"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 3.0}}, "high_freq_factor: .*4.0.*has 3.0"),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 4096}},
            "original_max_position_embeddings: .*8192.*has 4096",
        ),
    ],
)
def test_what_megatron_would_compute_differently_is_refused(hf, message):
    with pytest.raises(ConversionError, match=message):
        build(hf)


def test_all_reasons_are_named_at_once():
    with pytest.raises(ConversionError, match=r"hidden_act.*; use_sliding_window.*; rope_type"):
        build({"hidden_act": "gelu", "use_sliding_window": True, "rope_scaling": {"type": "yarn"}})


def test_a_switched_off_window_and_llama3_rope_with_upstreams_constants_are_accepted():
    build({"use_sliding_window": False, "sliding_window": 4096, "rope_scaling": LLAMA3})


def test_both_spellings_of_rope_give_the_same_settings():
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0}}
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}
    for hf in (old, new):
        found = rope_parameters(hf)
        assert (found["rope_type"], found["rope_theta"], found["factor"]) == ("llama3", 5e5, 8.0)
    assert rope_parameters({}) == {"rope_theta": 10000.0, "rope_type": "default"}


# transformers: Qwen3Config has head_dim 128 of its own; the others divide, 64 / 4 = 16.
@pytest.mark.parametrize(
    ("hf", "head_dim"),
    [
        ({}, 128),
        ({"head_dim": 32}, 32),
        ({"head_dim": None}, 128),
        ({"model_type": "qwen2"}, 16),
        ({"model_type": "llama"}, 16),
        ({"model_type": "llama", "head_dim": 24}, 24),
    ],
)
def test_head_size_defaults_as_in_transformers(hf, head_dim):
    assert build(hf).kv_channels == head_dim


def test_biases_and_query_norms_follow_the_architecture():
    switches = {
        kind: (config.add_qkv_bias, config.qk_layernorm, config.add_bias_linear)
        for kind in ("qwen2", "qwen3", "llama")
        for config in [build({"model_type": kind})]
    }
    assert switches == {
        "qwen2": (True, False, False),
        "qwen3": (False, True, False),
        "llama": (False, False, False),
    }


# 128 divides every usual TP size, so that the padded size is the same for all of them.
@pytest.mark.parametrize(
    ("vocabulary", "tp", "padded"),
    [(128, 1, 128), (129, 1, 256), (131, 2, 256), (131, 8, 256), (151936, 4, 151936), (5, 3, 384)],
)
def test_vocabulary_is_padded_to_a_multiple_of_128_and_of_tp(vocabulary, tp, padded):
    assert padded_vocab_size(vocabulary, tp) == padded


def test_the_interleaved_schedule_never_batches_its_sends():
    plain = build({}, {"pp": 2})
    interleaved = build({}, {"pp": 2, "vpp": 2})
    assert (plain.batch_p2p_comm, plain.overlap_p2p_comm) == (True, False)
    assert (interleaved.batch_p2p_comm, interleaved.overlap_p2p_comm) == (False, True)
    assert interleaved.virtual_pipeline_model_parallel_size == 2


def test_unequal_stages_reach_megatron():
    sizes = {"pp": 2, "vpp": 2, "stage_layers": [1, 3, 2, 1]}
    layout = build({"num_hidden_layers": 7}, sizes).pipeline_model_parallel_layout
    assert str(layout) == "Et|ttt|tt|tL"
    # One object, so that two models under this layout compare equal.
    assert layout is build({"num_hidden_layers": 7}, sizes).pipeline_model_parallel_layout


def test_sequence_parallel_is_off_without_tensor_parallel():
    assert build({}, {"tp": 1}).sequence_parallel is False
    assert build({}, {"tp": 2}).sequence_parallel is True
    assert build({}, {"tp": 2, "sequence_parallel": False}).sequence_parallel is False


def test_recompute_settings_become_upstreams():
    full, selective = build({}, recompute="full"), build({}, recompute="selective")
    assert (full.recompute_granularity, full.recompute_num_layers) == ("full", 1)
    assert (selective.recompute_granularity, selective.recompute_modules) == (
        "selective", ["core_attn"],
    )  # fmt: skip
    assert build({}).recompute_granularity is None


def test_fp8_keeps_bf16_parameters_and_the_router_and_head_out_of_it():
    fp8 = build({}, precision=PrecisionConfig(train="fp8_blockwise", bf16_layers=1))
    assert (fp8.fp8, fp8.fp8_recipe, fp8.fp8_param) == ("e4m3", "blockwise", False)
    assert (fp8.num_layers_at_start_in_bf16, fp8.num_layers_at_end_in_bf16) == (1, 1)
    assert (fp8.params_dtype, fp8.fp8_output_proj) == (torch.bfloat16, False)
    assert build({}).fp8 is None
    with pytest.raises(ConfigError, match="fp8_param: is set by us; use bf16 parameters"):
        build({}, megatron={"fp8_param": True})


def test_an_option_of_upstream_reaches_its_config():
    assert build({}, megatron={"deterministic_mode": True}).deterministic_mode is True


def test_unknown_and_forbidden_options_are_all_named():
    with pytest.raises(ConfigError) as raised:
        build({}, megatron={"num_layer": 3, "hidden_dropout": 0.1, "recompute_num_layers": 2})
    message = str(raised.value)
    assert "model.megatron.num_layer: unknown option" in message
    assert "model.megatron.hidden_dropout: is set by us; use a model without dropout" in message
    assert "recompute_num_layers" not in message


def test_every_field_that_we_set_is_closed_to_users_or_open_on_purpose(monkeypatch):
    choices_of_speed = {
        *transformer_config._FUSIONS,
        "attention_softmax_in_fp32",
        "gradient_accumulation_fusion",
        "moe_grouped_gemm",
        "moe_router_dtype",
        "moe_token_dispatcher_type",
        "perform_initialization",
        "recompute_method",
        "recompute_modules",
        "recompute_num_layers",
    }
    given = []

    class Recorder(transformer_config.TransformerConfig):
        def __init__(self, **fields):
            given.append(fields)

    monkeypatch.setattr(transformer_config, "TransformerConfig", Recorder)
    for recompute in ("none", "selective", "full"):
        for hf in ({}, GPT_OSS):
            build(hf, recompute=recompute)
            assert given.pop().keys() <= FIXED_FIELDS.keys() | choices_of_speed


MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "mlp_only_layers": [1],
}


def test_the_router_is_that_of_the_config_file_and_aux_loss_is_off():
    config = build(MOE | {"norm_topk_prob": True, "router_aux_loss_coef": 0.001})
    assert config.num_moe_experts == 6 and config.moe_router_topk == 2
    assert config.moe_ffn_hidden_size == 8 and config.moe_layer_freq == [1, 0, 1, 1]
    assert config.moe_router_pre_softmax is False  # the chosen ones sum to 1
    assert config.moe_router_load_balancing_type == "none" and config.moe_aux_loss_coeff == 0
    assert build(MOE).moe_router_pre_softmax is True


def test_the_expert_layout_reaches_megatron():
    config = build(MOE, {"tp": 2, "dp": 4, "ep": 2, "etp": 2})
    assert config.expert_model_parallel_size == 2 and config.expert_tensor_parallel_size == 2
    assert build(MOE, {"tp": 2}).expert_tensor_parallel_size == 1


GLM = {
    "model_type": "glm4_moe",
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "head_dim": 16,
}


def test_glm_rotates_half_of_each_head_unless_the_config_says_otherwise():
    assert rope_arguments(GLM)["rotary_percent"] == 0.5
    assert rope_arguments(GLM | {"partial_rotary_factor": 0.25})["rotary_percent"] == 0.25
    new = {"rope_parameters": {"partial_rotary_factor": 0.75}}
    assert rope_arguments(GLM | new)["rotary_percent"] == 0.75
    assert rope_arguments(HF)["rotary_percent"] == 1.0


def test_a_corrected_router_has_sigmoid_scores_a_frozen_bias_and_shared_experts():
    config = build(GLM | {"n_group": 4, "topk_group": 2})
    assert config.moe_router_score_function == "sigmoid"
    assert config.moe_router_enable_expert_bias and config.moe_router_bias_update_rate == 0
    assert config.moe_router_topk_scaling_factor == 1.5
    assert (config.moe_router_num_groups, config.moe_router_group_topk) == (4, 2)
    assert config.moe_shared_expert_intermediate_size == 16  # 2 of 8
    assert config.moe_layer_freq == [0, 1, 1, 1]
    assert build(GLM | {"n_group": 1}).moe_router_num_groups is None


DEEPSEEK = GLM | {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def test_latent_attention_has_its_own_fields_and_rope():
    config = build(DEEPSEEK)
    ranks = (config.q_lora_rank, config.kv_lora_rank)
    assert config.multi_latent_attention and ranks == (20, 24)
    heads = (config.qk_head_dim, config.qk_pos_emb_head_dim, config.v_head_dim)
    assert heads == (16, 8, 12)
    assert (config.rope_type, config.rotary_base) == ("rope", 10000.0)
    assert build(DEEPSEEK | {"q_lora_rank": None}).q_lora_rank is None
    config = build(DEEPSEEK | {"rope_scaling": YARN_ROPE})
    assert (config.rope_type, config.rotary_scaling_factor) == ("yarn", 40.0)
    assert (config.mscale, config.mscale_all_dim) == (1.0, 1.0)
    assert not build({}).multi_latent_attention


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_lora_rank": 0}, "q_lora_rank=0, expected a positive integer"),
        ({"attention_bias": True}, "attention_bias: biases of latent attention"),
        ({"rope_interleave": False}, "rope_interleave: expected true"),
        ({"rope_scaling": LLAMA3}, "rope_type: expected default or yarn, got llama3"),
        ({"rope_scaling": YARN_ROPE | {"mscale_all_dim": 0}}, "yarn mscale_all_dim: is missing"),
        ({"rope_scaling": YARN_ROPE | {"truncate": False}}, "yarn attention_factor, truncate"),
    ],
)
def test_latent_attention_that_megatron_would_compute_differently_is_refused(change, message):
    with pytest.raises(ConversionError, match=message):
        build(DEEPSEEK | change)


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        (GLM | {"norm_topk_prob": False}, "norm_topk_prob, .*expected true"),
        (GLM | {"num_experts_per_tok": 1}, "num_experts_per_tok: expected .* at least 2"),
        (GLM | {"n_group": 4, "topk_group": 1}, "topk_group: .* 4 / 1 best experts, the model by"),
        (GLM | {"num_experts_per_tok": 0} | {"n_group": 2}, "topk_group: is missing"),
        ({"model_type": "mixtral", "num_local_experts": 4}, "num_experts_per_tok: is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: rotating a part"),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
            | {"sliding_window": 8},
            "sliding_window: .* not supported",
        ),
    ],
)
def test_a_router_or_rotation_that_megatron_would_compute_differently_is_refused(hf, message):
    with pytest.raises(ConversionError, match=message):
        build(hf)


GPT_OSS = {
    "model_type": "gpt_oss",
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
}


def test_gpt_oss_has_sinks_biases_windows_on_even_layers_and_a_clamped_activation():
    config = build(GPT_OSS)
    assert (config.softmax_type, config.add_bias_linear) == ("learnable", True)
    assert config.window_size == (127, 0)  # 128 tokens with the query's own
    assert config.window_attn_skip_freq == [1, 0, 1, 0]
    assert (config.activation_func_clamp_value, config.glu_linear_offset) == (7.0, 1.0)
    value = config.activation_func(torch.tensor(2.0))
    assert value == pytest.approx(2 / (1 + math.exp(-1.702 * 2)))
    assert config.moe_router_pre_softmax is False  # softmax over the chosen
    full = build(GPT_OSS | {"layer_types": ["full_attention"] * 4, "sliding_window": None})
    assert full.window_size is None
    assert build(GPT_OSS, {"tp": 2, "dp": 2, "etp": 2}).expert_tensor_parallel_size == 2


def test_yarn_of_gpt_oss_has_no_rounding_and_the_factor_of_its_paper():
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn

    config = build(GPT_OSS)
    assert rope_arguments(HF | GPT_OSS)["position_embedding_type"] == "yarn"
    assert rope_arguments(HF | GPT_OSS)["rotary_base"] == 150000.0
    assert config.yarn_correction_range_round_to_int is False
    # arXiv:2309.00071: 0.1 * ln(factor) + 1
    factor = yarn._yarn_get_concentration_factor_from_config(config)
    assert factor == pytest.approx(0.1 * math.log(32.0) + 1)
    plain = {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert rope_arguments(HF | GPT_OSS | plain)["position_embedding_type"] == "rope"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": False}, "attention_bias: expected true"),
        ({"swiglu_limit": 6.0}, "swiglu_limit: expected 7.0, got 6.0"),
        ({"layer_types": ["full_attention"]}, "layer_types: expected 4 of"),
        ({"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "layer_types: "),
        ({"sliding_window": None}, "sliding_window: expected a positive integer, got None"),
        ({"rope_scaling": None}, "rope_parameters, rope_theta: expected both"),
        ({"rope_scaling": YARN_ROPE | {"factor": None}}, "yarn factor: is missing or 0"),
        ({"rope_scaling": YARN_ROPE | {"attention_factor": 1.2}}, "attention_factor: is not"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type: .*got linear"),
    ],
)
def test_a_gpt_oss_that_megatron_would_compute_differently_is_refused(change, message):
    with pytest.raises(ConversionError, match=message):
        build(GPT_OSS | change)


def test_on_a_gpu_what_is_computed_element_by_element_is_fused_where_upstream_does_it_right(
    monkeypatch,
):
    given = []

    class Recorder(transformer_config.TransformerConfig):
        def __init__(self, **fields):
            given.append(fields)
            super().__init__(**(fields | dict.fromkeys(transformer_config._FUSIONS, False)))

    monkeypatch.setattr(transformer_config, "TransformerConfig", Recorder)
    monkeypatch.setattr(transformer_config.torch.cuda, "is_available", lambda: True)
    build({})
    build(GPT_OSS)
    dense, gpt_oss = given
    assert (dense["apply_rope_fusion"], dense["bias_activation_fusion"]) == (True, True)
    assert (gpt_oss["apply_rope_fusion"], gpt_oss["bias_activation_fusion"]) == (False, False)
    assert (dense["moe_permute_fusion"], gpt_oss["moe_permute_fusion"]) == (False, True)


# Its kernel for packed batches takes no factor: log-probs would be wrong without a word.
def test_fused_rotary_embeddings_are_refused_with_yarn(monkeypatch):
    class Unchecked(transformer_config.TransformerConfig):
        def __post_init__(self):  # would ask for Transformer Engine
            pass

    monkeypatch.setattr(transformer_config, "TransformerConfig", Unchecked)
    with pytest.raises(ConfigError, match=r"apply_rope_fusion: the fused kernel leaves out YaRN"):
        build(GPT_OSS, megatron={"apply_rope_fusion": True})
