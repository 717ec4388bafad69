import json

import pytest

from megatron_cpgd.config.load import load_config, read_config
from megatron_cpgd.config.model_folder import check_model_folder
from megatron_cpgd.errors import ConfigError
from tests.helpers.valid_run import MODEL, write_model_folder


@pytest.fixture
def check(run_yaml):
    """Problems of the model folder after changes to its config.json and to the settings."""

    def run(*overrides: str, **changes):
        write_model_folder(run_yaml.parent / "model", **changes)
        return check_model_folder(read_config(run_yaml, overrides))

    return run


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_the_supported_architectures_are_accepted(check, model_type):
    name = f"{model_type.capitalize()}ForCausalLM"
    assert check(model_type=model_type, architectures=[name]) == []
    assert check(model_type=model_type, architectures=None) == []


def test_a_tensor_parallel_size_that_does_not_divide_the_heads_lists_those_that_do(check):
    assert check("parallel.tp=4") == []
    # heads 8, KV heads 4: both are divided by 1, 2 and 4; 8 divides the heads only.
    (problem,) = check("parallel.tp=8")
    assert "parallel.tp=8 does not divide num_key_value_heads=4 of " in problem
    assert problem.endswith("use 1, 2 or 4")
    assert len(check("parallel.tp=3")) == 2
    # 3 and 6 divide only the heads, 8 only the KV heads.
    problems = check("parallel.tp=5", num_attention_heads=12, num_key_value_heads=8)
    assert [problem.rpartition("; ")[2] for problem in problems] == ["use 1, 2 or 4"] * 2


def test_without_kv_heads_every_head_has_its_own(check):
    assert check("parallel.tp=8", num_key_value_heads=None) == []


def test_pipeline_stages_and_chunks_divide_the_layers(check):
    assert check("parallel.pp=3", "parallel.vpp=2") == []
    (problem,) = check("parallel.pp=2", "parallel.vpp=2")
    assert "parallel.pp=2 * vpp=2 = 4 does not divide num_hidden_layers=6" in problem
    assert "use a product of 1, 2, 3 or 6, or say in parallel.stage_layers" in problem


def test_unequal_stages_hold_all_layers(check):
    assert check("parallel.pp=4", "parallel.stage_layers=[1,2,2,1]") == []
    (problem,) = check("parallel.pp=4", "parallel.stage_layers=[1,2,2,2]")
    assert "parallel.stage_layers=[1, 2, 2, 2] are 7 layers, but num_hidden_layers=6" in problem


EXPERTS = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 6,
    "moe_intermediate_size": 8,
}


@pytest.mark.parametrize("count", ["num_experts", "num_local_experts"])
def test_expert_parallel_sizes_divide_the_experts_and_their_rows(check, count):
    config = {name: EXPERTS[name] for name in EXPERTS if name != "num_experts"} | {count: 6}
    assert check("parallel.ep=3", "parallel.etp=4", **config) == []
    ep, etp = check("parallel.ep=4", "parallel.etp=3", **config)
    assert "parallel.ep=4 does not divide the 6 experts of " in ep
    assert "parallel.etp=3 does not divide the 8 rows of an expert of " in etp


def test_experts_under_tensor_parallel_need_sequence_parallel(check):
    options = ["parallel.tp=2", "parallel.sequence_parallel=false"]
    assert check(*options) == []
    (problem,) = check(*options, **EXPERTS)
    assert problem.startswith("parallel.sequence_parallel=false: with tp=2 the experts of ")


@pytest.mark.parametrize(
    "setting",
    [
        "parallel.ep=2",
        "parallel.etp=2",
        "algorithm.routing_replay=rollout",
        "router.aux_loss_coef=0.001",
        "router.z_loss_coef=0.001",
    ],
)
def test_a_setting_of_experts_is_refused_for_a_dense_model(check, setting):
    (problem,) = check(setting)
    assert problem.startswith(f"{setting}: ") and "has no experts" in problem
    assert check(setting, **EXPERTS) == []


def test_a_bias_to_update_is_one_that_the_routers_have(check):
    rate = "router.bias_update_rate=0.001"
    (dense,) = check(rate)
    assert dense.startswith(f"{rate}: ") and "has no experts; set router.bias_upd" in dense
    (problem,) = check(rate, **EXPERTS)
    assert problem.startswith(f"{rate}: the routers of ") and "(qwen3_moe) have no sel" in problem
    glm = {"model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"]}
    assert check(rate, **EXPERTS | glm) == []


def test_a_dense_model_has_no_routing_to_measure(check):
    (problem,) = check("tracking.routing_every=1")
    assert problem.startswith("tracking.routing_every=1: ")
    assert problem.endswith(
        "has no experts, so no routes to measure; set tracking.routing_every=null"
    )
    assert check("tracking.routing_every=1", **EXPERTS) == []


def test_prompt_and_response_fit_the_position_range(check):
    assert check("data.max_prompt_tokens=4096") == []  # 4096 + 4096 = 8192
    (problem,) = check("data.max_prompt_tokens=4097")
    assert "= 8193 exceeds max_position_embeddings=8192" in problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not one of Qwen2ForCausalLM"),
        ({"architectures": ["Qwen3Model"]}, r"architectures ['Qwen3Model'] is not one of"),
        ({"quantization_config": {"bits": 4}}, "quantised weights cannot be trained"),
        (
            {
                "model_type": "gpt_oss",
                "architectures": None,
                "quantization_config": {"quant_method": "mxfp4"},
            },
            "cannot be trained; convert MXFP4 to bf16 first: megatron-cpgd convert",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "rope_type 'yarn' is not one of default, llama3"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type 'linear' is not one of"),
        ({"num_hidden_layers": "6"}, "num_hidden_layers must be a positive integer, got '6'"),
        ({"num_attention_heads": None}, "num_attention_heads must be a positive integer, got None"),
    ],
)
def test_a_model_that_is_not_supported_says_why(check, changes, message):
    (problem,) = check(**changes)
    assert message in problem


def test_yarn_is_accepted_where_the_model_has_it(check):
    rope, gpt_oss = {"rope_type": "yarn"}, {"model_type": "gpt_oss", "architectures": None}
    assert check(rope_scaling=rope, **gpt_oss) == []


@pytest.mark.parametrize("rope", [{"rope_type": "llama3", "factor": 8}, {"rope_type": "default"}])
def test_supported_rope_types_are_accepted(check, rope):
    assert check(rope_scaling=rope) == []
    assert check(rope_parameters=rope) == []


DEEPSEEK = {
    "model_type": "deepseek_v3",
    "architectures": None,
    "n_routed_experts": 4,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


@pytest.mark.parametrize("name", ["scoring_func", "topk_method"])
@pytest.mark.parametrize("value", ["softmax", None])
def test_a_deepseek_v3_that_vllm_would_route_differently_is_refused(check, name, value):
    (problem,) = check(**DEEPSEEK | {name: value})
    assert f"{name} of config.json must be {DEEPSEEK[name]!r}, got {value!r}" in problem


def test_yarn_is_for_deepseek_v3(check):
    assert check(rope_scaling={"type": "yarn"}, **DEEPSEEK) == []
    (problem,) = check(rope_scaling={"type": "llama3"}, **DEEPSEEK)
    assert "rope_type 'llama3' is not one of default, yarn" in problem


def test_a_table_of_rotations_is_cut_into_equal_parts(check):
    deepseek = {"model_type": "deepseek_v3", "architectures": None, "n_routed_experts": 4}
    deepseek |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    deepseek["rope_scaling"] = {"type": "yarn", "original_max_position_embeddings": 4096}
    assert check("parallel.cp=4", **deepseek) == []
    (problem,) = check("parallel.cp=3", **deepseek)
    assert problem.startswith("parallel.cp=3: Megatron-Core cuts its table of 4096 rotations")
    assert check("parallel.cp=3") == []


def test_a_config_json_alone_is_enough_to_check_the_sizes(run_yaml, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    missing = ["model.path=/nowhere", "data.path=/nowhere.jsonl"]
    load_config(run_yaml, missing, tmp_path)
    with pytest.raises(ConfigError, match=r"1 problem\n  parallel.tp=8 does not divide") as error:
        load_config(run_yaml, [*missing, "parallel.tp=8"], tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(ConfigError, match=r"--model-config=.*/none: has no config.json"):
        load_config(run_yaml, missing, tmp_path / "none")


def test_a_missing_folder_says_where_it_was_looked_for(check):
    (problem,) = check("model.path=models/deep/nowhere")
    assert "no such folder, seen from /" in problem
    assert "hf download" not in problem


def test_a_hub_name_gets_the_download_command(check):
    (problem,) = check("model.path=Qwen/Qwen3-8B")
    assert "hf download Qwen/Qwen3-8B --local-dir" in problem


def test_an_empty_folder_lists_all_that_it_lacks(check, tmp_path):
    (tmp_path / "empty").mkdir()
    problems = "\n".join(check(f"model.path={tmp_path / 'empty'}"))
    for part in ("no *.safetensors", "no tokenizer", "no config.json"):
        assert part in problems


def test_pickled_weights_are_refused_with_the_reason(check, tmp_path):
    folder = write_model_folder(tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (problem,) = check(f"model.path={folder}")
    assert "pickles and can run code" in problem


def test_damaged_json_is_an_error(check, tmp_path):
    folder = write_model_folder(tmp_path / "damaged")
    (folder / "config.json").write_text("{")
    (problem,) = check(f"model.path={folder}")
    assert "config.json: cannot be read as JSON" in problem


def test_the_tokenizer_may_lie_elsewhere(check, tmp_path):
    (tmp_path / "model" / "tokenizer.json").unlink(missing_ok=True)
    folder = write_model_folder(tmp_path / "weights_only")
    (folder / "tokenizer.json").unlink()
    (problem,) = check(f"model.path={folder}")
    assert "has no tokenizer, expected one of tokenizer.json" in problem
    assert check(f"model.path={folder}", f"model.tokenizer={tmp_path / 'model'}") == []
    (problem,) = check(f"model.tokenizer={tmp_path / 'nowhere'}")
    assert problem.startswith("model.tokenizer=")


def test_the_reference_needs_weights_of_a_supported_model_but_no_tokenizer(check, tmp_path):
    def problems_of(folder):
        return check("algorithm.reference.coef=0.1", f"algorithm.reference.path={folder}")

    folder = write_model_folder(tmp_path / "reference")
    (folder / "tokenizer.json").unlink()
    assert problems_of(folder) == []
    (problem,) = problems_of("models/deep/nowhere")
    assert problem.startswith("algorithm.reference.path=models/deep/nowhere: no such folder")
    write_model_folder(folder, model_type="gemma3")
    (folder / "model.safetensors").unlink()
    no_weights, not_supported = problems_of(folder)
    assert no_weights == f"algorithm.reference.path={folder}: has no *.safetensors files"
    assert not_supported.startswith(f"algorithm.reference.path={folder}: model_type 'gemma3' is")
