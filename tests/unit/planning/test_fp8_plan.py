"""FP8 in plans: bytes and rates, against numbers worked by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_cpgd.config.load import read_config
from megatron_cpgd.planning.activations import Passes, layer_bytes
from megatron_cpgd.planning.estimate import make_plan
from megatron_cpgd.planning.fp8 import Fp8, weight_copies
from megatron_cpgd.planning.generation import iteration_seconds
from megatron_cpgd.planning.layout import Layout
from megatron_cpgd.planning.machine import GPUS, with_factors
from megatron_cpgd.planning.memory import EngineSettings, engine_memory
from megatron_cpgd.planning.passes import Batch, pass_seconds
from megatron_cpgd.planning.plan import Plan
from megatron_cpgd.planning.workload import assumed_lengths
from megatron_cpgd.weights.quantize import quantized_tensors
from megatron_cpgd.weights.registry import weight_table
from tests.helpers.planning import MODELS, public_config, public_model
from tests.helpers.valid_run import write_run

BF16 = Passes(precision="bf16", recompute="none", accelerator=True)
TENSORWISE = replace(BF16, fp8=Fp8(recipe="tensorwise"))
ENGINE = EngineSettings(tp=1, precision="bf16", utilization=0.9, max_sequences=256)
SMALL = sorted(path.name for path in MODELS.iterdir() if path.is_dir())


def plan(folder: Path, name: str, machine: str, *overrides: str) -> Plan:
    config = read_config(write_run(folder), overrides)
    return make_plan(public_model(name), config, GPUS[machine], assumed_lengths(config))


@pytest.mark.parametrize("name", SMALL)
def test_an_engine_s_weights_are_those_of_the_quantised_checkpoint_to_the_byte(name: str) -> None:
    tensors = weight_table(public_config(name)).hf_tensors(torch.bfloat16)
    nbytes = sum(
        torch.empty(shape, dtype=dtype, device="meta").nbytes
        for dtype, shape in quantized_tensors(tensors).values()
    )
    engine = engine_memory(public_model(name), replace(ENGINE, precision="fp8_block"), GPUS["h200"])
    assert engine.weights == nbytes


def test_an_fp8_checkpoint_has_a_byte_per_element_of_a_layer_and_bf16_for_the_rest() -> None:
    # Qwen3-8B: 36 layers of q, o 4096^2, k, v 1024 * 4096, three of 12288 * 4096; all are whole
    # blocks. Embedding and head 151936 * 4096, norms: 73 of 4096 and 72 of 128.
    linear = 36 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 12288 * 4096)
    rest = 2 * 151_936 * 4096 + 73 * 4096 + 72 * 128
    bytes_of = public_model("Qwen3-8B").checkpoint_bytes
    assert bytes_of["fp8_block"] == linear + 4 * linear // 128**2 + 2 * rest
    assert bytes_of["bf16"] == 2 * (linear + rest)


def test_a_rank_keeps_its_layers_matrices_twice_in_fp8_but_for_those_that_stay_in_bf16() -> None:
    model, layout = public_model("Qwen3-8B"), Layout(tp=2, pp=2)
    layer = (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 12288 * 4096) // 2
    fp8 = Fp8(recipe="tensorwise")
    assert weight_copies(model, layout, 0, fp8) == 18 * 2 * layer
    assert weight_copies(model, layout, 0, replace(fp8, bf16_layers=2)) == 16 * 2 * layer
    blocks = weight_copies(model, layout, 0, Fp8(recipe="blockwise"))
    assert blocks == 18 * 2 * (layer + 4 * layer // 128**2)


def test_of_a_mixture_the_rank_s_experts_are_kept_and_no_router() -> None:
    # Qwen3-30B-A3B: q, o 2048 * 4096, k, v 512 * 2048, and 128 / 8 experts of three 2048 * 768.
    layer = 2 * 2048 * 4096 + 2 * 512 * 2048 + 16 * 3 * 2048 * 768
    copies = weight_copies(
        public_model("Qwen3-30B-A3B"), Layout(dp=8, ep=8), 0, Fp8(recipe="tensorwise")
    )
    assert copies == 48 * 2 * layer


def test_inputs_of_products_are_saved_in_one_byte_and_the_output_of_attention_in_both() -> None:
    # Per token of Qwen3-8B: the normed inputs of the fused projection and of the MLP, and the
    # product before the last matrix, lose a byte; attention's output is saved in FP8 as well.
    model, layout = public_model("Qwen3-8B"), Layout()
    change = -4096 - 4096 - 12288 + 4096
    plain = layer_bytes(model, layout, 5, BF16)
    assert layer_bytes(model, layout, 5, TENSORWISE) - plain == change
    kept = replace(TENSORWISE, fp8=Fp8(recipe="tensorwise", bf16_layers=6))
    assert layer_bytes(model, layout, 5, kept) == plain


def test_experts_save_their_tokens_in_fp8_and_the_router_its_own_in_bf16() -> None:
    # GLM-4.5-Air: hidden 4096, 96 heads of 128, 8 of 128 experts of 1408 and a shared one. Copies
    # of the token and the products lose a byte; the shared expert's input is saved beside the
    # router's, attention's output beside its own.
    change = -4096 + 96 * 128 + 4096 - 1408 - 8 * (4096 + 1408)
    model, layout = public_model("GLM-4.5-Air"), Layout()
    plain = layer_bytes(model, layout, 5, BF16)
    assert layer_bytes(model, layout, 5, TENSORWISE) - plain == change


def test_only_the_layers_products_are_faster() -> None:
    # On one rank, without launches: 2 FLOPs forward and 4 backward of the layers at 0.45 * 0.75 *
    # 1979e12, attention and the head at 0.45 * 989e12.
    model = public_model("Qwen3-8B")
    layers = model.active_parameters - model.vocab_matrix
    attention = 36 * 2 * 4096 * 1000
    batch = Batch(tokens=8000, length=1000, micro_tokens=8000)
    found = pass_seconds(model, Layout(), GPUS["h100"], TENSORWISE, batch, backward=True).compute
    low = 6 * layers / (0.45 * 0.75 * 1979e12)
    plain = (6 * model.vocab_matrix + 3 * attention) / (0.45 * 989e12)
    assert found == pytest.approx(8000 * (low + plain))
    ends = replace(BF16, fp8=Fp8(recipe="tensorwise", bf16_layers=9))
    half = pass_seconds(model, Layout(), GPUS["h100"], ends, batch, backward=True).compute
    bf16 = pass_seconds(model, Layout(), GPUS["h100"], BF16, batch, backward=True).compute
    assert half == pytest.approx((found + bf16) / 2)


def test_an_engine_in_fp8_reads_half_of_the_layers_and_the_head_as_before() -> None:
    # One sequence with an empty context: nothing but weights is read. 3.35e12 * 0.6 bytes a second.
    model = public_model("Qwen3-8B")
    machine = with_factors(GPUS["h100"], iteration_s=0.0, sequence_s=0.0)
    layers = model.active_parameters - model.vocab_matrix
    seconds = iteration_seconds(model, machine, replace(ENGINE, precision="fp8_block"), 1, 0)
    nbytes = layers * (1 + 4 / 128**2) + 2 * model.vocab_matrix
    assert seconds == pytest.approx(nbytes / (0.6 * 3.35e12))


def test_the_cache_stays_in_bf16_unless_it_is_set(tmp_path: Path) -> None:
    fp8 = ("precision.rollout=fp8_block", "rollout.engine_args.kv_cache_memory_bytes=1000000000")
    one = plan(tmp_path, "Qwen3-8B", "h100", *fp8).engine
    two = plan(tmp_path, "Qwen3-8B", "h100", *fp8, "rollout.engine_args.kv_cache_dtype=fp8").engine
    assert one.cache_tokens == 1_000_000_000 // 147_456
    assert two.cache_tokens == 1_000_000_000 // (147_456 // 2)


def test_the_host_holds_the_weights_in_fp8_alone(tmp_path: Path) -> None:
    host = plan(tmp_path, "Qwen3-8B", "h100", "precision.rollout=fp8_block").host
    assert host.arena == public_model("Qwen3-8B").checkpoint_bytes["fp8_block"]


@pytest.mark.parametrize(
    ("machine", "recipe", "format"),
    [("a100", "fp8_blockwise", "FP8"), ("h100", "mxfp8", "MXFP8")],
)
def test_a_machine_without_the_recipe_is_a_problem(
    tmp_path: Path, machine: str, recipe: str, format: str
) -> None:
    given = (f"precision.train={recipe}", "parallel.tp=8")
    problems = plan(tmp_path, "Qwen3-8B", machine, *given).problems
    assert [line for line in problems if f"{machine} does not multiply in {format};" in line]
    able = plan(tmp_path, "Qwen3-8B", "b200", *given).problems
    assert not any("multiply" in line for line in able)
