"""One optimizer step of one model on this device in bf16 and on the CPU in fp32.

Run as a program it is one of the two steps: MODEL PRECISION OUT.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

from megatron_cpgd.algorithm.objective import build_objective
from megatron_cpgd.gpu_check.checks import Check, Emit, Setup, verdict
from megatron_cpgd.gpu_check.trainer import (
    TINY,
    build_policy,
    join_alone,
    make_config,
    make_sequences,
    read_sizes,
    save_random_model,
    set_old_logprobs,
)

LAYERS, SEQUENCES, LENGTH = 4, 8, 64
LOGPROB_MEAN, LOGPROB_MAX, RELATIVE = 0.02, 0.2, 0.05
"""Largest differences; bf16 keeps 8 bits of each number."""


def run(setup: Setup, emit: Emit) -> None:
    """Log-probs before and after the step, loss and gradient norm."""
    folder = Path(setup.scratch) / "parity"
    save_random_model(folder, read_sizes(LAYERS, tiny=True), "cpu")
    processes = [
        _start(folder, "bf16", dict(os.environ)),
        _start(folder, "fp32", os.environ | {"CUDA_VISIBLE_DEVICES": ""}),
    ]
    if any([process.wait() for process in processes]):
        raise RuntimeError("a step failed, see above")
    ours, exact = (torch.load(folder / f"{name}.pt") for name in ("bf16", "fp32"))
    for name in ("before", "after"):
        error = (ours[name] - exact[name]).abs()
        mean, most = error.mean().item(), error.max().item()
        emit(
            Check(
                name=f"log-probs {name} the step",
                **verdict(
                    0 < mean < LOGPROB_MEAN and most < LOGPROB_MAX,
                    f"expected a mean of 0 to {LOGPROB_MEAN} and at most {LOGPROB_MAX}",
                ),
                figures={"mean difference": mean, "largest": most},
            )
        )
    for name in ("loss", "gradient norm"):
        error = abs(ours[name] - exact[name]) / abs(exact[name])
        emit(
            Check(
                name=name,
                **verdict(error < RELATIVE, f"expected a relative difference below {RELATIVE}"),
                figures={"bf16": ours[name], "fp32 on CPU": exact[name], "relative": error},
            )
        )


def _start(folder: Path, precision: str, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "megatron_cpgd.gpu_check.parity", str(folder), precision]
    return subprocess.Popen([*command, str(folder / f"{precision}.pt")], env=environment)


def main(folder: Path, precision: str, out: Path) -> None:
    """One of the two steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    join_alone(Setup(scale="quick" if device == "cuda" else "rehearsal", scratch=""))
    config = make_config(folder, train=precision, micro_tokens=2 * LENGTH, lr=1e-4)
    policy = build_policy(config)
    sequences = make_sequences(SEQUENCES, LENGTH, TINY["vocab_size"])
    before = policy.compute_logprobs(sequences)
    # Old log-probs that both sides share: those of a uniform policy.
    uniform = -torch.tensor(float(TINY["vocab_size"])).log()
    set_old_logprobs(sequences, [uniform.expand(len(values)) for values in before])
    result = policy.train_step(sequences, build_objective(config.algorithm))
    if result.skipped:
        raise RuntimeError(f"the step was skipped: {result.skipped}")
    after = policy.compute_logprobs(sequences)
    torch.save(
        {
            "before": torch.cat(before),
            "after": torch.cat(after),
            "loss": result.metrics["policy/loss"],
            "gradient norm": result.grad_norm,
        },
        out,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
