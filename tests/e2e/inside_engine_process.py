"""Run as a program by test_vllm_engine.py: vLLM changes torch for the process that it runs in."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace as replace_struct
from torch import nn
from transformers import Qwen3Config

from megatron_cpgd.errors import ConfigError
from megatron_cpgd.rollout.engine import Sampling
from megatron_cpgd.rollout.messages import (
    Asleep,
    Failed,
    Generate,
    Generated,
    Launch,
    Refresh,
    Refreshed,
    Sleep,
)
from megatron_cpgd.rollout.vllm_engine import engine_environment
from megatron_cpgd.weight_sync.arena import quantized_checkpoint
from megatron_cpgd.weights.quantize import (
    FP8,
    SCALE_SUFFIX,
    dequantize,
    is_quantized,
    quantize,
    scale_shape,
)
from megatron_cpgd.weights.tensor_file import TensorFile

os.environ.update(engine_environment(dict(os.environ), cpu=True))

from vllm.distributed import cleanup_dist_env_and_memory
from vllm.utils.deep_gemm import per_block_cast_to_fp8

from megatron_cpgd.rollout import vllm_compat
from megatron_cpgd.rollout.vllm_requests import (
    Engine,
    build_llm,
    check_engine_args,
    start_reporting_routes,
)
from tests.helpers.engines import (
    CONFIGS,
    MAX_MODEL_LEN,
    PROMPTS,
    SAMPLING,
    SIZES,
    TOLERANCE,
    logprob_error,
    named_weights,
    random_model,
    write_arena,
)
from tests.helpers.tiny_moe_engine import moe_config


def check_that_engine_arguments_are_verified() -> None:
    with pytest.raises(ConfigError, match=r"max_num_seq: vLLM has no such .*'max_num_seqs'"):
        check_engine_args({"max_num_seq": 3}, fixed=set())
    with pytest.raises(ConfigError, match=r"engine_args\.dtype is set by megatron_cpgd"):
        check_engine_args({"dtype": "float16"}, fixed={"dtype"})


def check_that_a_refresh_that_breaks_off_can_be_repeated(directory: Path) -> None:
    """Layer 0 has new weights, layer 1 old ones when it stops: a mixture that must not sample."""
    models = [random_model(CONFIGS["qwen2_tied_with_qkv_bias"], seed) for seed in (1, 2)]
    models[0].save_pretrained(directory)
    arena = write_arena(directory / "arena", named_weights(models[1]))
    started = launch(directory)
    engine = Engine(build_llm(started), started)
    with pytest.MonkeyPatch.context() as patch:
        # After q_proj and before k_proj: one fused parameter waits for its other parts.
        patch.setattr(TensorFile, "view", view_until("model.layers.1.self_attn.k_proj.weight"))
        broken = engine.answer(Refresh(arena=str(arena), version=1))
    assert isinstance(broken, Failed) and broken.kind == "weights", broken
    assert "injected" in broken.message
    assert engine.answer(generate(0)).kind == "weights"
    assert isinstance(engine.answer(Refresh(arena=str(arena), version=1)), Refreshed)
    healed = engine.answer(generate(1))
    assert isinstance(healed, Generated)
    assert logprob_error(models[1], PROMPTS, healed.groups) < TOLERANCE
    check_that_all_it_forgets_asleep_comes_back(engine, arena, healed)
    engine.llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()  # makes room for a second engine in this process


def check_that_all_it_forgets_asleep_comes_back(
    engine: Engine, arena: Path, awake: Generated
) -> None:
    """`engine` holds version 1, those of the arena.

    On CUDA the worker saves the model's buffers and discards what else was allocated while the
    model was loaded; on CPU it does nothing, so this does it.
    """
    assert isinstance(engine.answer(Sleep()), Asleep)
    assert isinstance(engine.answer(Sleep()), Asleep)
    assert engine.llm.apply_model(spoil_all_but_buffers)[0] > 10
    refused = engine.answer(generate(1))
    assert isinstance(refused, Failed) and "the engine sleeps and has no" in refused.message, (
        refused
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorFile, "view", view_until("model.layers.1.self_attn.k_proj.weight"))
        assert engine.answer(Refresh(arena=str(arena), version=2)).kind == "weights"
    assert "the last weight refresh failed" in engine.answer(generate(1)).message
    assert isinstance(engine.answer(Refresh(arena=str(arena), version=2)), Refreshed)
    restored = engine.answer(generate(2))
    assert tokens_and_logprobs(restored) == tokens_and_logprobs(awake)
    engine.sleeps = False
    refused = engine.answer(Sleep())
    assert "started without rollout.sleep" in refused.message and not engine.broken


def check_that_routes_are_refused_where_there_can_be_none(directory: Path) -> None:
    """`directory` holds a dense model; nothing is loaded before the refusal."""
    with pytest.raises(ConfigError, match="routes are asked for, but the model has no experts"):
        build_llm(launch(directory, return_routes=True))
    with pytest.raises(ConfigError, match=r"enable_return_routed_experts is set by megatron_cpgd"):
        build_llm(launch(directory, enable_return_routed_experts=True))
    with pytest.raises(ConfigError, match=r"enable_expert_parallel: vLLM crashes with it on CPU"):
        build_llm(launch(directory, enable_expert_parallel=True))


def check_that_routes_that_no_kernel_reports_are_refused(directory: Path) -> None:
    """What vLLM returns on CPU by itself has the right shape and is all 0."""
    random_model(moe_config(), seed=1).save_pretrained(directory)
    if not torch.cpu._is_amx_tile_supported():
        with pytest.raises(ConfigError, match="no kernel for experts in FP8"):
            build_llm(replace_struct(launch(directory), dtype="fp8_block"))
    with pytest.raises(ConfigError, match=r"pipeline_parallel_size=2: routes are asked for, and"):
        build_llm(launch(directory, return_routes=True, pipeline_parallel_size=2))
    started = launch(directory, return_routes=True)
    engine = Engine(build_llm(started), started)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_compat, "current_platform", SimpleNamespace(is_cpu=lambda: False))
        with pytest.raises(ConfigError, match="layer 0: its kernel chooses the experts itself"):
            start_reporting_routes(engine.llm)
    request = generate(0, replace(SAMPLING, return_routes=True))
    assert isinstance(engine.answer(request), Generated)
    for layer in vllm_compat.moe_layers(engine.llm.llm_engine.vllm_config).values():
        del layer.routed_experts.forward_monolithic  # the hook; vLLM's method is behind it
    refused = engine.answer(request)
    assert isinstance(refused, Failed) and refused.kind == "rollout", refused
    assert "token 0 went to the experts [0, 0, 0] in layer 0" in refused.message, refused
    assert not engine.broken
    assert isinstance(engine.answer(generate(0)), Generated)


def check_that_fp8_blocks_are_those_of_vllm() -> None:
    """Codes and factors bit by bit, with ragged edges, blocks of zeros and every magnitude."""
    generator = torch.Generator().manual_seed(0)
    for exponent in range(-40, 38, 3):
        rows, columns = torch.randint(1, 400, (2,), generator=generator).tolist()
        weight = torch.randn(rows, columns, generator=generator).clamp(-3, 3) * 10.0**exponent
        weight[:128, 128:256] = 0
        weight = weight.bfloat16()
        codes = torch.empty(weight.shape, dtype=FP8)
        scales = torch.empty(scale_shape(tuple(weight.shape)))
        quantize(weight, codes, scales, device=torch.device("cpu"))
        theirs, their_scales = per_block_cast_to_fp8(weight)
        assert torch.equal(codes.view(torch.uint8), theirs.view(torch.uint8)), weight.shape
        assert torch.equal(scales, their_scales), weight.shape


def check_that_an_fp8_engine_computes_with_the_restored_weights(directory: Path) -> None:
    sizes = {"hidden_size": 200, "intermediate_size": 384, "num_key_value_heads": 4}
    config = Qwen3Config(**SIZES | sizes, head_dim=32, tie_word_embeddings=False)
    random_model(config, seed=1).save_pretrained(directory)
    started = replace_struct(launch(directory), dtype="fp8_block")
    engine = Engine(build_llm(started), started)
    refused = engine.answer(generate(0))
    assert isinstance(refused, Failed) and "has no weights yet" in refused.message, refused
    for version, seed in enumerate((1, 2)):
        model = random_model(config, seed)
        model.save_pretrained(directory)
        with quantized_checkpoint(directory) as arena:
            answer = engine.answer(Refresh(arena=str(arena.path), version=version))
            assert isinstance(answer, Refreshed), answer
            assert answer.fingerprints == arena.fingerprints()
            restored = random_model(config, seed)
            for name, parameter in restored.named_parameters():
                values = arena.view(name)
                if is_quantized(name):
                    values = dequantize(values, arena.view(f"{name}{SCALE_SUFFIX}"))
                parameter.data.copy_(values)
        groups = engine.answer(generate(version)).groups
        # The engine computes in bf16, the models here in fp32.
        error = logprob_error(restored, PROMPTS, groups)
        assert error < 0.2 * logprob_error(model, PROMPTS, groups), error
    unquantised = write_arena(directory / "bf16", named_weights(model.bfloat16()))
    refused = engine.answer(Refresh(arena=str(unquantised), version=2))
    assert isinstance(refused, Failed) and "missing ['model.layers.0.mlp" in refused.message
    engine.llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def spoil_all_but_buffers(model: nn.Module) -> int:
    """Overwrite every tensor of the model that is no buffer; returns how many there were.

    But for the KV cache: vLLM reads, and masks, entries that it has not written.
    """
    kept = {tensor.data_ptr() for tensor in model.buffers()}
    tensors = {}
    for module in model.modules():
        owners = [module, *(vars(module).get(name) for name in ("quant_method", "impl"))]
        found = [named for owner in owners if owner is not None for named in vars(owner).items()]
        for name, tensor in [*found, *module._parameters.items()]:
            if isinstance(tensor, torch.Tensor) and name != "kv_cache":
                tensors[tensor.data_ptr()] = tensor
    spoiled = [tensor for address, tensor in tensors.items() if address not in kept]
    for tensor in spoiled:
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else 1)
    return len(spoiled)


def tokens_and_logprobs(answer: Generated) -> list[tuple[list[int], list[float]]]:
    return [(each.token_ids, each.logprobs) for group in answer.groups for each in group]


def launch(directory: Path, *, return_routes: bool = False, **engine_args: Any) -> Launch:
    return Launch(
        address="",
        client_pid=0,
        model_dir=str(directory),
        dtype="fp32",
        max_model_len=MAX_MODEL_LEN,
        seed=0,
        trust_remote_code=False,
        return_routes=return_routes,
        sleeps=True,
        engine_args={
            "kv_cache_memory_bytes": 32 << 20,
            "max_num_batched_tokens": MAX_MODEL_LEN,
            **engine_args,
        },
    )


def generate(version: int, sampling: Sampling = SAMPLING) -> Generate:
    return Generate(prompts=PROMPTS, sampling=sampling, seeds=None, version=version)


def view_until(last: str):
    original = TensorFile.view

    def view(self, name):
        if name == last:
            raise OSError("injected")
        return original(self, name)

    return view


if __name__ == "__main__":
    check_that_engine_arguments_are_verified()
    check_that_fp8_blocks_are_those_of_vllm()
    with tempfile.TemporaryDirectory() as folder:
        check_that_an_fp8_engine_computes_with_the_restored_weights(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        check_that_a_refresh_that_breaks_off_can_be_repeated(Path(folder))
        check_that_routes_are_refused_where_there_can_be_none(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        check_that_routes_that_no_kernel_reports_are_refused(Path(folder))
