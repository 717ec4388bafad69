"""Watches the metrics of a run step by step and names the cause when it collapses.

    detector = CollapseDetector(config.stability)
    for row in rows:
        for finding in detector.observe(row["step"], row):
            print(finding.message)

Deterministic, and its state is JSON, so a resumed run comes to the same verdicts.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from megatron_cpgd.config.stability import StabilityConfig
from megatron_cpgd.stability.rules import RULES, Rule

_REWARD, _GRAD_NORM, _GRAD_NORM_Z = "reward/mean", "policy/grad_norm", "policy/grad_norm_z"
_NOISE = 3.0
"""A fall or rise of less than so many spreads of the window it is compared with is no finding."""
_SURE = 0.9
"""A fall by this share is one, however noisy that window was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A condition that has lasted long enough; it is reported once, until it ends."""

    cause: str
    step: int
    onset: int
    """First of the steps in a row for which the condition holds."""
    expected: str
    came: float
    advice: str
    acts: str
    """See `Rule.acts`."""

    @property
    def message(self) -> str:
        """One line: where, what was expected, what came, what to do."""
        return (
            f"step {self.step}: {self.cause} since step {self.onset}: expected {self.expected}, "
            f"came {self.came:.4g}; {self.advice}"
        )


class CollapseDetector:
    """The rules that a configuration switches on, and what they remember of earlier steps."""

    _windows: dict[str, list[float]]
    """Metric -> its last values, at most `window`."""
    _extremes: dict[str, tuple[float, float, float | None]]
    """Cause -> its highest or lowest running median, the spread of that window, the running median
    of the reward at that time (None: unknown)."""
    _held: dict[str, tuple[int, int]]
    """Cause -> (first step, number of steps) for which its condition holds without a break."""

    def __init__(self, config: StabilityConfig) -> None:
        """With action `off` only the rules that always act are watched."""
        self._config = config
        self._rules = [
            rule
            for rule in RULES
            if getattr(config, rule.cause) is not None
            and (config.action != "off" or rule.acts == "always")
        ]
        self._remembered = {r.metric for r in self._rules if r.kind in ("falls", "rises")}
        self._remembered |= {_REWARD, _GRAD_NORM} if config.action != "off" else set()
        self.reset()

    def reset(self) -> None:
        """Forget everything: what comes is another policy."""
        self._windows, self._extremes, self._held = {}, {}, {}

    def observe(self, step: int, metrics: Mapping[str, Any]) -> list[Finding]:
        """Findings that are due at this step and were not before.

        A metric that is missing says nothing about its rules; nan breaks every limit.

        Args:
            metrics: of the step, as in its row of metrics.jsonl.
        """
        metrics = {**metrics, **self.grad_norm_z(metrics)}
        findings = [
            finding
            for rule in self._rules
            if rule.metric in metrics
            and (finding := self._apply(rule, step, float(metrics[rule.metric])))
        ]
        self._remember(metrics)
        return findings

    def grad_norm_z(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """`policy/grad_norm_z` of a step that comes next: (norm - median) / spread of the window.

        The spread is at least a tenth of the median, lest equal norms make a spike of nothing.
        """
        window = self._windows.get(_GRAD_NORM, [])
        if _GRAD_NORM not in metrics or not self._is_enough(window):
            return {}
        middle = median(window)
        spread = max(_spread(window), 0.1 * middle)
        return {_GRAD_NORM_Z: (float(metrics[_GRAD_NORM]) - middle) / spread} if spread else {}

    @property
    def causes(self) -> list[str]:
        """Causes that were reported and whose condition still holds."""
        return [
            rule.cause
            for rule in self._rules
            if rule.cause in self._held and self._held[rule.cause][1] >= self._steps_needed(rule)
        ]

    def earliest_onset(self, step: int) -> int:
        """No later finding has its onset before this step, given the steps up to `step`."""
        return min([step + 1, *(first for first, _ in self._held.values())])

    def state(self) -> dict[str, Any]:
        """What `load_state` needs, as JSON can hold it."""
        return {
            "windows": {metric: list(values) for metric, values in self._windows.items()},
            "extremes": dict(self._extremes),
            "held": dict(self._held),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where the detector that gave `state` was; thresholds may differ."""
        self._windows = {
            metric: values[-self._config.window :] for metric, values in state["windows"].items()
        }
        self._extremes = {cause: (x, y, z) for cause, (x, y, z) in state["extremes"].items()}
        self._held = {cause: (first, count) for cause, (first, count) in state["held"].items()}

    def _apply(self, rule: Rule, step: int, value: float) -> Finding | None:
        limit, expected = self._limit(rule)
        broken = limit is not None and not (
            value >= limit if rule.kind == "falls" else value <= limit
        )
        if not broken or (rule.unless_gain and self._has_gained(rule)):
            self._held.pop(rule.cause, None)
            return None
        onset, count = self._held.get(rule.cause, (step, 0))
        due = self._steps_needed(rule)
        new = int(value) if rule.kind == "counts" else count + 1
        self._held[rule.cause] = (onset, new)
        if not count < due <= new:
            return None
        return Finding(
            cause=rule.cause, step=step, onset=onset, expected=expected, came=value,
            advice=rule.advice, acts=rule.acts,
        )  # fmt: skip

    def _steps_needed(self, rule: Rule) -> int:
        return self._config.not_finite if rule.kind == "counts" else self._config.patience

    def _limit(self, rule: Rule) -> tuple[float | None, str]:
        """What the metric must not pass, None as long as it is unknown; and the same in words."""
        threshold = float(getattr(self._config, rule.cause))
        if rule.kind == "counts":
            return 0.0, f"fewer than {threshold:g} optimizer steps in a row without an update"
        if rule.kind == "above":
            return threshold, f"{rule.metric} <= {threshold:g}"
        if rule.cause not in self._extremes:
            return None, ""
        extreme, spread, _ = self._extremes[rule.cause]
        if rule.kind == "falls":
            noise = min(_NOISE * spread, _SURE * abs(extreme))
            limit, name = extreme - max(threshold * abs(extreme), noise), "highest"
        else:
            limit, name = extreme + max(threshold, _NOISE * spread), "lowest"
        sign = ">=" if rule.kind == "falls" else "<="
        return limit, f"{rule.metric} {sign} {limit:.4g} ({name} running median {extreme:.4g})"

    def _has_gained(self, rule: Rule) -> bool:
        """By more than the noise of the reward, which a flat one passes every few steps."""
        now, before = self._median_reward(), self._extremes[rule.cause][2]
        return (
            now is not None
            and before is not None
            and now - before > _spread(self._windows[_REWARD])
        )

    def _median_reward(self) -> float | None:
        rewards = self._windows.get(_REWARD)
        return median(rewards) if rewards else None

    def _remember(self, metrics: Mapping[str, Any]) -> None:
        for metric in self._remembered & metrics.keys():
            if math.isfinite(value := float(metrics[metric])):
                window = self._windows.setdefault(metric, [])
                window.append(value)
                del window[: -self._config.window]
        for rule in self._rules:
            window = self._windows.get(rule.metric, [])
            if rule.kind not in ("falls", "rises") or not self._is_enough(window):
                continue
            now, before = median(window), self._extremes.get(rule.cause)
            if before is None or (now > before[0] if rule.kind == "falls" else now < before[0]):
                self._extremes[rule.cause] = (now, _spread(window), self._median_reward())

    def _is_enough(self, window: list[float]) -> bool:
        return 2 * len(window) >= self._config.window


def find_collapses(rows: Iterable[Mapping[str, Any]], config: StabilityConfig) -> list[Finding]:
    """The findings of a run from the rows of its metrics.jsonl, roll backs included."""
    detector = CollapseDetector(config)
    findings = []
    for row in rows:
        findings += detector.observe(row["step"], row)
        if "stability/rolled_back_to" in row:
            detector.reset()
    return findings


def _spread(values: list[float]) -> float:
    """Standard deviation of a normal distribution with the median absolute deviation of these."""
    middle = median(values)
    return 1.4826 * median(abs(value - middle) for value in values)
