"""The plots of a study; equal tables give equal files."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_cpgd.study.intervals import Interval, mean_interval, rate_interval
from megatron_cpgd.study.spec import Question, Study, find_setting
from megatron_cpgd.study.tables import Tables, assess, moving_means

_COLOURS = (
    "#000000", "#d62728", "#1f77b4", "#ff7f0e", "#2ca02c",
    "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#17becf",
)  # fmt: skip
_COLLAPSED = "#d62728"
_HEALTHY = "#1f77b4"
_COLUMNS = 5
_DYNAMICS = (
    ("grad_norm", "gradient norm before clipping", True),
    ("kl", "KL(old, new) of a batch, k3", True),
    ("entropy", "entropy, nats per token", False),
    ("response_tokens", "response length, tokens", False),
)
"""Column of steps.csv, its label, whether the axis is logarithmic."""


def draw_figures(study: Study, question: Question, tables: Tables, folder: Path) -> list[Path]:
    """Write the PNGs of a question, in the order of its `figures`."""
    draw: dict[str, Callable[[Study, Question, Tables], Figure]] = {
        "curves": _draw_curves,
        "outcome": _draw_outcome,
        "dynamics": _draw_dynamics,
        "sensitivity": _draw_sensitivity,
    }
    paths = []
    for name in question.spec.figures:
        path = folder / f"{question.name}_{name}.png"
        # Without the metadata of the library's version, which says nothing about the data.
        draw[name](study, question, tables).savefig(path, dpi=80, metadata={"Software": None})
        paths.append(path)
    return paths


def _draw_curves(study: Study, question: Question, tables: Tables) -> Figure:
    """One panel per arm: moving mean of the training accuracy of every seed, and their mean."""
    arms = [arm.name for arm in question.arms]
    columns = min(_COLUMNS, len(arms))
    rows = math.ceil(len(arms) / columns)
    figure = Figure(figsize=(1 + 2.5 * columns, 0.7 + 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axis, arm in zip(axes, arms, strict=False):
        courses = []
        for seed, run in tables.of(arm).items():
            curve = tables.curves[arm, seed]
            accuracy = [value for value in curve["accuracy"] if not math.isnan(value)]
            course = assess(accuracy, study.spec.collapse, diverged=run.outcome == "diverged")
            colour = _COLLAPSED if course.collapsed else _HEALTHY
            axis.plot(range(1, len(accuracy) + 1), course.means, color=colour, lw=0.8, alpha=0.6)
            courses.append(course.means)
        _draw_band(axis, _by_step(courses), colour="black")
        axis.set_title(arm, fontsize=10)
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    for axis in axes[len(arms) :]:
        axis.set_visible(False)
    for axis in axes[::columns]:
        axis.set_ylabel("training accuracy")
    for place, axis in enumerate(axes[: len(arms)]):
        if place + columns >= len(arms):  # nothing below it
            axis.set_xlabel("step")
            axis.tick_params(labelbottom=True)
    return figure


def _draw_outcome(study: Study, question: Question, tables: Tables) -> Figure:
    """Collapse rate, final held-out accuracy and its difference from the reference."""
    arms = [arm.name for arm in question.arms]
    figure = Figure(figsize=(12, 1.2 + 0.32 * len(arms)), layout="constrained")
    rate_axis, final_axis, difference_axis = figure.subplots(1, 3, sharey=True)
    for place, arm in enumerate(arms):
        runs = list(tables.of(arm).values())
        collapsed = sum(run.collapsed for run in runs)
        rate = rate_interval(collapsed, len(runs))
        rate_axis.barh(place, rate.value, color=_COLLAPSED, alpha=0.35, height=0.7)
        _draw_interval(rate_axis, rate, place)
        rate_axis.text(1.03, place, f"{collapsed}/{len(runs)}", va="center", fontsize=9)
        finals = [run.heldout_final for run in runs]
        final_axis.plot(finals, [place] * len(finals), "o", color=_HEALTHY, ms=4, alpha=0.5)
        _draw_interval(final_axis, mean_interval(finals), place)
        differences = paired_differences(tables, arm, question.reference)
        if arm != question.reference:
            difference_axis.plot(
                differences, [place] * len(differences), "o", color=_HEALTHY, ms=4, alpha=0.5
            )
            _draw_interval(difference_axis, mean_interval(differences), place)
    rate_axis.set_yticks(range(len(arms)), arms)
    rate_axis.invert_yaxis()
    rate_axis.set_xlim(0, 1.18)
    rate_axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
    rate_axis.set_xlabel("share of runs that collapsed")
    final_axis.set_xlim(-0.02, 1.02)
    final_axis.set_xlabel("final held-out accuracy")
    difference_axis.axvline(0, color="black", lw=1)
    difference_axis.set_xlim(-1, 1)
    difference_axis.set_xticks([-1, -0.5, 0, 0.5, 1])
    difference_axis.set_xlabel(f"minus {question.reference}, same seed")
    for axis in figure.axes:
        axis.grid(alpha=0.3, axis="x")
    return figure


def _draw_dynamics(study: Study, question: Question, tables: Tables) -> Figure:
    """Means over the seeds of moving means; on a log axis all means are geometric."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True).flat
    for axis, (column, label, log) in zip(axes, _DYNAMICS, strict=True):
        if log:
            axis.set_yscale("log")
        for arm, colour in _colours(
            question.reference, [arm.name for arm in question.arms]
        ).items():
            curves = []
            for seed in tables.of(arm):
                values = tables.curves[arm, seed][column][1:]
                if log:  # a step without any advantage has a gradient of 0: left out
                    values = [math.log(v) if v > 0 else math.nan for v in values]
                curves.append(moving_means(values, study.spec.collapse.window))
            steps, alpha = _by_step(curves), 0.4 / max(4, len(question.arms))
            _draw_band(axis, steps, colour=colour, alpha=alpha, label=arm, log=log)
        # To the curves: the band of few runs that disagree would flatten them.
        shown = [float(y) for line in axis.lines for y in line.get_ydata()]
        shown = [y for y in shown if math.isfinite(y)]
        if shown:
            low, high = min(shown), max(shown)
            room = 0.1 * (high - low)
            axis.set_ylim((low / 2, high * 2) if log else (low - room, high + room))
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    for axis in figure.axes[2:]:
        axis.set_xlabel("step")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    return figure


def _draw_sensitivity(study: Study, question: Question, tables: Tables) -> Figure:
    """Outcome over the setting `x`; arms of the same preset are connected."""
    assert question.spec.x
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    final_axis, rate_axis = figure.subplots(1, 2)
    lines: dict[str, list[tuple[float, str]]] = {}
    for arm in question.arms:
        x = float(find_setting(arm.config, question.spec.x))
        lines.setdefault(arm.config.algorithm.preset, []).append((x, arm.name))
    all_xs = sorted({x for points in lines.values() for x, _ in points})
    log = all_xs[0] > 0 and all_xs[-1] >= 5 * all_xs[0]
    for place, (preset, points) in enumerate(lines.items()):
        # Side by side, so that no curve hides another one's interval.
        aside = place - (len(lines) - 1) / 2
        step = 0.012 * (all_xs[-1] - all_xs[0])
        xs = [x * 1.03**aside if log else x + aside * step for x, _ in sorted(points)]
        colour = _COLOURS[place % len(_COLOURS)]
        runs = [list(tables.of(arm).values()) for _, arm in sorted(points)]
        finals = [mean_interval([run.heldout_final for run in of_arm]) for of_arm in runs]
        rates = [rate_interval(sum(r.collapsed for r in of_arm), len(of_arm)) for of_arm in runs]
        for axis, intervals in ((final_axis, finals), (rate_axis, rates)):
            values = [each.value for each in intervals]
            errors = [
                [each.value - each.low for each in intervals],
                [each.high - each.value for each in intervals],
            ]
            axis.errorbar(xs, values, errors, color=colour, marker="o", capsize=4, label=preset)
    for axis, label in ((final_axis, "final held-out accuracy"), (rate_axis, "collapse rate")):
        if log:
            axis.set_xscale("log")
            axis.minorticks_off()
        axis.set_xticks(all_xs, [f"{x:g}" for x in all_xs])
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel(question.spec.x)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    handles, labels = final_axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    return figure


def paired_differences(tables: Tables, arm: str, reference: str) -> list[float]:
    """Final held-out accuracy minus the reference's, for every seed that both have."""
    ours, theirs = tables.of(arm), tables.of(reference)
    return [
        ours[seed].heldout_final - theirs[seed].heldout_final for seed in ours if seed in theirs
    ]


def _colours(reference: str, names: Sequence[str]) -> dict[str, str]:
    """Black is the reference."""
    black, *others = _COLOURS
    rest = iter(others)
    return {name: black if name == reference else next(rest, black) for name in names}


def _by_step(curves: Sequence[Sequence[float]]) -> list[list[float]]:
    """Values of all runs that got to a step; NaN left out."""
    longest = max(map(len, curves), default=0)
    return [
        [curve[t] for curve in curves if t < len(curve) and not math.isnan(curve[t])]
        for t in range(longest)
    ]


def _draw_band(
    axis: Axes,
    steps: Sequence[Sequence[float]],
    *,
    colour: str,
    alpha: float = 0.12,
    label: str | None = None,
    log: bool = False,
) -> None:
    """Mean over the runs with its 95 % interval; `log`: the values are logarithms."""
    intervals = [mean_interval(values) for values in steps]
    if log:
        intervals = [Interval(*map(math.exp, (i.value, i.low, i.high))) for i in intervals]
    xs = range(1, len(intervals) + 1)
    axis.plot(xs, [each.value for each in intervals], color=colour, lw=1.6, label=label)
    low, high = [each.low for each in intervals], [each.high for each in intervals]
    axis.fill_between(xs, low, high, color=colour, alpha=alpha, lw=0)


def _draw_interval(axis: Axes, interval: Interval, place: float) -> None:
    axis.plot([interval.low, interval.high], [place, place], color="black", lw=1.5)
    axis.plot([interval.value], [place], "|", color="black", ms=11, mew=2)
