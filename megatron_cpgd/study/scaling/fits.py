"""Laws of scaling, fitted to few points, with 95 % intervals where there are enough of them.

Amdahl: G. Amdahl, "Validity of the single processor approach to achieving large scale computing
capabilities", 1967. Least squares of relative errors: a second on 4096 GPUs counts as much as a
minute on 8.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_cpgd.study.intervals import Interval, t_quantile

type Points = Sequence[tuple[float, float]]
"""(GPUs, seconds of a step)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Amdahl:
    """t(n) = seconds * (serial + (1 - serial) * first / n), where `first` is the smallest n."""

    first: float
    seconds: float
    serial: Interval
    """Share of `seconds` that more GPUs do not shorten."""
    worst: float = 0.0
    """Largest |law / point - 1|."""

    def at(self, gpus: float) -> float:
        """Seconds on so many GPUs."""
        serial = self.serial.value
        return self.seconds * (serial + (1 - serial) * self.first / gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """t(n) = a * n ** -exponent; an exponent of 1 is perfect."""

    a: float
    exponent: Interval
    worst: float = 0.0
    """As of Amdahl."""

    def at(self, gpus: float) -> float:
        """Seconds on so many GPUs."""
        return float(self.a * gpus**-self.exponent.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weak:
    """t(n) = seconds + per_doubling * log2(n / first), for a batch that grows with n."""

    first: float
    seconds: float
    per_doubling: Interval
    worst: float = 0.0
    """As of Amdahl."""

    def at(self, gpus: float) -> float:
        """Seconds on so many GPUs."""
        return self.seconds + self.per_doubling.value * math.log2(gpus / self.first)


def fit_amdahl(points: Points) -> Amdahl | None:
    """None: fewer than two numbers of GPUs."""
    first = min((n for n, _ in points), default=1.0)
    line = _fit_line([(first / n, t, 1 / t**2) for n, t in points])
    if line is None:
        return None
    total = line.intercept + line.slope
    serial = line.intercept / total
    # Delta method: d serial / d intercept = slope / total^2, d / d slope = -intercept / total^2.
    by_intercept, by_slope = line.slope / total**2, -line.intercept / total**2
    variance = (
        by_intercept**2 * line.var_intercept
        + by_slope**2 * line.var_slope
        + 2 * by_intercept * by_slope * line.covariance
    )
    law = Amdahl(first=first, seconds=total, serial=_interval(serial, variance, line.degrees))
    return replace(law, worst=_worst(points, law.at))


def fit_power(points: Points) -> Power | None:
    """None: fewer than two numbers of GPUs."""
    line = _fit_line([(math.log(n), math.log(t), 1.0) for n, t in points])
    if line is None:
        return None
    exponent = _interval(-line.slope, line.var_slope, line.degrees)
    law = Power(a=math.exp(line.intercept), exponent=exponent)
    return replace(law, worst=_worst(points, law.at))


def fit_weak(points: Points) -> Weak | None:
    """None: fewer than two numbers of GPUs."""
    first = min((n for n, _ in points), default=1.0)
    line = _fit_line([(math.log2(n / first), t, 1 / t**2) for n, t in points])
    if line is None:
        return None
    per_doubling = _interval(line.slope, line.var_slope, line.degrees)
    law = Weak(first=first, seconds=line.intercept, per_doubling=per_doubling)
    return replace(law, worst=_worst(points, law.at))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """y = intercept + slope * x."""

    intercept: float
    slope: float
    var_intercept: float
    var_slope: float
    covariance: float
    degrees: int
    """Points beyond the two that every line meets."""


def _fit_line(points: Sequence[tuple[float, float, float]]) -> _Line | None:
    """Weighted least squares of (x, y, weight), the variance of the errors estimated from them."""
    if len({x for x, _, _ in points}) < 2:
        return None
    total = math.fsum(w for _, _, w in points)
    mean_x = math.fsum(w * x for x, _, w in points) / total
    mean_y = math.fsum(w * y for _, y, w in points) / total
    spread = math.fsum(w * (x - mean_x) ** 2 for x, _, w in points)
    slope = math.fsum(w * (x - mean_x) * (y - mean_y) for x, y, w in points) / spread
    intercept = mean_y - slope * mean_x
    degrees = len(points) - 2
    errors = math.fsum(w * (y - intercept - slope * x) ** 2 for x, y, w in points)
    variance = errors / degrees if degrees else math.nan
    return _Line(
        intercept=intercept, slope=slope, degrees=degrees,
        var_intercept=variance * (1 / total + mean_x**2 / spread),
        var_slope=variance / spread,
        covariance=-variance * mean_x / spread,
    )  # fmt: skip


def _interval(value: float, variance: float, degrees: int) -> Interval:
    """Student's t; NaN ends without a degree of freedom."""
    if not degrees:
        return Interval(value, math.nan, math.nan)
    half = t_quantile(degrees) * math.sqrt(max(variance, 0.0))
    return Interval(value, value - half, value + half)


def _worst(points: Points, law: Callable[[float], float]) -> float:
    return max(abs(law(n) / t - 1) for n, t in points)
