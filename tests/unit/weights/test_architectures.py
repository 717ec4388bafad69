"""The tables against what transformers saves and what Megatron-Core builds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import megatron_cpgd.policy  # noqa: F401  before anything imports megatron
from megatron_cpgd.config.model_folder import CORRECTION_BIAS
from megatron_cpgd.errors import ConversionError
from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
from megatron_cpgd.weights.registry import read_decoder, weight_table

BASE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "vocab_size": 37,
}
QWEN3_MOE = {"num_experts": 5, "moe_intermediate_size": 12, "head_dim": 12}
GLM4_MOE = {
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 12,
    "head_dim": 12,
    "attention_bias": True,
}
GPT_OSS = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 12}
DEEPSEEK_V3 = {
    "num_key_value_heads": 6,
    "q_lora_rank": 10,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 9,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
}
MODELS = {
    "llama": (LlamaConfig, {}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama-attention-bias": (LlamaConfig, {"attention_bias": True}),
    "llama-mlp-bias": (LlamaConfig, {"mlp_bias": True}),
    "llama-head-dim": (LlamaConfig, {"head_dim": 12}),
    "llama-mha": (LlamaConfig, {"num_key_value_heads": 6}),
    "deepseek-v3": (DeepseekV3Config, DEEPSEEK_V3),
    "deepseek-v3-plain-queries": (DeepseekV3Config, DEEPSEEK_V3 | {"q_lora_rank": None}),
    "glm4-moe": (Glm4MoeConfig, GLM4_MOE),
    "glm4-moe-qk-norm": (Glm4MoeConfig, GLM4_MOE | {"use_qk_norm": True}),
    "gpt-oss": (GptOssConfig, GPT_OSS),
    "mixtral": (MixtralConfig, {"num_local_experts": 3}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-tied": (Qwen2Config, {"tie_word_embeddings": True, "num_hidden_layers": 3}),
    "qwen2-one-kv-head": (Qwen2Config, {"num_key_value_heads": 1}),
    "qwen3": (Qwen3Config, {}),
    "qwen3-tied": (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 12}),
    "qwen3-attention-bias": (Qwen3Config, {"attention_bias": True, "head_dim": 12}),
    "qwen3-moe": (Qwen3MoeConfig, QWEN3_MOE),
    "qwen3-moe-mixed": (Qwen3MoeConfig, QWEN3_MOE | {"decoder_sparse_step": 2}),
    "qwen3-moe-tied": (Qwen3MoeConfig, QWEN3_MOE | {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("model", MODELS)
def test_table_has_exactly_the_tensors_that_transformers_saves(model: str, tmp_path: Path) -> None:
    config_class, options = MODELS[model]
    AutoModelForCausalLM.from_config(config_class(**BASE | options)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    table = weight_table(config)
    table.check_tiling()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert table.hf_shapes == saved
    with HfCheckpoint.open(tmp_path) as checkpoint:
        checkpoint.check(table)


@pytest.mark.parametrize("model", MODELS)
def test_the_settings_know_whether_routers_have_a_selection_bias(model: str) -> None:
    config_class, options = MODELS[model]
    hf = config_class(**BASE | options).to_dict()
    experts = read_decoder(hf).experts
    assert (hf["model_type"] in CORRECTION_BIAS) == bool(experts and experts.score_correction)


def test_tensors_come_in_layer_order() -> None:
    names = list(weight_table({"model_type": "qwen2", **BASE}).hf_shapes)
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in names[1:-2]]
    # 2 layers of 2 norms, 3 qkv weights, 3 qkv biases, o, gate, up, down.
    assert layers == [0] * 12 + [1] * 12


def test_both_layer_specs_lead_to_the_same_entry() -> None:
    table = weight_table({"model_type": "qwen3", **BASE})
    layer = "decoder.layers.1."
    for local, fused, hf in (
        ("input_layernorm", "self_attention.linear_qkv.layer_norm", "input_layernorm"),
        ("pre_mlp_layernorm", "mlp.linear_fc1.layer_norm", "post_attention_layernorm"),
    ):
        entry = table.entry(f"{layer}{local}.weight")
        assert table.entry(f"{layer}{fused}_weight") is entry
        assert [segment.hf for segment in entry.segments] == [f"model.layers.1.{hf}.weight"]


def test_an_expert_is_cut_by_itself_and_both_layer_specs_name_it() -> None:
    table = weight_table({"model_type": "qwen3_moe", **BASE, **QWEN3_MOE})
    experts = "decoder.layers.1.mlp.experts."
    for linear, hf in (("linear_fc1", ["gate", "up"]), ("linear_fc2", ["down"])):
        entry = table.entry(f"{experts}local_experts.4.{linear}.weight")
        assert table.entry(f"{experts}{linear}.weight4") is entry
        names = [f"model.layers.1.mlp.experts.4.{part}_proj.weight" for part in hf]
        assert [segment.hf for segment in entry.segments] == names
        assert entry.expert and entry.split != "replicated"
    router = table.entry("decoder.layers.1.mlp.router.weight")
    assert not router.expert and router.split == "replicated"


def test_an_expert_of_gpt_oss_lies_transposed_in_the_tensor_of_all() -> None:
    table = weight_table({"model_type": "gpt_oss", **BASE, **GPT_OSS})
    experts, hf = "decoder.layers.1.mlp.experts.", "model.layers.1.mlp.experts."
    assert table.hf_shapes[f"{hf}gate_up_proj"] == (3, 48, 40)
    assert table.hf_shapes[f"{hf}down_proj"] == (3, 20, 48)
    for linear, name, rows in (("linear_fc1", "gate_up", 40), ("linear_fc2", "down", 48)):
        entry = table.entry(f"{experts}local_experts.2.{linear}.bias")
        assert table.entry(f"{experts}{linear}.bias2") is entry
        assert entry.shape == (rows,) and entry.expert
        assert {segment.hf for segment in entry.segments} == {f"{hf}{name}_proj_bias"}
    # The bias of the second layer counts once among ranks that share an expert.
    assert table.entry(f"{experts}local_experts.2.linear_fc1.bias").split == "rows"
    assert table.entry(f"{experts}local_experts.2.linear_fc2.bias").split == "replicated"


# transformers: layer i has experts if i is not named and step divides i + 1.
@pytest.mark.parametrize(
    ("options", "dense"),
    [({}, []), ({"decoder_sparse_step": 3}, [0, 1, 3]), ({"mlp_only_layers": [2]}, [2])],
)
def test_dense_layers_of_qwen3_moe_are_those_of_transformers(options, dense) -> None:
    config = {"model_type": "qwen3_moe", **BASE, **QWEN3_MOE, "num_hidden_layers": 4} | options
    table = weight_table(config)
    plain = [i for i in range(4) if f"model.layers.{i}.mlp.up_proj.weight" in table.hf_shapes]
    assert plain == dense


def test_the_bias_of_a_router_stays_in_float32() -> None:
    table = weight_table({"model_type": "glm4_moe", **BASE, **GLM4_MOE})
    dtypes = {name: dtype for name, (dtype, _) in table.hf_tensors(torch.bfloat16).items()}
    fp32 = [name for name, dtype in dtypes.items() if dtype is torch.float32]
    assert fp32 == ["model.layers.1.mlp.gate.e_score_correction_bias"]  # layer 0 is dense


def test_layers_that_predict_further_tokens_are_carried_over() -> None:
    config = {"model_type": "glm4_moe", **BASE, **GLM4_MOE, "num_nextn_predict_layers": 1}
    table = weight_table(config)  # layers 0 and 1, and layer 2 behind them
    ignored = table.find_ignored("model.layers.2.eh_proj.weight")
    assert ignored is not None and ignored.carried and ignored.copy_of is None
    for name, original in {
        "embed_tokens.weight": "model.embed_tokens.weight",
        "shared_head.head.weight": "lm_head.weight",
    }.items():
        ignored = table.find_ignored(f"model.layers.2.{name}")
        assert ignored is not None and ignored.carried and ignored.copy_of == original
    assert table.find_ignored("model.layers.3.eh_proj.weight") is None
    del config["num_nextn_predict_layers"]
    assert weight_table(config).find_ignored("model.layers.2.eh_proj.weight") is None


def test_a_tied_head_is_an_alias_of_the_embedding() -> None:
    config = {"model_type": "qwen2", **BASE, "tie_word_embeddings": True}
    table = weight_table(config)
    head = table.entry("output_layer.weight")
    assert head.alias and head.segments[0].hf == "model.embed_tokens.weight"
    assert table.find_ignored("lm_head.weight")
    untied = weight_table(config | {"tie_word_embeddings": False})
    assert not untied.entry("output_layer.weight").alias
    assert untied.find_ignored("lm_head.weight") is None


def test_a_missing_head_dim_means_what_transformers_takes_it_for() -> None:
    # hidden 48 / 6 heads = 8 for Llama and Qwen2, but 128 for Qwen3 and 64 for gpt-oss
    for model_type, config_class, rows in (
        ("llama", LlamaConfig, 6 * 8),
        ("qwen2", Qwen2Config, 6 * 8),
        ("qwen3", Qwen3Config, 6 * 128),
        ("gpt_oss", GptOssConfig, 6 * 64),
    ):
        table = weight_table({"model_type": model_type, "num_local_experts": 1, **BASE})
        name = "model.layers.0.self_attn.q_proj.weight"
        model = AutoModelForCausalLM.from_config(config_class(**BASE))
        assert table.hf_shapes[name] == tuple(model.get_parameter(name).shape) == (rows, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mamba"},
            "model_type='mamba' is not supported.*gpt_oss, llama, mixtral, qwen2, qwen3, ",
        ),
        ({"model_type": None}, "model_type=None"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised checkpoints"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantised checkpoints"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4 does not divide.*=6"),
        ({"num_key_value_heads": None}, "num_key_value_heads=None, expected a positive integer"),
        ({"vocab_size": "37"}, "vocab_size='37'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"model_type": "glm4_moe", **GLM4_MOE, "first_k_dense_replace": None}, "at least 0"),
    ],
)
def test_an_unsupported_config_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        weight_table({"model_type": "llama", **BASE, **change})


MEGATRON_OPTIONS = {
    "llama": {},
    "llama-mlp-bias": {"add_bias_linear": True},
    "qwen2-tied": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True, "kv_channels": 128},
    "glm4-moe": {
        "add_qkv_bias": True,
        "kv_channels": 12,
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 12,
        "moe_layer_freq": [0, 1],
        "moe_shared_expert_intermediate_size": 24,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    "gpt-oss": {
        "kv_channels": 12,
        "num_moe_experts": 3,
        "moe_ffn_hidden_size": 20,
        "add_bias_linear": True,
        "softmax_type": "learnable",
    },
    "qwen3-moe-mixed": {
        "qk_layernorm": True,
        "kv_channels": 12,
        "num_moe_experts": 5,
        "moe_ffn_hidden_size": 12,
        "moe_layer_freq": [0, 1],
    },
}
"""What the entries of MODELS mean for Megatron-Core."""


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Megatron's groups of a single process."""
    from megatron.core import parallel_state

    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("model", MEGATRON_OPTIONS)
def test_every_megatron_parameter_has_one_entry_of_its_shape(model: str, one_rank: None) -> None:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import TransformerConfig

    config_class, options = MODELS[model]
    config = config_class(**BASE | options).to_dict()
    if model == "llama-mlp-bias":
        # Megatron has one switch for the biases of attention and MLP.
        config["attention_bias"] = True
    table = weight_table(config)
    settings = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "ffn_hidden_size": 20,
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "use_cpu_initialization": True,
    }
    transformer = TransformerConfig(**settings | MEGATRON_OPTIONS[model])
    megatron = GPTModel(
        config=transformer,
        transformer_layer_spec=get_gpt_decoder_block_spec(
            transformer, use_transformer_engine=False, normalization="RMSNorm"
        ),
        vocab_size=40,  # 37 words and 3 rows of padding
        max_sequence_length=16,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=table.entry("output_layer.weight").alias,
    )
    seen = []
    buffers = [item for item in megatron.named_buffers() if item[0] in megatron.state_dict()]
    for name, parameter in [*megatron.named_parameters(), *buffers]:
        entry = table.entry(name)
        seen.append(entry.name)
        assert entry.fp32 == name.endswith(".expert_bias")
        rows = 40 if entry.padded else entry.shape[0]
        assert tuple(parameter.shape) == (rows, *entry.shape[1:]), name
        if name.endswith("softmax_offset"):
            continue  # upstream does not say that it is cut
        assert getattr(parameter, "tensor_model_parallel", False) == (entry.split != "replicated")
        if entry.split != "replicated":
            assert parameter.partition_dim == {"rows": 0, "columns": 1}[entry.split], name
            assert parameter.partition_stride == entry.stride, name
    assert sorted(seen) == sorted(entry.name for entry in table.entries if not entry.alias)
