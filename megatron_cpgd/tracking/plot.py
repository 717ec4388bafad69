"""learning_curve.png: did it learn, and did it stay stable?"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

type Rows = Sequence[Mapping[str, Any]]

_PANELS = (
    ("Reward", "reward", {"reward/mean": "mean", "reward/accuracy": "accuracy"}),
    (
        "Trainer against engine",
        "|log-prob difference|",
        {
            "rollout/logprob_abs_diff_mean": "mean over tokens",
            "rollout/logprob_abs_diff_max": "largest",
        },
    ),
    ("Response length", "tokens", {"rollout/response_tokens_mean": "mean"}),
    ("Entropy", "nats per token", {"policy/entropy": "policy"}),
    ("Gradient norm", "before clipping", {"policy/grad_norm": "global"}),
)


def plot_learning_curve(rows: Rows, path: Path) -> None:
    """Draw evaluation accuracy, reward and the signs of trouble over the steps.

    Args:
        rows: of metrics.jsonl; metrics that are missing leave their panel empty.
        path: PNG to write; its folder exists.
    """
    # A Figure of its own, without pyplot: it needs no display and leaves no global state.
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True).flat
    names = sorted({name for row in rows for name in row if name.startswith("eval/")})
    sets = {name: name.split("/")[1] for name in names if name.endswith("/accuracy")}
    panels = [("Held-out accuracy", "accuracy", sets), *_PANELS]
    for axis, (title, label, curves) in zip(axes, panels, strict=True):
        _draw(axis, rows, curves)
        axis.set_title(title)
        axis.set_ylabel(label)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _draw(axis: Axes, rows: Rows, curves: Mapping[str, str]) -> None:
    drawn = False
    log = any("logprob" in name for name in curves)
    for name, label in curves.items():
        points = [(row["step"], float(row[name])) for row in rows if name in row]
        # A zero difference is perfect agreement, but a log axis cannot show it.
        points = [(s, v) for s, v in points if math.isfinite(v) and (v > 0 or not log)]
        if points:
            marker = "o" if len(points) <= 50 else None
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, label=label, marker=marker, markersize=3, linewidth=1.5)
            drawn = True
    if not drawn:
        axis.text(0.5, 0.5, "no data", transform=axis.transAxes, ha="center", color="0.5")
        return
    if log:
        axis.set_yscale("log")
    axis.legend()
