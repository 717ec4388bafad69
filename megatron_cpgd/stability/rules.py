"""The named causes of a collapse, each one condition on one metric.

What precedes a collapse, and how often it is seen without one, is in docs/stability.md.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A cause, named like the setting of section `stability` that holds its threshold."""

    cause: str
    metric: str
    kind: Literal["above", "falls", "rises", "counts"]
    """`above`: the metric exceeds the threshold. `falls`: it is lower than its highest running
    median by this share of it. `rises`: it is this much higher than its lowest running median.
    `counts`: it counts what happened in a row, and the threshold takes the place of patience."""
    unless_gain: bool = False
    """Holds only while the reward is no better than at the time of the highest or lowest median."""
    acts: Literal["never", "as_set", "always"] = "as_set"
    """Whether `stability.action` applies; `always`: the run ends even if it is `warn` or `off`."""
    advice: str


RULES = (
    Rule(
        cause="reward_drop",
        metric="reward/mean",
        kind="falls",
        advice="look for a cause that began before it; else a smaller optim.lr, fewer "
        "algorithm.mini_batches, or a tighter algorithm.clip",
    ),
    Rule(
        cause="length_collapse",
        metric="rollout/response_tokens_mean",
        kind="falls",
        unless_gain=True,
        advice="read rollouts/: a reward that a short answer earns too, or an unbounded loss on "
        "A < 0 (set algorithm.clip); algorithm.aggregation decides how length is weighted",
    ),
    Rule(
        cause="length_explosion",
        metric="rollout/truncated_frac",
        kind="rises",
        unless_gain=True,
        advice="set algorithm.advantage.overlong_buffer_tokens or raise "
        "rollout.max_response_tokens",
    ),
    Rule(
        cause="entropy_collapse",
        metric="policy/entropy",
        kind="falls",
        unless_gain=True,
        advice="a larger upper clip (algorithm.clip.high), a smaller optim.lr, or harder prompts",
    ),
    Rule(
        cause="entropy_explosion",
        metric="policy/entropy",
        kind="rises",
        unless_gain=True,
        advice="a smaller optim.lr; look for rollout/kl_k3 and policy/unclipped_high_frac, A < 0 "
        "without a bound spreads the distribution",
    ),
    Rule(
        cause="ratio_explosion",
        metric="policy/ratio_p999",
        kind="above",
        advice="fewer algorithm.mini_batches or epochs, a smaller optim.lr, or an objective that "
        "bounds A < 0 above the clip range (log_ratio, dual_clip)",
    ),
    Rule(
        cause="gradient_explosion",
        metric="policy/grad_norm_z",
        kind="above",
        advice="a smaller optim.lr or optim.grad_clip; compare policy/ratio_p999 and rollout/kl_k3",
    ),
    Rule(
        cause="drift_explosion",
        metric="policy/kl_k3",
        kind="above",
        advice="a smaller optim.lr, fewer algorithm.mini_batches or epochs, or a larger "
        "algorithm.drift.coef",
    ),
    Rule(
        cause="mismatch",
        metric="rollout/kl_k3",
        kind="above",
        advice="trainer and engine sample from different policies: set algorithm.correction or "
        "algorithm.rejection, and compare precision.rollout with precision.train",
    ),
    Rule(
        cause="repetition",
        metric="rollout/repetition_frac",
        kind="rises",
        advice="read rollouts/ for loops; a reward for them, or a policy pushed off its "
        "distribution by optim.lr",
    ),
    Rule(
        cause="no_signal",
        metric="reward/zero_variance_frac",
        kind="above",
        acts="never",
        advice="all responses of a prompt score the same, so nothing is learnt: easier or harder "
        "prompts, more rollout.samples_per_prompt, or the run is done",
    ),
    Rule(
        cause="not_finite",
        metric="policy/skipped_in_a_row",
        kind="counts",
        acts="always",
        advice="policy/skipped_reason names the first number that was not finite; a smaller "
        "optim.lr may hold",
    ),
)
