import math

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from megatron_cpgd.tracking.plot import plot_learning_curve

ROWS = [
    {
        "step": step,
        "reward/mean": 1 - math.exp(-step / 20),
        "reward/accuracy": 1 - math.exp(-step / 30),
        "rollout/logprob_abs_diff_mean": 1e-3 * (step % 7),  # 0 cannot be shown on a log axis
        "rollout/logprob_abs_diff_max": 0.1,
        "policy/grad_norm": math.nan if step == 5 else 1 / (1 + step),
        **({"eval/gsm8k/accuracy": step / 100} if step % 10 == 0 else {}),
    }
    for step in range(80)
]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], [{"step": 0}]])
def test_a_plot_is_drawn_from_whatever_there_is(tmp_path, rows):
    plot_learning_curve(rows, tmp_path / "curve.png")
    pixels = matplotlib.image.imread(tmp_path / "curve.png")
    assert pixels.shape[1] > 1000
    assert pixels.std() > 0.01  # not a blank page


def test_each_panel_shows_its_metric_over_the_steps(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plot_learning_curve(ROWS, tmp_path / "curve.png")
    axes = {axis.get_title(): axis for axis in drawn[0].axes}
    (line,) = axes["Held-out accuracy"].lines
    assert list(line.get_xdata()) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert [text.get_text() for text in axes["Held-out accuracy"].get_legend().texts] == ["gsm8k"]
    assert axes["Trainer against engine"].get_yscale() == "log"
    assert len(axes["Gradient norm"].lines[0].get_xdata()) == 79  # without the NaN
    assert [text.get_text() for text in axes["Entropy"].texts] == ["no data"]
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in axes.values())
