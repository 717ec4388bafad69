"""The section `algorithm`: the objective, from rewards to denominators. Imports pydantic only."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_cpgd.config.base import Config
from megatron_cpgd.config.merge import merge
from megatron_cpgd.config.presets import PresetName, preset_settings


class ConstantClip(Config):
    """The same clip range for all tokens."""

    type: Literal["constant"] = "constant"
    low: float = Field(0.2, gt=0, lt=1)
    """The policy gradient stops once ratio < 1 - low and A < 0."""
    high: float = Field(0.2, gt=0)
    """The policy gradient stops once ratio > 1 + high and A > 0."""


class TightToLooseClip(Config):
    """epsilon_i = epsilon * (start + (1 - start) * i / |y|), i = 1..|y| (Clarification I)."""

    type: Literal["tight_to_loose"]
    low: float = Field(0.2, gt=0, lt=1)
    """Lower epsilon at the last token."""
    high: float = Field(0.2, gt=0)
    """Upper epsilon at the last token."""
    start: float = Field(0.5, ge=0, le=1)
    """lambda of the paper; 1 is a constant clip. The paper does not publish a value."""


class BalancedClip(Config):
    """BAPO: a range of the ratio, searched before every optimizer step such that tokens with A > 0
    have a share of PPO's objective. Takes one more pass without gradient per optimizer step."""

    type: Literal["balanced"]
    low_start: float = Field(0.6, gt=0, lt=1)
    """Lower bound of the ratio where the search starts (a-)."""
    low_end: float = Field(0.9, gt=0, lt=1)
    """Largest lower bound (b-)."""
    low_step: float = Field(0.02, gt=0)
    """Step of the lower bound (delta_2); it rises when the upper one cannot any more."""
    high_start: float = Field(1.2, gt=1)
    """Upper bound of the ratio where the search starts (a+)."""
    high_end: float = Field(3.0, gt=1)
    """Largest upper bound (b+)."""
    high_step: float = Field(0.05, gt=0)
    """Step of the upper bound (delta_1)."""
    positive_share: float = Field(0.4, gt=0, lt=1)
    """The search ends when tokens with A > 0 have this share (rho_0)."""


class NoClip(Config):
    """No clipping: PG, or PGD with a drift."""

    type: Literal["none"]


Clip = Annotated[
    ConstantClip | TightToLooseClip | BalancedClip | NoClip, Field(discriminator="type")
]


class DriftConfig(Config):
    """The policy drift KL(pi_old, pi_theta) with the gradient-clipped k3 estimator."""

    coef: float = Field(0.01, ge=0)
    """alpha of arXiv:2505.12504 Eq. 2; 0 turns CPGD into CPG."""
    gradient_clip: float = Field(2.0, gt=0)
    """c: the gradient weight ratio - 1 of a token is capped at c."""


class PromptWeightConfig(Config):
    """omega(x), the weight of a prompt's advantages."""

    type: Literal["equal", "std", "clip_filter"] = "std"
    """`equal`: 1; `std`: 1 / std of the group's rewards; `clip_filter`: min(max_weight, prompts /
    prompts with unequal rewards), one number for the whole rollout batch."""
    max_weight: float = Field(3.0, ge=1)
    """Bound of `clip_filter`."""


class AdvantageConfig(Config):
    """What the reward is compared with, before prompt_weight multiplies it."""

    baseline: Literal["group_mean", "leave_one_out", "none"] = "group_mean"
    """`group_mean`; `leave_one_out`: the mean of the group's other responses (RLOO); `none`: 0."""
    whiten: bool = False
    """Then centre and scale over all response tokens of the rollout batch (REINFORCE++)."""
    overlong_buffer_tokens: int | None = Field(None, ge=1)
    """DAPO's overlong shaping: over the last so many tokens below rollout.max_response_tokens the
    reward falls linearly by 1; null is off."""


class FilterConfig(Config):
    """Which responses are trained on (DAPO's dynamic sampling and overlong filtering)."""

    max_batches: int | None = Field(None, ge=1)
    """Groups of equal rewards, before overlong shaping, are replaced: so many batches of prompts at
    most are sampled until rollout.prompts_per_step groups have unequal rewards; with fewer the step
    trains on those. 1 drops without replacing; null keeps all groups."""
    truncated: Literal["keep", "mask"] = "keep"
    """`mask`: no loss on responses that were cut at rollout.max_response_tokens; their rewards
    still count in the group."""


class LogRatioTerm(Config):
    """CPGD: min(l A, clip(l) A) with l = log ratio. Without a clip range REINFORCE."""

    type: Literal["log_ratio"] = "log_ratio"


class RatioTerm(Config):
    """PPO, GRPO, DAPO: min(r A, clip(r) A) with the token's ratio r."""

    type: Literal["ratio"]
    dual_clip: float | None = Field(None, gt=1)
    """No policy gradient where A < 0 and r exceeds this (arXiv:1912.09729); null is off."""


class SequenceRatioTerm(Config):
    """GSPO: PPO's term with the geometric mean of the response's ratios."""

    type: Literal["sequence_ratio"]


class GeometricMeanTerm(Config):
    """GMPO: the geometric mean of ratios that are clipped token by token."""

    type: Literal["geometric_mean"]


class CappedWeightTerm(Config):
    """CISPO: REINFORCE with the weight clip(r, low, high); no token loses its gradient."""

    type: Literal["capped_weight"]
    low: float = Field(0.0, ge=0, le=1)
    """Least weight; the paper has none."""
    high: float = Field(5.0, ge=1)
    """Largest weight. The paper does not publish its value."""


class SoftGateTerm(Config):
    """SAPO: 4 / tau * sigmoid(tau (r - 1)) A, a smooth clip."""

    type: Literal["soft_gate"]
    positive_temperature: float = Field(1.0, gt=0)
    """tau where A > 0."""
    negative_temperature: float = Field(1.05, gt=0)
    """tau where A <= 0."""


class ProbabilityMaskTerm(Config):
    """DPPO with total variation: REINFORCE with the weight min(r, max_ratio), masked where the
    probability has left its anchor's by more than a threshold in the direction of A."""

    type: Literal["probability_mask"]
    threshold: float = Field(0.2, gt=0, lt=1)
    """Largest difference of probabilities."""
    max_ratio: float = Field(20.0, ge=1)
    """Largest weight."""
    anchor: Literal["old", "rollout"] = "old"
    """Policy to stay near: the trainer's before the batch, or the sampler's as it reported it."""


class JointWeightTerm(Config):
    """MiniRL: REINFORCE with the weight min(pi_theta / sampler, cap) inside PPO's clip range."""

    type: Literal["joint_weight"]
    cap: float = Field(5.0, ge=1)
    """Largest weight."""


class SequenceWeightTerm(Config):
    """VESPO: REINFORCE with W^power * exp(decay (1 - W)), W the ratio of the whole response."""

    type: Literal["sequence_weight"]
    positive_power: float = Field(2.0, ge=0)
    """power where A >= 0."""
    positive_decay: float = Field(3.0, ge=0)
    """decay where A >= 0."""
    negative_power: float = Field(3.0, ge=0)
    """power where A < 0."""
    negative_decay: float = Field(2.0, ge=0)
    """decay where A < 0."""
    anchor: Literal["old", "rollout"] = "old"
    """Denominator of W: the trainer's policy before the batch, or the sampler's."""


class PrefixMinTerm(Config):
    """MinPRO: PPO's term with the token's ratio times the smallest ratio before it."""

    type: Literal["prefix_min"]


PolicyTerm = Annotated[
    LogRatioTerm
    | RatioTerm
    | SequenceRatioTerm
    | GeometricMeanTerm
    | CappedWeightTerm
    | SoftGateTerm
    | ProbabilityMaskTerm
    | JointWeightTerm
    | SequenceWeightTerm
    | PrefixMinTerm,
    Field(discriminator="type"),
]


class ReferenceConfig(Config):
    """KL(pi_theta, pi_ref) as part of the loss."""

    coef: float = Field(0.0, ge=0)
    """beta; 0 is off."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """k3 is GRPO's; k2 has the gradient of the reverse KL; k1 has none in expectation."""
    path: Path | None = None
    """Hugging Face folder of the reference policy, of the same architecture as the policy; default:
    model.path. A resumed run reads it again."""


class NoCorrection(Config):
    """Tokens count as if the trainer had sampled them."""

    type: Literal["none"] = "none"


class TruncatedWeight(Config):
    """Truncated importance sampling (TIS): min(rho, high), rho = trainer / sampler."""

    type: Literal["truncate"]
    level: Literal["token", "sequence", "geometric"] = "token"
    """rho of the token, the product over its response, or the geometric mean over it."""
    high: float = Field(2.0, ge=1)
    """Largest weight."""
    normalise: bool = False
    """Divide by the mean weight of the optimizer step's kept tokens."""


class ClippedWeight(Config):
    """Clipped importance sampling (CIS): clip(rho, low, high)."""

    type: Literal["clip"]
    level: Literal["token", "sequence", "geometric"] = "token"
    """rho of the token, the product over its response, or the geometric mean over it."""
    low: float = Field(0.5, gt=0, le=1)
    """Least weight."""
    high: float = Field(2.0, ge=1)
    """Largest weight."""
    normalise: bool = False
    """Divide by the mean weight of the optimizer step's kept tokens."""


class BandWeight(Config):
    """Masked importance sampling (MIS, IcePop): rho inside [low, high], 0 outside."""

    type: Literal["band"]
    level: Literal["token", "sequence", "geometric"] = "token"
    """rho of the token, the product over its response, or the geometric mean over it."""
    low: float = Field(0.5, ge=0, le=1)
    """Least ratio that counts."""
    high: float = Field(5.0, ge=1)
    """Largest ratio that counts."""
    normalise: bool = False
    """Divide by the mean weight of the optimizer step's kept tokens."""


Correction = Annotated[
    NoCorrection | TruncatedWeight | ClippedWeight | BandWeight, Field(discriminator="type")
]


class RejectionConfig(Config):
    """Responses that are left out because trainer and sampler disagree; denominators stay."""

    geometric_low: float | None = Field(None, gt=0, le=1)
    """Reject if the geometric mean of rho is below; null is off."""
    geometric_high: float | None = Field(None, ge=1)
    """Reject if the geometric mean of rho is above; null is off."""
    veto: float | None = Field(None, gt=0, lt=1)
    """Reject if rho of any token is below; null is off. Usual: 1e-4."""
    off_policy_delta: float | None = Field(None, gt=0)
    """Off-policy sequence mask (DeepSeek-V3.2): reject if A < 0 and the mean of log sampler - log
    pi_theta exceeds this, for the live policy; null is off."""


class AggregationConfig(Config):
    """What a token's loss is divided by, on the whole optimizer step."""

    type: Literal[
        "group_token_mean",
        "token_mean",
        "sequence_mean_token_mean",
        "sequence_mean_token_sum",
        "sequence_sum_over_length",
    ] = "group_token_mean"
    """`group_token_mean`: token mean in each prompt's group, mean over prompts (CPGD, Eq. 2);
    `token_mean`: all tokens (DAPO); `sequence_mean_token_mean`: mean in each response (GRPO);
    `sequence_mean_token_sum`: sum in each response; `sequence_sum_over_length`: that over a
    constant (Dr. GRPO)."""
    length: int = Field(4096, ge=1)
    """The constant of `sequence_sum_over_length`, usually rollout.max_response_tokens."""


class AlgorithmConfig(Config):
    """The objective: a preset, and settings over it. CPGD (arXiv:2505.12504, Eq. 2) is the default;
    docs/objectives.md has the equations of the others."""

    preset: PresetName = "cpgd"
    """Method whose settings lie below the ones given here."""
    advantage: AdvantageConfig = AdvantageConfig()
    """Rewards to advantages."""
    filter: FilterConfig = FilterConfig()
    """Groups and responses that are left out."""
    old_policy: Literal["trainer", "sampler"] = "trainer"
    """pi_old, the anchor of ratio, clip and drift. `trainer`: its log-probs right before a batch is
    trained on, one more forward pass. `sampler`: those that the engine reported, so that staleness
    and the engine's own rounding count as a change of the policy."""
    routing_replay: Literal["none", "old_policy", "rollout"] = "none"
    """Experts of a mixture of experts while a batch is trained on. `none`: the routers choose;
    `old_policy` (R2): those that the trainer's routers chose in the pass of old_policy=trainer;
    `rollout` (R3): those that the engine chose while sampling, also in that pass."""
    policy: PolicyTerm = LogRatioTerm()
    """Shape of the policy term."""
    clip: Clip = ConstantClip()
    """Clip range of the ratio; its logarithm bounds the log-ratio."""
    drift: DriftConfig = DriftConfig()
    """Policy drift."""
    reference: ReferenceConfig = ReferenceConfig()
    """Reference policy."""
    prompt_weight: PromptWeightConfig = PromptWeightConfig()
    """Weight of a prompt's advantages."""
    correction: Correction = NoCorrection()
    """Importance weight between sampler and trainer; on the policy term and the drift."""
    rejection: RejectionConfig = RejectionConfig()
    """Masks between sampler and trainer."""
    aggregation: AggregationConfig = AggregationConfig()
    """Denominators."""
    mini_batches: int = Field(4, ge=1)
    """Optimizer steps per pass over a rollout batch; cut by prompt group."""
    epochs: int = Field(1, ge=1)
    """Passes over a rollout batch; with the policy term `log_ratio`, later ones carry the truncated
    weight of section 6.1."""

    @property
    def reads_rollout_logprobs(self) -> bool:
        """Whether the loss itself, beside the correction, reads what the sampler reported."""
        anchor = getattr(self.policy, "anchor", "old")
        joint = isinstance(self.policy, JointWeightTerm)
        return joint or anchor == "rollout" or self.rejection.off_policy_delta is not None

    @model_validator(mode="before")
    @classmethod
    def _lay_over_preset(cls, given: Any) -> Any:
        return merge(cls.below(given), given) if isinstance(given, dict) else given

    @classmethod
    def below(cls, given: dict[str, Any]) -> dict[str, Any]:
        """What lies below the given settings: the sections' defaults, and over them the preset."""
        fields = cls.model_fields.items()
        defaults = {n: f.default.model_dump() for n, f in fields if isinstance(f.default, Config)}
        preset = preset_settings(given.get("preset", cls.model_fields["preset"].default))
        return merge(defaults, preset)  # type: ignore[no-any-return]
