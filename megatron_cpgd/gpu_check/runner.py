"""Runs sections one after the other, each in a process of its own with a time limit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_cpgd.gpu_check.checks import STACKS_SIGNAL, Check, Setup, read_checks

QUICK_S = 460.0
"""All sections together with --quick."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionResult:
    """What a section reported, and how it ended."""

    name: str
    title: str
    seconds: float
    checks: list[Check]


SECTIONS: dict[str, tuple[str, float]] = {
    "environment": ("This machine, as `megatron-cpgd doctor` sees it", 300),
    "parity": ("One optimizer step in bf16 against fp32 on the CPU", 300),
    "training": ("Optimizer steps: MFU, FP8 against bf16, measured against planned", 900),
    "logprobs": ("Log-probs, entropy and objective against plain PyTorch", 300),
    "quantiser": ("Weights into blocks of FP8", 120),
    "weights": ("Weights from the policy to shared memory and back to a GPU", 300),
    "collectives": ("All-reduce and send between GPUs", 180),
    "engine": ("vLLM: sampling, refreshes, log-probs against the trainer", 900),
    "suite": ("tests/gpu", 1800),
}
"""By module: title and longest time in seconds."""


def run_sections(
    names: Sequence[str], setup: Setup, out: Path, *, root: Path, show: Callable[[str], None]
) -> list[SectionResult]:
    """Logs go to `out`, too.

    Args:
        root: of the repository.
        show: prints a line.
    """
    results = []
    end = time.monotonic() + (QUICK_S if setup.scale == "quick" else float("inf"))
    for name in names:
        title, limit_s = SECTIONS[name]
        limit_s = min(limit_s, end - time.monotonic())
        show(f"{name}: {title}")
        start = time.monotonic()
        if limit_s > 1:
            checks = _run_section(name, setup, out, root=root, limit_s=limit_s)
        else:
            reason = f"the {QUICK_S:.0f} s of --quick are over; --only {name} runs it alone"
            checks = [Check(name=name, status="SKIP", reason=reason)]
        seconds = time.monotonic() - start
        results.append(SectionResult(name=name, title=title, seconds=seconds, checks=checks))
        for check in checks:
            show(f"  {check.status} {check.name} {format_figures(check)} {check.reason}".rstrip())
    return results


def _run_section(name: str, setup: Setup, out: Path, *, root: Path, limit_s: float) -> list[Check]:
    log, answers = out / f"{name}.log", out / f"{name}.jsonl"
    answers.unlink(missing_ok=True)
    command = [sys.executable, "-m", "megatron_cpgd.gpu_check", name]
    environment = os.environ | {"PYTHONPATH": str(root)}
    if setup.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, json.dumps(asdict(setup)), str(answers)],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
            problem = f"ended with exit code {code}: {_last_line(log)}" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"no end within {limit_s:.0f} s: {_last_line(log)}"
            process.send_signal(STACKS_SIGNAL)
            time.sleep(1)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    checks = read_checks(answers)
    if problem or not checks:
        reason = f"{problem or 'reported nothing'}; see {log.name}"
        checks.append(Check(name=name, status="FAIL", reason=reason))
    return checks


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it wrote nothing"


def format_figures(check: Check) -> str:
    """`name value`, three digits of each number."""
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in check.figures.items()
    )
