"""Mixtures of experts: the Hugging Face model, loaded, computed and written by Megatron."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.helpers.model_jobs import convert_job, held_experts_job, logits_job, round_trip_job
from tests.helpers.policy_jobs import train_job, with_old_logprobs
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences
from tests.helpers.weight_jobs import written_job

pytestmark = pytest.mark.distributed

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
MODELS = {
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe_some_dense": (
        "qwen3_moe",
        # Layers 0, 2 and 3 are dense: two for their position, one by name.
        {
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": ("mixtral", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    # The norms inside the attention keep their epsilon.
    "deepseek_v3_yarn": ("deepseek_v3", {"rope_parameters": YARN, "rms_norm_eps": 1e-2}),
    "deepseek_v3_plain_queries": ("deepseek_v3", {"q_lora_rank": None, "rms_norm_eps": 1e-2}),
    "glm4_moe": ("glm4_moe", {}),
    "gpt_oss": ("gpt_oss", {}),
    "glm4_moe_groups": ("glm4_moe", {"n_group": 4, "topk_group": 2, "use_qk_norm": True}),
}
LAYOUTS = {
    "dp2_ep2": {"dp": 2, "ep": 2},
    "tp2": {"tp": 2},
    "cp2_dp2_ep2": {"cp": 2, "dp": 2, "ep": 2},
    "pp2_dp2_ep2": {"pp": 2, "dp": 2, "ep": 2},
    "tp2_dp2_ep2_etp2": {"tp": 2, "dp": 2, "ep": 2, "etp": 2},
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """(folder, transformers model)."""
    architecture, overrides = MODELS[request.param]
    path = tmp_path_factory.mktemp(request.param)
    return path, save_tiny_model(path, architecture, **overrides)


def test_logits_equal_those_of_transformers(saved):
    path, model = saved
    tokens = torch.randint(131, (3, 40), generator=torch.Generator().manual_seed(1))
    [logits] = run_distributed(1, logits_job, tiny_config(path), tokens)
    with torch.no_grad():
        expected = model(tokens).logits
    error = (logits - expected).abs().max().item()
    print(f"largest |logit difference|: {error:.1e}")
    assert error < 2e-5


@pytest.mark.parametrize("layout", ["pp2_dp2_ep2", "tp2_dp2_ep2_etp2"])
def test_hf_to_megatron_to_hf_is_bit_identical(saved, layout, tmp_path):
    path, _ = saved
    config = tiny_config(path, parallel=LAYOUTS[layout])
    target = tmp_path / "out.safetensors"
    run_distributed(4, round_trip_job, config, target)
    original, written = load_file(path / "model.safetensors"), load_file(target)
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], original[name]) for name in original)


def test_the_bias_of_a_router_keeps_its_fp32_bits_in_a_bf16_training(tmp_path):
    save_tiny_model(tmp_path, "glm4_moe")
    sequences = tiny_sequences()
    old = [torch.full((sequence.response_length,), -3.0) for sequence in sequences]
    layout = {"parallel": LAYOUTS["dp2_ep2"], "precision": {"train": "bf16"}}
    config, target = tiny_config(tmp_path, **layout), tmp_path / "trained"
    run_distributed(2, train_job, config, with_old_logprobs(sequences, old), target, steps=1)
    original, trained = load_file(tmp_path / "model.safetensors"), load_file(target)
    for layer in (1, 2, 3):
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        assert torch.equal(trained[name], original[name])
        assert not torch.equal(original[name], original[name].bfloat16().float())


# Projections of equal width and height: only their names tell how they lie in the file.
def test_mxfp4_files_convert_to_what_transformers_makes_of_them(tmp_path):
    source, generator = tmp_path / "source", torch.Generator().manual_seed(5)
    save_tiny_model(source, "gpt_oss", intermediate_size=64)
    expected, tensors = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj") or ".experts." not in name:
            expected[name] = tensors[name] = tensor.bfloat16()
            continue
        experts, columns, rows = tensor.shape
        shape = (experts, rows, columns // 32)
        blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(120, 130, shape, generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
        assert expected[name].shape == tensor.shape
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (source / "config.json").write_text(json.dumps(config))
    run_distributed(1, convert_job, source, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, "qwen3_moe")
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_element_is_written_by_exactly_one_rank(qwen3_moe, layout):
    config = tiny_config(qwen3_moe, parallel=LAYOUTS[layout])
    by_rank = run_distributed(config.parallel.world_size, written_job, config)
    for name in by_rank[0]:
        writers = sum(written[name].int() for written in by_rank)
        assert (writers == 1).all(), f"{name}: {writers.unique().tolist()} writers"
    elements = [sum(int(mask.sum()) for mask in written.values()) for written in by_rank]
    assert max(elements) < 0.75 * sum(elements), f"{elements} by rank: one writes nearly all"


# 4 layers of 12 experts with 3 matrices of 24 x 64, spread over 2 ranks or over 4.
@pytest.mark.parametrize(("layout", "ranks"), [("dp2_ep2", 2), ("tp2_dp2_ep2_etp2", 4)])
def test_a_rank_holds_its_share_of_the_experts_only(qwen3_moe, layout, ranks):
    config = tiny_config(qwen3_moe, parallel=LAYOUTS[layout])
    held = run_distributed(ranks, held_experts_job, config)
    assert held == [4 * 12 * 3 * 24 * 64 // ranks] * ranks
