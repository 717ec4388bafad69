"""The plots of a scaling study: small SVG files; equal tables give equal files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_cpgd.study.scaling.cells import Series
from megatron_cpgd.study.scaling.fits import fit_amdahl, fit_weak
from megatron_cpgd.study.scaling.table import PARTS, CellRow, Table

_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b")
_PART_COLOURS = dict(
    zip(PARTS, ("#9ecae1", "#fdd0a2", "#3182bd", "#e6550d", "#bdbdbd"), strict=True)
)
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "scaling study", "font.size": 9}


def draw_series(all_series: Sequence[Series], table: Table, path: Path) -> None:
    """Seconds of a step with the fitted law, tokens per second and GPU, and the parts of a step.

    Args:
        all_series: of the same kind, model and batch: one for each layout.
    """
    kind = all_series[0].kind
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 3.2), layout="constrained")
        seconds, rate, parts = figure.subplots(1, 3)
        for series, colour in zip(all_series, _cycle(len(all_series)), strict=True):
            rows = table.done(series)
            if not rows:
                continue
            gpus = [row.gpus for row in rows]
            _draw_seconds(seconds, series, rows, colour)
            rate.plot(
                gpus, [row.tokens_per_s / row.gpus for row in rows],
                marker="o", ms=4, color=colour, label=series.layout,
            )  # fmt: skip
        seconds.set_ylabel("seconds of a step")
        rate.set_ylabel(f"tokens / s / {table.unit}")
        rate.set_ylim(0, 1.1 * rate.get_ylim()[1])
        if kind == "strong":
            seconds.set_yscale("log")
        else:
            seconds.set_ylim(0, 1.1 * seconds.get_ylim()[1])
        _draw_parts(parts, fastest(all_series, table))
        ticks = sorted({row.gpus for series in all_series for row in table.done(series)})
        for axis in (seconds, rate):
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [str(n) for n in ticks], rotation=45 if len(ticks) > 6 else 0)
            axis.grid(alpha=0.3)
            axis.set_xlabel(f"{table.unit}s")
        if len(all_series) > 1:
            rate.legend(fontsize=8)
        seconds.legend(fontsize=8)
        title = f"{all_series[0].model}, {kind} scaling, {table.kind}"
        figure.suptitle(title, fontsize=10)
        # Without the date, which says nothing about the data.
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def fastest(all_series: Sequence[Series], table: Table) -> list[CellRow]:
    """The row with the shortest step of every number of GPUs."""
    best: dict[int, CellRow] = {}
    for row in (row for series in all_series for row in table.done(series)):
        if row.gpus not in best or row.step_s < best[row.gpus].step_s:
            best[row.gpus] = row
    return [best[gpus] for gpus in sorted(best)]


def _draw_seconds(axis: Axes, series: Series, rows: Sequence[CellRow], colour: str) -> None:
    points = [(float(row.gpus), row.step_s) for row in rows]
    axis.plot(*zip(*points, strict=True), "o", ms=4, color=colour, label=series.layout)
    law: Callable[[float], float] | None
    if series.kind == "strong":
        amdahl = fit_amdahl(points)
        law, name = amdahl.at if amdahl else None, "Amdahl"
        ideal = [rows[0].step_s * rows[0].gpus / row.gpus for row in rows]
    else:
        weak = fit_weak(points)
        law, name = weak.at if weak else None, "a + b log2 n"
        ideal = [rows[0].step_s for _ in rows]
    gpus = [n for n, _ in points]
    if law:
        first = not axis.lines[1:]  # one entry of the legend for all layouts
        axis.plot(
            gpus, [law(n) for n in gpus], "--", lw=1, color=colour, label=name if first else None
        )
        axis.plot(gpus, ideal, ":", lw=1, color=colour, label="ideal" if first else None)


def _draw_parts(axis: Axes, rows: Sequence[CellRow]) -> None:
    """Shares of the step on every number of GPUs."""
    bottom = [0.0] * len(rows)
    for part in PARTS:
        shares = [row.part(part) / row.step_s for row in rows]
        if any(share > 0.001 for share in shares):
            axis.bar(range(len(rows)), shares, bottom=bottom, color=_PART_COLOURS[part], label=part)
        bottom = [below + share for below, share in zip(bottom, shares, strict=True)]
    axis.set_xticks(
        range(len(rows)), [str(row.gpus) for row in rows], rotation=45 if len(rows) > 6 else 0
    )
    axis.set_xlabel("fastest layout of each number")
    axis.set_ylabel("share of the step")
    axis.set_ylim(0, 1)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]
