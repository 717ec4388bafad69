"""Weights into blocks of FP8: equal to the CPU's, and how fast."""

from functools import partial

import torch

from megatron_cpgd.gpu_check.checks import Check, Emit, Setup, verdict
from megatron_cpgd.gpu_check.measure import fastest
from megatron_cpgd.weights.quantize import FP8, quantize, scale_shape


def run(setup: Setup, emit: Emit) -> None:
    """From and to the host as in a weight sync, and on the device alone."""
    torch.manual_seed(0)
    device = torch.device(setup.device)
    weight = (torch.randn(1000, 1100) * 0.02).bfloat16()
    results = []
    for where in (torch.device("cpu"), device):
        codes, scales = _outputs(weight)
        quantize(weight, codes, scales, device=where)
        results.append((codes.view(torch.uint8), scales))
    equal = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    reason = "codes or factors are not those of the CPU"
    emit(Check(name="blocks are bit by bit those of the CPU", **verdict(equal, reason)))
    shape = setup.pick(rehearsal=(256, 384), quick=(16_384, 8192))
    for kind, memory in {"host": torch.device("cpu"), "device": device}.items():
        weight = torch.randn(shape, device=device, dtype=torch.bfloat16).to(memory)
        work = partial(quantize, weight, *_outputs(weight), device=device)
        rate = weight.nbytes / fastest(work, setup.device) / 1e9
        name = f"{list(shape)} bfloat16, weight and codes in {kind} memory"
        emit(Check(name=name, status="PASS", figures={"GB/s": rate}))


def _outputs(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    return codes, torch.empty(scale_shape(tuple(weight.shape)), device=weight.device)
