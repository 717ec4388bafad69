"""The table of a scaling study: one row per cell, measured or simulated alike."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_cpgd.files import write_text_atomic
from megatron_cpgd.planning.outcome import Outcome
from megatron_cpgd.planning.plan import Plan
from megatron_cpgd.study.rows import format_csv
from megatron_cpgd.study.scaling.cells import Cell, Series

PARTS = ("generate", "logprobs", "train", "sync", "other")
"""Parts of a step; log-probs are those of pi_old and of the reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRow:
    """What became of a cell."""

    model: str
    layout: str
    nodes: int
    gpus: int
    prompts: int
    state: str
    """`done`, `failed`, `does not fit` by plan, `impossible`, or `missing`: not run yet."""
    reason: str
    tp: int = 0
    pp: int = 0
    vpp: int = 0
    cp: int = 0
    dp: int = 0
    ep: int = 0
    etp: int = 0
    engine_nodes: int = 0
    engines: int = 0
    engine_tp: int = 0
    recompute: str = ""
    micro_tokens: int = 0
    steps: int = 0
    """That were measured."""
    step_s: float = math.nan
    """Sum of the parts; a part is the median over the measured steps."""
    generate_s: float = math.nan
    """The trainer's wait for responses, scoring aside."""
    logprobs_s: float = math.nan
    train_s: float = math.nan
    sync_s: float = math.nan
    other_s: float = math.nan
    response_tokens: float = math.nan
    """Of a step."""
    tokens: float = math.nan
    """Prompts and responses of a step."""
    mfu: float = math.nan
    """Of the training passes, over the peak of the trainer's GPUs."""
    bubble: float = math.nan
    """Share of the training passes in which a pipeline stage waits, by the plan's formula."""
    memory_gib: float = math.nan
    """Peak of the rank with most; where it is predicted, with what engines have on its GPU."""
    predicted_step_s: float = math.nan
    """With the lengths that were measured, as all predictions beside measurements."""
    predicted_generate_s: float = math.nan
    predicted_logprobs_s: float = math.nan
    predicted_train_s: float = math.nan
    predicted_sync_s: float = math.nan
    predicted_other_s: float = math.nan
    predicted_memory_gib: float = math.nan
    """Of the rank alone, as it is measured."""
    calibrated_step_s: float = math.nan
    """Predicted with the machine that the first cell with a result calibrates."""
    calibrated_memory_gib: float = math.nan

    @property
    def key(self) -> tuple[str, str, int, int]:
        """That of the cell."""
        return self.model, self.layout, self.nodes, self.prompts

    @property
    def tokens_per_s(self) -> float:
        """Prompts and responses over the seconds of the whole step."""
        return self.tokens / self.step_s

    @property
    def response_tokens_per_s(self) -> float:
        """The same of the responses."""
        return self.response_tokens / self.step_s

    @property
    def idle(self) -> float:
        """Share of the step in which the trainer waits for responses."""
        return self.generate_s / self.step_s

    def part(self, name: str) -> float:
        """Seconds of one of PARTS."""
        return float(getattr(self, f"{name}_s"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """All that a report is made of, besides the study file."""

    kind: Literal["measured", "simulated"]
    unit: Literal["GPU", "rank"]
    """What is counted: on CPU, processes."""
    rows: dict[tuple[str, str, int, int], CellRow]
    facts: dict[str, str]
    """Where, when and with which versions."""

    def done(self, series: Series) -> list[CellRow]:
        """The rows of a series that have a result."""
        rows = [self.rows[key] for key in series.keys if key in self.rows]
        return [row for row in rows if row.state == "done"]


def without_result(cell: Cell, state: str, reason: str) -> CellRow:
    """The row of a cell that has no seconds."""
    return CellRow(**_place(cell), state=state, reason=" ".join(reason.split()))


def simulated(cell: Cell) -> CellRow:
    """The row of a cell whose plan fits."""
    plan = cell.plan
    values = _place(cell) | _settings(cell) | _work(plan, plan.seconds.train)
    values |= _parts(asdict(plan.seconds))
    return CellRow(**values, state="done", reason="", memory_gib=plan.fullest.total / 2**30)


def measured(cell: Cell, outcome: Outcome, calibrated: Plan) -> CellRow:
    """The row of a cell that ran.

    Args:
        calibrated: for its lengths, as the plan of the outcome is.
    """
    plan, seconds = outcome.plan, outcome.seconds
    values = _place(cell) | _settings(cell) | _work(plan, seconds["train"]) | _parts(seconds)
    predicted = _parts(asdict(plan.seconds)) | {"memory_gib": plan.worst.total / 2**30}
    values |= {f"predicted_{name}": value for name, value in predicted.items()}
    return CellRow(
        **values, state="done", reason="", steps=outcome.steps,
        memory_gib=math.nan if outcome.memory_gib is None else outcome.memory_gib,
        calibrated_step_s=calibrated.seconds.total,
        calibrated_memory_gib=calibrated.worst.total / 2**30,
    )  # fmt: skip


def write_table(table: Table, folder: Path) -> None:
    """Write table.csv and facts.json."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(row) for row in table.rows.values()]
    write_text_atomic(folder / "table.csv", format_csv(rows))
    facts = {"kind": table.kind} | table.facts
    write_text_atomic(folder / "facts.json", json.dumps(facts, indent=1) + "\n")


def by_key(rows: Iterable[CellRow]) -> dict[tuple[str, str, int, int], CellRow]:
    """Rows under the keys of their cells."""
    return {row.key: row for row in rows}


def _place(cell: Cell) -> dict[str, Any]:
    model, layout, nodes, prompts = cell.key
    return {
        "model": model, "layout": layout, "nodes": nodes, "gpus": cell.gpus, "prompts": prompts,
        "engine_nodes": cell.engine_nodes,
    }  # fmt: skip


def _settings(cell: Cell) -> dict[str, Any]:
    config = cell.config
    sizes = {axis: getattr(config.parallel, axis) for axis in ("tp", "pp", "vpp", "cp", "dp", "ep")}
    return sizes | {
        "etp": config.parallel.etp,
        "engines": config.rollout.engines,
        "engine_tp": int(config.rollout.engine_args.get("tensor_parallel_size") or 1),
        "recompute": config.model.recompute,
        "micro_tokens": config.batch.tokens_per_micro_batch,
    }


def _work(plan: Plan, train_s: float) -> dict[str, Any]:
    requests = plan.workload.requests
    return {
        "response_tokens": requests.prompts * requests.samples * requests.response_tokens,
        "tokens": plan.workload.batch.tokens,
        "mfu": plan.mfu * plan.seconds.train / train_s,
        "bubble": plan.training.bubble / plan.training.total,
    }


def _parts(seconds: Mapping[str, float]) -> dict[str, Any]:
    """Seconds of the step and of PARTS; what is none of the others is in `other`."""
    total = sum(seconds.values())
    known = {
        "generate_s": seconds["generate"],
        "logprobs_s": seconds["old_logprobs"] + seconds["ref_logprobs"],
        "train_s": seconds["train"],
        "sync_s": seconds["sync"],
    }
    return known | {"other_s": total - sum(known.values()), "step_s": total}
