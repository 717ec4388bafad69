"""Run as a program by test_vllm_engine.py: vLLM changes torch for the process that it runs in."""

import os
import tempfile
from pathlib import Path

import pytest

from megatron_cpgd.errors import ConfigError
from megatron_cpgd.rollout.messages import Failed, Generate, Generated, Launch, Refresh, Refreshed
from megatron_cpgd.rollout.vllm_engine import engine_environment
from megatron_cpgd.weights.tensor_file import TensorFile

os.environ.update(engine_environment(dict(os.environ), cpu=True))

from test_vllm_engine import (
    CONFIGS,
    MAX_MODEL_LEN,
    PROMPTS,
    SAMPLING,
    TOLERANCE,
    logprob_error,
    named_weights,
    random_model,
    write_arena,
)

from megatron_cpgd.rollout.vllm_requests import Engine, build_llm, check_engine_args


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
    engine = Engine(build_llm(launch(directory)))
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


def launch(directory: Path) -> Launch:
    return Launch(
        address="",
        client_pid=0,
        model_dir=str(directory),
        dtype="fp32",
        max_model_len=MAX_MODEL_LEN,
        seed=0,
        trust_remote_code=False,
        engine_args={"kv_cache_memory_bytes": 32 << 20, "max_num_batched_tokens": MAX_MODEL_LEN},
    )


def generate(version: int) -> Generate:
    return Generate(prompts=PROMPTS, sampling=SAMPLING, seeds=None, version=version)


def view_until(last: str):
    original = TensorFile.view

    def view(self, name):
        if name == last:
            raise OSError("injected")
        return original(self, name)

    return view


if __name__ == "__main__":
    check_that_engine_arguments_are_verified()
    with tempfile.TemporaryDirectory() as folder:
        check_that_a_refresh_that_breaks_off_can_be_repeated(Path(folder))
