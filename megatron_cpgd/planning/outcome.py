"""Predicted against measured: a finished run as the formulas would have it, and what they lack."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from megatron_cpgd.config.load import read_config
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import UserError
from megatron_cpgd.planning.estimate import make_plan
from megatron_cpgd.planning.machine import Machine, find_machine, with_factors
from megatron_cpgd.planning.model import read_model
from megatron_cpgd.planning.plan import Plan
from megatron_cpgd.planning.workload import Lengths
from megatron_cpgd.tracking.metrics import read_metrics
from megatron_cpgd.tracking.run_folder import RunFolder
from megatron_cpgd.weights.hf_checkpoint import read_config as read_model_config

PHASES = ("generate", "reload", "old_logprobs", "ref_logprobs", "train", "sync", "other")
"""Fields of `StepSeconds`; measured as `time/<phase>_s`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A run beside its prediction for the lengths that it had."""

    plan: Plan
    seconds: Mapping[str, float]
    """Of each phase, the median over the steps."""
    steps: int
    """That were measured."""
    memory_gib: float | None
    """Of the rank with most, the median over the steps, since a checkpoint may need more; None: was
    not measured."""

    @property
    def train_ratio(self) -> float:
        """Measured over predicted of the trainer's passes."""
        parts = ("old_logprobs", "ref_logprobs", "train")
        measured = sum(self.seconds[part] for part in parts)
        return measured / sum(self.predicted(part) for part in parts)

    def ratio(self, phase: str) -> float:
        """Measured over predicted of one phase."""
        return self.seconds[phase] / self.predicted(phase)

    def predicted(self, phase: str) -> float:
        """Seconds of one phase."""
        return float(getattr(self.plan.seconds, phase))


def read_outcome(
    folder: RunFolder, machine: Machine | None = None, *, warmup_steps: int = 1
) -> Outcome:
    """A run that has finished a step after its first ones, which warm up and are left out.

    Args:
        machine: default: what the run has noted of its own.

    Raises:
        UserError: something of it is missing.
    """
    if not folder.metrics.exists() or not folder.config.exists():
        raise UserError(f"{folder.dir}: has no metrics.jsonl and config.yaml of a run")
    rows = [row for row in read_metrics(folder.metrics) if "time/train_s" in row][warmup_steps:]
    if not rows:
        raise UserError(f"{folder.metrics}: needs at least {warmup_steps + 1} trained steps")
    if machine is None:
        if not folder.machine.exists():
            raise UserError(f"{folder.machine}: no such file; name a machine")
        machine = find_machine(str(folder.machine))
    config = read_config(folder.config)
    model = read_model(read_model_config(config.model.path))
    plan = make_plan(model, config, machine, _measured_lengths(rows, config))
    seconds = {phase: median(_phase_s(row, phase) for row in rows) for phase in PHASES}
    peaks = [row["perf/memory_peak_gib"] for row in rows if "perf/memory_peak_gib" in row]
    return Outcome(
        plan=plan, seconds=seconds, steps=len(rows), memory_gib=median(peaks) if peaks else None
    )  # fmt: skip


def calibrate(outcome: Outcome) -> Machine:
    """The machine of the plan with the factors that make its prediction of this run right."""
    before, plan = outcome.plan.machine.efficiency, outcome.plan
    memory = before.rank_memory
    # On CPU a process has little beside its tensors; the rest is a share of these.
    if outcome.memory_gib is not None and plan.machine.accelerator:
        formulas = plan.worst.total - memory
        memory = max(int(outcome.memory_gib * 2**30) - formulas, 0)
    return with_factors(
        plan.machine,
        train_factor=before.train_factor * outcome.train_ratio,
        generate_factor=before.generate_factor * _generate_ratio(outcome),
        sync_factor=before.sync_factor * outcome.ratio("sync"),
        other_s=outcome.seconds["other"],
        rank_memory=memory,
    )


def _generate_ratio(outcome: Outcome) -> float:
    """1 if sampling was hidden behind training: its time is then not known."""
    return outcome.ratio("generate") if outcome.predicted("generate") else 1.0


def predicted_and_measured(folder: RunFolder) -> list[str]:
    """Lines for the report of a run; a word why there is none. Never raises."""
    try:
        return format_outcome(read_outcome(folder))
    except Exception as error:  # a report is no reason to lose a run
        return [f"predicted and measured: none, {error}"]


def format_outcome(outcome: Outcome) -> list[str]:
    """A table, one line per phase, and memory."""
    rows = [
        (f"{phase} s", outcome.predicted(phase), seconds)
        for phase, seconds in outcome.seconds.items()
    ]
    rows.append(("step s", outcome.plan.seconds.total, sum(outcome.seconds.values())))
    if outcome.memory_gib is not None:
        rows.append(("memory GiB", outcome.plan.worst.total / 2**30, outcome.memory_gib))
    lines = [f"{'':14}{'predicted':>10}{'measured':>10}{'ratio':>8}"]
    for name, predicted, measured in rows:
        ratio = f"{measured / predicted:8.2f}" if predicted else f"{'-':>8}"
        if predicted or measured:
            lines.append(f"{name:14}{predicted:10.3f}{measured:10.3f}{ratio}")
    return lines


def _phase_s(row: Mapping[str, Any], phase: str) -> float:
    """Rewards are in no formula and count as the rest; waiting for sampling counts as sampling, and
    for engines to fall asleep as what they make room for."""
    more = {
        "other": "time/score_s", "generate": "time/wait_s", "reload": "time/sleep_s"
    }.get(phase, "")  # fmt: skip
    return float(row.get(f"time/{phase}_s", 0.0)) + float(row.get(more, 0.0))


def _measured_lengths(rows: Sequence[Mapping[str, Any]], config: ExperimentConfig) -> Lengths:
    """Means over the steps; the tokens of a step give what its prompts had."""
    rollout = config.rollout
    sequences = rollout.prompts_per_step * rollout.samples_per_prompt
    response = fmean(row["rollout/response_tokens_mean"] for row in rows)
    lengths = [
        row["perf/tokens_per_s"] * row["time/train_s"] / config.algorithm.epochs / sequences
        for row in rows
        if "perf/tokens_per_s" in row
    ]
    prompt = max(fmean(lengths) - response, 1.0) if lengths else config.data.max_prompt_tokens
    longest = fmean(row["rollout/response_tokens_max"] for row in rows)
    return Lengths(prompt=prompt, response=response, longest=int(longest))
