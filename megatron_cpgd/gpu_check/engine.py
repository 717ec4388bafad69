"""vLLM beside a trainer on one GPU: sampling, refreshes, and log-probs of both sides."""

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_cpgd.algorithm.objective import build_objective
from megatron_cpgd.config.algorithm import AlgorithmConfig
from megatron_cpgd.gpu_check.checks import Check, Emit, Figures, Setup, verdict
from megatron_cpgd.gpu_check.measure import seconds
from megatron_cpgd.gpu_check.trainer import (
    build_policy,
    join_alone,
    make_config,
    read_sizes,
    save_random_model,
    set_old_logprobs,
)
from megatron_cpgd.rollout.engine import Sampling
from megatron_cpgd.rollout.vllm_engine import VllmEngine, has_cpu_build
from megatron_cpgd.types import LossSequence, Rollout
from megatron_cpgd.weight_sync.arena import open_arena
from megatron_cpgd.weight_sync.arena_weights import ArenaWeights
from megatron_cpgd.weight_sync.sync import sync_weights
from megatron_cpgd.weights.engine_format import engine_tensors
from megatron_cpgd.weights.registry import weight_table

Format = Literal["bf16", "fp8_block"]
LIMITS: dict[Format, float] = {"bf16": 0.05, "fp8_block": 0.2}
"""Largest mean difference of a log-prob between trainer, in bf16, and engine."""


def run(setup: Setup, emit: Emit) -> None:
    """An engine in bf16, then one in FP8."""
    if find_spec("vllm") is None:
        emit(Check(name="engine", status="SKIP", reason="vLLM is not installed"))
        return
    if setup.device == "cuda" and has_cpu_build():
        emit(Check(name="engine", status="SKIP", reason="the installed vLLM computes on the CPU"))
        return
    join_alone(setup)
    folder = Path(setup.scratch) / "engine"
    hf = read_sizes(setup.pick(rehearsal=2, quick=4), tiny=setup.scale == "rehearsal")
    save_random_model(folder, hf, setup.device)
    formats: tuple[Format, ...] = setup.pick(rehearsal=("bf16",), quick=("bf16", "fp8_block"))
    for format in formats:
        _check_engine(setup, folder, hf, format, emit)


def _check_engine(
    setup: Setup, folder: Path, hf: dict[str, Any], format: Format, emit: Emit
) -> None:
    count, length, tokens = setup.pick(
        rehearsal=(4, 8, 8), quick=(64, 128, 128), full=(256, 512, 512)
    )
    on_cpu = {"kv_cache_memory_bytes": 32 << 20, "max_num_batched_tokens": 256}
    engine = VllmEngine(
        folder,
        dtype=format,
        max_model_len=length + tokens,
        engine_args=on_cpu if setup.device == "cpu" else {"gpu_memory_utilization": 0.4},
        start_timeout_s=600,
        step_timeout_s=300,
        log_path=None,
        seed=0,
        sleeps=setup.device == "cuda",
    )
    route = None
    try:
        start_s = seconds(engine.wait_ready, setup.device)
        emit(Check(name=f"{format}: start", status="PASS", figures={"s": start_s}))
        policy = build_policy(make_config(folder, micro_tokens=4096, lr=1e-4))
        route = ArenaWeights(policy, open_arena(engine_tensors(weight_table(hf), format)), format)
        prompts = torch.randint(hf["vocab_size"], (count, length)).tolist()
        for version in (1, 2):  # the second one after an optimizer step
            start = time.perf_counter()
            report = sync_weights(route, engine, version=version)
            synced = time.perf_counter()
            sampling = Sampling(max_tokens=tokens, seed=version)
            rollouts = [group[0] for group in engine.generate(prompts, sampling, version=version)]
            sampled = time.perf_counter()
            sequences = list(map(_sequence, prompts, rollouts))
            logprobs = policy.compute_logprobs(sequences)
            theirs = torch.tensor([value for rollout in rollouts for value in rollout.logprobs])
            error = (torch.cat(logprobs) - theirs).abs()
            limit = LIMITS[format]
            figures: Figures = {
                "mean difference": error.mean().item(),
                "largest": error.max().item(),
                "sync GB/s": float(report["weights/bytes"]) / 1e9 / (synced - start),
                "sampled tokens/s": len(error) / (sampled - synced),
            }
            passed = verdict(error.mean().item() < limit, f"expected a mean below {limit}")
            name = f"{format}: log-probs of trainer and engine, weights {version}"
            emit(Check(name=name, **passed, figures=figures))
            set_old_logprobs(sequences, logprobs)
            policy.train_step(sequences, build_objective(AlgorithmConfig()))
            if setup.device == "cuda":  # the next refresh wakes it
                emit(_sleep(engine, format))
    finally:
        engine.close()
        if route is not None:
            route.close()


def _sleep(engine: VllmEngine, format: Format) -> Check:
    """What the engine gives back, as the driver counts it."""
    before, _ = torch.cuda.mem_get_info()
    sleep_s = seconds(engine.sleep, "cuda")
    freed = (torch.cuda.mem_get_info()[0] - before) / 2**30
    passed = verdict(freed > 1, "expected more than 1 GiB")
    figures: Figures = {"s": sleep_s, "freed GiB": freed}
    return Check(name=f"{format}: sleep", **passed, figures=figures)


def _sequence(prompt: list[int], rollout: Rollout) -> LossSequence:
    count = len(rollout.token_ids)
    return LossSequence(
        input_ids=torch.tensor([*prompt, *rollout.token_ids]),
        prompt_length=len(prompt),
        tensors={
            "advantages": torch.ones(count),
            "coefficients": torch.full((count,), 1 / count),
            "log_clip_low": torch.full((count,), -0.2),
            "log_clip_high": torch.full((count,), 0.2),
        },
    )
