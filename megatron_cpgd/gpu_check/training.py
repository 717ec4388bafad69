"""Optimizer steps on a model with the widths of Qwen3-8B: MFU, FP8 against bf16, and the plan."""

import gc
import math
import traceback
from pathlib import Path
from typing import Any

import torch

from megatron_cpgd.algorithm.objective import build_objective
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.gpu_check.checks import Check, Emit, Figures, Setup, verdict
from megatron_cpgd.gpu_check.measure import fastest
from megatron_cpgd.gpu_check.trainer import (
    build_policy,
    join_alone,
    make_config,
    make_sequences,
    read_sizes,
    save_random_model,
    set_old_logprobs,
)
from megatron_cpgd.planning.estimate import make_plan
from megatron_cpgd.planning.machine import GPUS, Machine
from megatron_cpgd.planning.model import read_model
from megatron_cpgd.planning.plan import Plan
from megatron_cpgd.planning.rates import DEVICES
from megatron_cpgd.planning.workload import Lengths
from megatron_cpgd.policy.fp8 import require_fp8

RECIPES = ("fp8_blockwise", "fp8_tensorwise", "fp8_delayed", "mxfp8")
MOST_LAYERS = 36
"""Of Qwen3-8B itself."""
SHARE = 0.9
"""Of the memory that a plan may fill: plans have not met a GPU yet."""


def run(setup: Setup, emit: Emit) -> None:
    """bf16 and each FP8 recipe on a few layers; then bf16 on as many as fit."""
    join_alone(setup)
    layers = setup.pick(rehearsal=2, quick=8)
    seconds: dict[str, float] = {}
    for train in ("bf16", *RECIPES):
        name = f"{train}, {layers} layers"
        try:
            require_fp8(make_config(Path(), train=train, micro_tokens=1).precision)
        except ConfigError as error:
            emit(Check(name=name, status="SKIP", reason=str(error)))
            continue
        try:
            check, seconds[train] = _measure(setup, layers, train)
        except Exception as error:  # one recipe that fails says nothing about the next
            traceback.print_exc()
            emit(Check(name=name, status="FAIL", reason=repr(error)))
            continue
        if train != "bf16" and "bf16" in seconds:
            check.figures["time of bf16 / this"] = seconds["bf16"] / seconds[train]
        emit(check)
    machine = _machine(setup)
    if setup.scale == "full" and machine is not None:
        fitting = [n for n in range(1, MOST_LAYERS + 1) if _fits(setup, n, machine)]
        if max(fitting, default=0) > layers:
            emit(_measure(setup, max(fitting), "bf16")[0])


def _measure(setup: Setup, layers: int, train: str) -> tuple[Check, float]:
    """The check of one model and precision, and seconds of its optimizer step."""
    gc.collect()
    if setup.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    hf, folder = _sizes(setup, layers), Path(setup.scratch) / "training"
    save_random_model(folder, hf, setup.device)
    config = _config(setup, train, folder)
    policy, objective = build_policy(config), build_objective(config.algorithm)
    count, length = config.rollout.samples_per_prompt, config.rollout.max_response_tokens + 1
    sequences = make_sequences(count, length, hf["vocab_size"])
    set_old_logprobs(sequences, policy.compute_logprobs(sequences))
    norms = []

    def step() -> None:
        norms.append(policy.train_step(sequences, objective).grad_norm)

    step_s = fastest(step, setup.device)
    forward_s = fastest(lambda: policy.compute_logprobs(sequences), setup.device, repeat=2)
    figures: Figures = {
        "step s": step_s,
        "tokens/s": count * length / step_s,
        "log-prob pass s": forward_s,
    }
    machine = _machine(setup)
    if machine is not None:
        plan = _plan(hf, config, machine, length)
        flops = plan.train_flops / step_s
        peak = machine.flops["bf16" if config.precision.recipe is None else "fp8"]
        figures |= {
            "MFU": flops / peak,
            "TFLOP/s": flops / 1e12,
            "step s / planned": step_s / plan.seconds.train,
            "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
            "peak / planned": torch.cuda.max_memory_allocated() / plan.worst.total,
        }
    finite = all(map(math.isfinite, norms))
    name = f"{train}, {layers} layers, {count} x {length} tokens"
    passed = verdict(finite, f"a gradient norm is not finite: {norms}")
    return Check(name=name, **passed, figures=figures), step_s


def _sizes(setup: Setup, layers: int) -> dict[str, Any]:
    return read_sizes(layers, tiny=setup.scale == "rehearsal")


def _config(setup: Setup, train: str, folder: Path) -> ExperimentConfig:
    count, length = setup.pick(rehearsal=(4, 32), quick=(8, 4096), full=(16, 4096))
    return make_config(folder, train=train, sequences=count, length=length, micro_tokens=2 * length)


def _machine(setup: Setup) -> Machine | None:
    """With this GPU's data sheet; None if there is none."""
    if setup.device == "cpu":
        return None
    return GPUS.get(DEVICES.get(torch.cuda.get_device_name(), ""))


def _plan(hf: dict[str, Any], config: ExperimentConfig, machine: Machine, length: int) -> Plan:
    lengths = Lengths(prompt=1, response=length - 1, longest=length - 1)
    return make_plan(read_model(hf), config, machine, lengths)


def _fits(setup: Setup, layers: int, machine: Machine) -> bool:
    config = _config(setup, "bf16", Path())
    plan = _plan(_sizes(setup, layers), config, machine, config.rollout.max_response_tokens + 1)
    return plan.worst.total < SHARE * machine.usable_memory
