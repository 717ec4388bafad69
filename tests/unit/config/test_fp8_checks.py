"""What is refused of FP8 before any GPU is touched. Sizes are those of public models."""

import pytest

from megatron_cpgd.config.checks import check_config
from megatron_cpgd.config.fp8_checks import check_fp8_sizes
from megatron_cpgd.config.load import read_config
from megatron_cpgd.config.schema import PrecisionConfig
from tests.helpers.valid_run import write_model_folder

QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 36,
}
QWEN2_HALF_B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "num_hidden_layers": 24,
}
QWEN3_30B = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 48,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_hidden_layers": 61,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
}
BLOCKWISE = "precision.train=fp8_blockwise"
ROLLOUT = "precision.rollout=fp8_block"
EXPERTS_WHOLE = "{tensor_parallel_size: 4, enable_expert_parallel: true}"
TP_8 = "{tensor_parallel_size: 8}"


def problems_of(path, model: dict, *overrides: str) -> list[str]:
    write_model_folder(path.parent / "model", **model)
    return check_config(read_config(path, overrides))


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        (QWEN3_8B, [BLOCKWISE, ROLLOUT, "parallel.tp=8"]),
        (QWEN3_8B, ["precision.train=mxfp8", "parallel.tp=8"]),
        (QWEN2_HALF_B, [BLOCKWISE]),
        (QWEN3_30B, [BLOCKWISE, ROLLOUT, "parallel.tp=4", "parallel.ep=4"]),
        (QWEN3_30B, [ROLLOUT, "rollout.engine_args={tensor_parallel_size: 2}"]),
        # 576 rows of kv_a_proj end inside a block, but nothing cuts them.
        (DEEPSEEK_V3, [BLOCKWISE, ROLLOUT, "parallel.tp=8", "parallel.ep=8"]),
        (QWEN3_30B, [ROLLOUT, f"rollout.engine_args={EXPERTS_WHOLE}"]),
        # Four KV heads for eight ranks: each holds a whole one.
        (QWEN3_30B | {"moe_intermediate_size": 1024}, [ROLLOUT, f"rollout.engine_args={TP_8}"]),
    ],
)
def test_public_models_are_accepted_where_their_sizes_fit(run_yaml, model, overrides):
    assert problems_of(run_yaml, model, *overrides) == []


@pytest.mark.parametrize(
    ("model", "overrides", "expected"),
    [
        # (14 + 2 + 2) * 64 = 1152 rows, 4.5 * 128 on each of two ranks; 4864 / 2 = 19 * 128 fit.
        (
            QWEN2_HALF_B,
            [BLOCKWISE, "parallel.tp=2"],
            [
                "self_attn.qkv_proj of {path} has 1152 rows, with parallel.tp=2 576 on each rank; "
                "FP8 needs a multiple of 128",
                "self_attn.o_proj of {path} has 896 columns, with parallel.tp=2 448 on each rank; ",
            ],
        ),
        # 768 / 4 = 192 rows of an expert's gate and columns of its down projection.
        (
            QWEN3_30B,
            [BLOCKWISE, "parallel.tp=4", "parallel.etp=4"],
            [
                "mlp.experts.gate_up_proj of {path} has 768 rows, with parallel.etp=4 192 on each",
                "mlp.experts.down_proj of {path} has 768 columns, with parallel.etp=4 192 on each",
            ],
        ),
        # Neither 1528 = 95 * 16 + 8 nor its sum with 576 may stand for the other.
        (
            DEEPSEEK_V3 | {"q_lora_rank": 1528},
            ["precision.train=fp8_tensorwise"],
            [
                "self_attn.q_a_proj, kv_a_proj of {path} has 1528 rows",
                "self_attn.q_b_proj of {path} has 1528 columns",
            ],
        ),
        # 12296 = 768 * 16 + 8 and 12304 = 384 * 32 + 16.
        (
            QWEN3_8B | {"intermediate_size": 12296},
            ["precision.train=fp8_tensorwise"],
            [
                "mlp.gate_up_proj of {path} has 12296 rows, with parallel.tp=1 12296 on each rank; "
                "FP8 needs a multiple of 16",
                "mlp.down_proj of {path} has 12296 columns",
            ],
        ),
        (
            QWEN3_8B | {"intermediate_size": 12304},
            ["precision.train=mxfp8"],
            [
                "mlp.gate_up_proj of {path} has 12304 rows, with parallel.tp=1 12304 on each rank; "
                "FP8 needs a multiple of 32",
                "mlp.down_proj of {path} has 12304 columns",
            ],
        ),
    ],
)
def test_matrices_that_fp8_training_cannot_multiply_are_named(run_yaml, model, overrides, expected):
    problems = problems_of(run_yaml, model, *overrides)
    path = run_yaml.parent / "model"
    assert len(problems) == len(expected), problems
    for problem, part in zip(problems, expected, strict=True):
        assert part.format(path=path) in problem
        assert problem.startswith("precision.train=")


@pytest.mark.parametrize(
    ("model", "tp", "expected"),
    [
        # k has 2 * 64 rows, which v follows: a block of 128 each. On two ranks 64 each.
        (QWEN2_HALF_B, 1, []),
        (
            QWEN2_HALF_B,
            2,
            [("self_attn.qkv_proj", "64, 448"), ("self_attn.o_proj", "448")],
        ),
        # gate: 4.69 * 128, so that the factors of its last rows would be those of up.
        (QWEN2_HALF_B | {"intermediate_size": 600}, 1, [("mlp.gate_up_proj", "600")]),
        (
            QWEN3_30B,
            4,
            [("mlp.experts.gate_up_proj", "192"), ("mlp.experts.down_proj", "192")],
        ),
    ],
)
def test_matrices_that_the_engine_would_scale_wrongly_are_named(run_yaml, model, tp, expected):
    engine = f"rollout.engine_args={{tensor_parallel_size: {tp}}}"
    problems = problems_of(run_yaml, model, ROLLOUT, engine)
    path = run_yaml.parent / "model"
    assert len(problems) == len(expected), problems
    for problem, (matrix, parts) in zip(problems, expected, strict=True):
        start = f"precision.rollout=fp8_block: {matrix} of {path} has parts of {parts}, with "
        assert problem.startswith(start)


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["precision.fp8_format=hybrid"], "precision.fp8_format=hybrid does nothing: precision"),
        (["precision.bf16_layers=1"], "precision.bf16_layers=1 does nothing: precision.train=bf16"),
        (
            ["precision.train=fp8_delayed", "precision.bf16_layers=1"],
            "precision.bf16_layers=1: Megatron-Core has none with precision.train=fp8_delayed",
        ),
        (
            [BLOCKWISE, "precision.bf16_layers=10", "parallel.pp=4"],
            "precision.bf16_layers=10: a pipeline stage of ",
        ),
    ],
)
def test_settings_that_do_nothing_or_do_not_fit_each_other_are_named(run_yaml, overrides, start):
    [problem] = problems_of(run_yaml, QWEN3_8B, *overrides)
    assert problem.startswith(start)


def test_latent_attention_without_a_projection_of_queries_has_one_matrix_for_them(run_yaml):
    path, config = run_yaml.parent, read_config(run_yaml, ["precision.train=fp8_tensorwise"])
    hf = DEEPSEEK_V3 | {"q_lora_rank": None}
    assert list(check_fp8_sizes(hf, path, config)) == []
    [problem] = check_fp8_sizes(hf | {"qk_rope_head_dim": 8}, path, config)
    assert "self_attn.q_a_proj, kv_a_proj" in problem and "520 rows" in problem  # 512 + 8


@pytest.mark.parametrize("setting", [BLOCKWISE, ROLLOUT])
def test_gpt_oss_is_refused(run_yaml, setting):
    model = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}
    assert f"{setting}: is not supported for gpt-oss" in str(problems_of(run_yaml, model, setting))


@pytest.mark.parametrize(
    ("settings", "recipe", "policy", "engine"),
    [
        ({}, None, "bf16", "bf16"),
        ({"train": "fp32"}, None, "fp32", "fp32"),
        ({"train": "fp32", "rollout": "bf16"}, None, "fp32", "bf16"),
        ({"train": "fp8_blockwise"}, "blockwise", "bf16", "bf16"),
        ({"train": "mxfp8", "rollout": "fp8_block"}, "mxfp8", "bf16", "fp8_block"),
    ],
)
def test_fp8_training_keeps_bf16_weights_and_the_engine_follows_them(
    settings, recipe, policy, engine
):
    precision = PrecisionConfig(**settings)
    assert (precision.recipe, precision.policy_weights, precision.engine_weights) == (
        recipe,
        policy,
        engine,
    )
