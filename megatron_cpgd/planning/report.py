"""A plan for people and for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_cpgd.planning.memory import RankMemory
from megatron_cpgd.planning.plan import Plan
from megatron_cpgd.planning.problems import gib
from megatron_cpgd.planning.search import Candidate


def format_plan(plan: Plan, fixes: Sequence[Candidate] = ()) -> str:
    """Memory, seconds and verdict, and what to change."""
    blocks = [_heading(plan), _memory(plan), _seconds(plan), _verdict(plan)]
    if fixes:
        lines = [f"  {fix.command_line}   ({_brief(fix.plan)})" for fix in fixes]
        blocks.append("\n".join(["It would fit with one of these lines:", *lines]))
    elif not plan.fits:
        blocks.append("No change of up to three settings that were tried makes it fit.")
    return "\n\n".join(blocks) + "\n"


def format_search(
    found: Sequence[Candidate], nearest: Plan | None, gpus: int, *, shown: int = 10
) -> str:
    """The fastest jobs as a table, with the fastest of each place of the engines in any case; or
    what stands in the way of the nearest layout."""
    if not found:
        return _nothing_found(nearest, gpus)
    first: dict[bool, int] = {}
    for i, each in enumerate(found):
        first.setdefault(bool(each.plan.workload.engine.nodes), i)
    numbers = sorted({*range(min(shown, len(found))), *first.values()})
    header = ["#", "s/step", "tokens/s/GPU", "nodes", "train s", "GiB/GPU", "MFU", "settings"]
    rows = [header, *(_search_row(number + 1, found[number]) for number in numbers)]
    unit = "GPUs" if found[0].plan.machine.accelerator else "ranks"
    lines = [f"{len(found)} layouts of {gpus} {unit}, those of engines included, fit."]
    if True in first:
        lines.append('Nodes "3+1": three with the trainer, one with engines.')
        if not any(each.plan.workload.overlap for each in found):
            lines.append(
                "They wait for each other: rollout.staleness=0. With staleness=1 engines sample the"
                "\nnext batch while the trainer works, which changes what is trained on."
            )
    return "\n".join(lines) + f"\n\n{_table(rows)}\n"


def _search_row(number: int, found: Candidate) -> list[str]:
    plan = found.plan
    engine_nodes = plan.workload.engine.nodes
    apart = f"+{engine_nodes}" if engine_nodes else ""
    return [
        str(number),
        f"{plan.seconds.total:.1f}",
        f"{plan.tokens_per_gpu_s:.1f}",
        f"{plan.nodes - engine_nodes}{apart}",
        f"{plan.seconds.train:.1f}",
        f"{_peak(plan) / 2**30:.1f}",
        f"{plan.mfu:.2f}",
        found.command_line,
    ]


def _nothing_found(nearest: Plan | None, gpus: int) -> str:
    if nearest is None:
        return f"No layout of {gpus} GPUs divides the model.\n"
    lines = [
        f"No layout of {gpus} GPUs fits. The nearest one with the engines as they are, "
        f"{_axes(nearest)}:",
        *nearest.problems,
    ]
    return "\n  ".join(lines) + "\n"


def as_json(plan: Plan, fixes: Sequence[Candidate] = ()) -> dict[str, Any]:
    """Everything that is predicted, in bytes and seconds."""
    return {
        "fits": plan.fits,
        "problems": list(plan.problems),
        "tight": list(plan.tight),
        "warnings": list(plan.warnings),
        "machine": plan.machine.name,
        "nodes": plan.nodes,
        "gpus": plan.gpus,
        "parameters": plan.parameters,
        "active_parameters": plan.active_parameters,
        "layout": asdict(plan.layout),
        "tokens": plan.workload.tokens,
        "memory": {
            "worst_stage": plan.fullest.rank.stage,
            "worst_phase": plan.fullest.phase,
            "worst_bytes": plan.fullest.total,
            "stages": [asdict(stage) | {"total": stage.total} for stage in plan.stages],
            "engine": asdict(plan.engine) | {"total": plan.engine.total},
            "hosts": [asdict(host) | {"total": host.total} for host in plan.hosts],
        },
        "seconds": asdict(plan.seconds) | {"total": plan.seconds.total},
        "training": asdict(plan.training),
        "generation": asdict(plan.generation),
        "mfu": plan.mfu,
        "fixes": [{"overrides": fix.overrides, "seconds": fix.plan.seconds.total} for fix in fixes],
    }


def search_as_json(found: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Every layout that fits."""
    return [{"overrides": each.overrides} | as_json(each.plan) for each in found]


def _heading(plan: Plan) -> str:
    requests = plan.workload.requests
    active = ""
    if plan.active_parameters < plan.parameters / 2:
        active = f", {_count(plan.active_parameters)} of them per token"
    return (
        f"{_count(plan.parameters)} parameters{active}; {_axes(plan)}; {plan.layout.world_size} "
        f"ranks on {plan.nodes} x {plan.machine.name}\n"
        f"{requests.prompts * requests.samples} responses of {requests.response_tokens:.0f} tokens "
        f"(assumed mean), prompts of {requests.prompt_tokens:.0f}, {plan.workload.updates} "
        f"optimizer steps"
    )


def _axes(plan: Plan) -> str:
    names = ("tp", "pp", "vpp", "cp", "dp", "ep", "etp")
    sizes = {name: getattr(plan.layout, name) for name in names}
    return " ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "one rank"


def _memory(plan: Plan) -> str:
    worst, beside = plan.worst, plan.beside(plan.worst.stage)
    parts = {
        "weights": worst.weights,
        "FP8 copies": worst.fp8_copies,
        "gradients": worst.gradients,
        "optimizer": worst.optimizer,
        "activations": worst.activations,
        "working set": worst.working,
        "reference": worst.reference,
        "mapped": worst.mapped,
        "overhead": worst.overhead,
        "engine": beside,
    }
    rows = [["memory", f"stage {worst.stage}, the worst"]]
    rows += [[name, gib(size)] for name, size in parts.items() if size]
    rows.append(["total", f"{gib(worst.total + beside)} of {gib(plan.machine.memory)}"])
    if sampling := plan.sampling:
        engines = f", {gib(sampling.engine)} of them the engine's"
        rows.append(["total, sampling", f"{gib(sampling.total)}{engines}"])
    others = [stage for stage in plan.stages if stage.stage != worst.stage]
    if others:
        low, high = min(others, key=_total), max(others, key=_total)
        rows.append(["other stages", f"{gib(low.total)} to {gib(high.total)}"])
    receiver = f", {gib(plan.engine.receiver)} of them to receive weights (assumed)"
    rows.append(["engine's GPU", gib(plan.engine.total) + receiver * (plan.engine.receiver > 0)])
    rows.append(["  KV cache", f"{plan.engine.cache_tokens} tokens"])
    for host in plan.hosts:
        shared = f", {gib(host.arena)} of them in /dev/shm" if host.arena else ""
        rows.append(["host", f"{gib(host.total)} on {host.name}{shared}"])
    return _table(rows)


def _seconds(plan: Plan) -> str:
    seconds, training = plan.seconds, plan.training
    rows = [["seconds", "step", ""]]
    notes = {
        "generate": f"{plan.generation.concurrent:.0f} sequences together, "
        f"{plan.generation.iterations:.0f} iterations",
        "train": ", ".join(
            f"{name.replace('_', ' ')} {value / max(training.total, 1e-9):.0%}"
            for name, value in asdict(training).items()
            if value > 0.02 * training.total
        ),
    }
    for name, value in asdict(seconds).items():
        if value:
            rows.append([name, f"{value:.1f}", notes.get(name, "")])
    rows.append(["total", f"{seconds.total:.1f}", f"MFU of training {plan.mfu:.2f}"])
    return _table(rows)


def _verdict(plan: Plan) -> str:
    lines = [f"warning: {text}" for text in plan.warnings]
    if plan.fits:
        lines += [f"tight: {text}" for text in plan.tight]
        return "\n".join([*lines, f"FITS: {_brief(plan)}"])
    return "\n".join([*lines, *(f"DOES NOT FIT: {text}" for text in plan.problems)])


def _brief(plan: Plan) -> str:
    unit = "GPU" if plan.machine.accelerator else "rank"
    return (
        f"{gib(_peak(plan))} of {gib(plan.machine.memory)} per {unit}, {plan.seconds.total:.1f} s "
        f"per step on {plan.gpus} {unit}s"
    )


def _count(parameters: int) -> str:
    if parameters < 1e9:
        return f"{parameters / 1e6:.2f} M"
    return f"{parameters / 1e9:.2f} B"


def _peak(plan: Plan) -> int:
    return plan.fullest.total


def _total(stage: RankMemory) -> int:
    return stage.total


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns: text left, but the second one right if there are three."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    *inner, _ = range(len(widths))
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [row[i].rjust(widths[i]) for i in inner[1:]]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)
