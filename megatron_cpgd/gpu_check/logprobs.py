"""Log-probs and objective: tools/bench_objectives.py on this device."""

import json
import subprocess
import sys

from megatron_cpgd.gpu_check.checks import Check, Emit, Setup, verdict

TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
"""Relative, of loss and gradient norms; TF32 or bf16 in the matrix products of both sides."""


def run(setup: Setup, emit: Emit) -> None:
    """One check for each number format."""
    tokens, vocab, hidden = setup.pick(
        rehearsal=(64, 300, 16), quick=(8192, 151_936, 4096), full=(32_768, 151_936, 4096)
    )
    for dtype in ("bf16", "fp32"):
        sizes = {"--tokens": tokens, "--vocab": vocab, "--hidden": hidden, "--repeat": 3}
        command = [sys.executable, "tools/bench_objectives.py", "--device", setup.device, "--json"]
        command += ["--dtype", dtype, "--objectives", "cpgd"]
        command += [str(part) for item in sizes.items() for part in item]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        [row] = json.loads(done.stdout)["rows"]
        ours, plain = row["ours"], row["plain"]
        names = (
            () if row["plain_extrapolated"] else ("loss", "grad_hidden_norm", "grad_weight_norm")
        )
        difference = max((abs(ours[n] - plain[n]) / abs(plain[n]) for n in names), default=0.0)
        emit(
            Check(
                name=f"{dtype}, {tokens} tokens, vocabulary {vocab}, hidden {hidden}",
                **verdict(difference < TOLERANCE[dtype], f"differs from plain by {difference:.1e}"),
                figures={
                    "us/token": 1e6 * ours["seconds"] / tokens,
                    "logits GB/s": 4e-9 * tokens * vocab / ours["seconds"],
                    "time ours/plain": ours["seconds"] / plain["seconds"],
                    "memory ours/plain": ours["peak_bytes"] / max(plain["peak_bytes"], 1),
                    "peak GiB": ours["peak_bytes"] / 2**30,
                    "relative difference": difference,
                },
            )
        )
