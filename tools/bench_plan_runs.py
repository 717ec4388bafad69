"""Complete runs on this machine against their plans: seconds of a step and memory of a rank.

    python tools/bench_plan_runs.py --out runs/bench_plan

Random models of several sizes train for a few steps on two ranks, with vLLM. `plan --calibrate`
fits the machine to the first run, and all others are predicted with it, but not their memory,
which is not calibrated on CPU. Runs that are there are not made again. Seconds are wall time: let
the machine do nothing else.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from megatron_cpgd.config.yaml_io import format_yaml
from megatron_cpgd.demo.arithmetic import split_problems
from megatron_cpgd.demo.tokenizer import build_tokenizer
from megatron_cpgd.planning.machine import cpu_machine
from megatron_cpgd.planning.outcome import Outcome, calibrate, read_outcome
from megatron_cpgd.tracking.run_folder import RunFolder

LONGEST = 64
"""Tokens of a sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run."""

    hidden: int
    layers: int
    parallel: dict[str, int] = field(default_factory=lambda: {"tp": 2})
    experts: int = 0
    prompts: int = 16

    @property
    def model(self) -> str:
        kind = f"_{self.experts}_experts" if self.experts else ""
        return f"{self.layers}_x_{self.hidden}{kind}"

    @property
    def name(self) -> str:
        axes = "_".join(f"{axis}{size}" for axis, size in self.parallel.items())
        return f"{self.model}_{axes}_{self.prompts}"


CASES = (
    Case(hidden=512, layers=8),
    Case(hidden=512, layers=8, parallel={"dp": 2}),
    Case(hidden=512, layers=8, parallel={"pp": 2}),
    Case(hidden=256, layers=6),
    Case(hidden=256, layers=6, prompts=32),
    Case(hidden=768, layers=10),
    Case(hidden=768, layers=10, parallel={"dp": 2}),
    Case(hidden=256, layers=4, experts=8),
    Case(hidden=256, layers=4, experts=8, parallel={"dp": 2, "ep": 2}),
    # The constants of memory were chosen before these.
    Case(hidden=384, layers=12),
    Case(hidden=640, layers=6, parallel={"dp": 2}),
    Case(hidden=384, layers=5, experts=4),
    Case(hidden=384, layers=5, experts=4, parallel={"dp": 2}),
)


def main() -> None:
    """Make the runs that are missing and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the models and runs")
    parser.add_argument("--steps", type=int, default=6, help="of each run; the first is left out")
    arguments = parser.parse_args()
    folders = [make_run(case, arguments.out, arguments.steps) for case in CASES]
    machine = calibrate(read_outcome(folders[0], cpu_machine()))
    sys.stdout.write("measured / predicted, calibrated on the first run\n")
    sys.stdout.write(" | ".join(["run", *PARTS]) + "\n")
    for case, folder in zip(CASES, folders, strict=True):
        ratios = find_ratios(read_outcome(folder, machine))
        sys.stdout.write(" | ".join([case.name, *(f"{ratio:.2f}" for ratio in ratios)]) + "\n")


PARTS = ("step", "trainer's passes", "generate", "sync", "memory")


def find_ratios(outcome: Outcome) -> Iterator[float]:
    """Of `PARTS`; the memory is that of the fullest rank."""
    yield sum(outcome.seconds.values()) / outcome.plan.seconds.total
    yield outcome.train_ratio
    yield outcome.ratio("generate")
    yield outcome.ratio("sync")
    assert outcome.memory_gib is not None, "every run measures it"
    yield outcome.memory_gib * 2**30 / outcome.plan.worst.total


def make_run(case: Case, out: Path, steps: int) -> RunFolder:
    """Train, unless it was done."""
    folder = RunFolder(out / case.name)
    if folder.metrics.exists() and len(folder.metrics.read_text().splitlines()) >= steps:
        return folder
    config = out / f"{case.name}.yaml"
    model = save_model(case, out / "models" / case.model)
    config.write_text(format_yaml(settings(case, model, folder.dir, steps)))
    command = [sys.executable, "-m", "megatron_cpgd.cli", "train", str(config)]
    sys.stderr.write(f"{' '.join(command)}\n")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def settings(case: Case, model: Path, run: Path, steps: int) -> dict[str, Any]:
    """Of a run in fp32; every response is as long as allowed unless the end is sampled."""
    return {
        "run": {"dir": str(run), "steps": steps},
        "model": {"path": str(model)},
        "parallel": dict(case.parallel),
        "precision": {"train": "fp32"},
        "data": {"path": str(model.parent / "problems.jsonl"), "max_prompt_tokens": 16},
        "rollout": {
            "prompts_per_step": case.prompts,
            "samples_per_prompt": 8,
            "max_response_tokens": LONGEST - 16,
        },
        "rewards": {"workers": 1, "functions": [{"type": "format", "pattern": "[0-9].*"}]},
        "batch": {"tokens_per_micro_batch": 1024},
        "tracking": {"machine": "cpu"},
    }


def save_model(case: Case, path: Path) -> Path:
    """Random weights with the tokenizer of the demo, and problems beside the models."""
    if path.exists():
        return path
    tokenizer = build_tokenizer(max_length=LONGEST)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": case.hidden, "num_hidden_layers": case.layers,
        "intermediate_size": 3 * case.hidden, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": case.hidden // 8, "max_position_embeddings": 128, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }  # fmt: skip
    config: PretrainedConfig = Qwen3Config(**sizes)
    if case.experts:
        config = Qwen3MoeConfig(
            **sizes, num_experts=case.experts, num_experts_per_tok=2,
            moe_intermediate_size=case.hidden, norm_topk_prob=True,
        )  # fmt: skip
    AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    tokenizer.save_pretrained(path)
    problems = split_problems(random.Random(0), train=64, heldout=0, hard_share=0.5)
    rows = [{"prompt": problem.prompt, "answer": str(problem.answer)} for problem in problems.train]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (path.parent / "problems.jsonl").write_text(text)
    return path


if __name__ == "__main__":
    main()
