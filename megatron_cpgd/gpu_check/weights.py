"""Weights from a policy on this device into shared memory, and from there to a device."""

from pathlib import Path
from typing import Literal

import torch

from megatron_cpgd.gpu_check.checks import Check, Emit, Figures, Setup, verdict
from megatron_cpgd.gpu_check.measure import seconds
from megatron_cpgd.gpu_check.trainer import (
    build_policy,
    join_alone,
    make_config,
    read_sizes,
    save_random_model,
)
from megatron_cpgd.policy.policy import Policy
from megatron_cpgd.weight_sync.arena import open_arena, remove_arena
from megatron_cpgd.weights.engine_format import engine_tensors
from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
from megatron_cpgd.weights.quantize import is_quantized
from megatron_cpgd.weights.registry import weight_table


def run(setup: Setup, emit: Emit) -> None:
    """In bf16 and in blocks of FP8."""
    join_alone(setup)
    folder = Path(setup.scratch) / "weights"
    hf = read_sizes(setup.pick(rehearsal=2, quick=4), tiny=setup.scale == "rehearsal")
    save_random_model(folder, hf, setup.device)
    policy = build_policy(make_config(folder, micro_tokens=1024))
    with HfCheckpoint.open(folder) as checkpoint:
        emit(_measure(policy, checkpoint, "bf16", setup.device))
        emit(_measure(policy, checkpoint, "fp8_block", setup.device))


def _measure(
    policy: Policy, checkpoint: HfCheckpoint, format: Literal["bf16", "fp8_block"], device: str
) -> Check:
    tensors = engine_tensors(weight_table(checkpoint.config), format)
    arena = open_arena(tensors)
    assert arena is not None, "this process is rank 0"
    try:
        # The first pass touches the pages of the new file; a run does that once.
        policy.write_engine_weights(arena.view, format)
        write_s = seconds(lambda: policy.write_engine_weights(arena.view, format), device)
        sums = policy.write_engine_weights(arena.view, format)
        sum_s = seconds(arena.fingerprints, device)
        read_s = seconds(lambda: [arena.view(n).to(device) for n in arena.names], device)
        wrong = [name for name, sum_ in arena.fingerprints().items() if sum_ != sums[name]]
        wrong += [
            name
            for name in checkpoint.names
            if not (format == "fp8_block" and is_quantized(name))
            and not torch.equal(arena.view(name), checkpoint.read(name, ()))
        ]
        nbytes = arena.nbytes / 1e9
    finally:
        remove_arena(arena)
    figures: Figures = {
        "GB": nbytes,
        "sum, quantise and write GB/s": nbytes / write_s,
        "sum on the host GB/s": nbytes / sum_s,
        "read to device GB/s": nbytes / read_s,
    }
    name = f"{format}, what was loaded comes out bit by bit"
    return Check(name=name, **verdict(not wrong, f"differ: {wrong[:3]}"), figures=figures)
