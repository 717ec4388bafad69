"""Every setting of a run: type, default, bound and meaning. Imports pydantic only."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_cpgd.config.merge import merge
from megatron_cpgd.config.presets import PresetName, preset_settings

Seconds = Annotated[float, Field(gt=0)]


class Config(BaseModel):
    """Base of all sections: unknown keys are errors and a loaded config never changes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class RunConfig(Config):
    """Where the run lives and how long it goes on."""

    dir: Path
    """Output folder. Starting the same command again resumes what is in it."""
    steps: int = Field(gt=0)
    """Rollout steps; each generates, scores, trains and refreshes the engine once."""
    seed: int = Field(0, ge=0, lt=1_000_000)
    """Seed of the prompt order, the sampling and the dropout streams."""


class ModelConfig(Config):
    """The policy and how it is computed."""

    path: Path
    """Folder of a Hugging Face checkpoint: config.json, safetensors, tokenizer."""
    tokenizer: Path | None = None
    """Folder of the tokenizer; default: `path`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint or the tokenizer. Off unless you trust it."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recompute: `selective` redoes the core attention, `full` every layer."""
    megatron: dict[str, Any] = Field(default_factory=dict)
    """Further fields of Megatron-Core's TransformerConfig, checked against its field names."""


class ParallelConfig(Config):
    """Sizes of the parallel axes; the number of trainer processes is tp * pp * cp * dp."""

    tp: int = Field(1, ge=1)
    """Tensor parallel size; divides the attention heads and the KV heads."""
    pp: int = Field(1, ge=1)
    """Pipeline parallel size; pp * vpp divides the layers."""
    vpp: int = Field(1, ge=1)
    """Virtual pipeline chunks per rank (interleaved schedule); needs pp > 1."""
    cp: int = Field(1, ge=1)
    """Context parallel size: every sequence is cut over this many ranks."""
    dp: int = Field(1, ge=1)
    """Data parallel size: sequences are spread over this many replicas."""
    sequence_parallel: bool = True
    """Shard norms and residuals over the tensor-parallel ranks; has no effect at tp = 1."""

    @property
    def world_size(self) -> int:
        """Trainer processes."""
        return self.tp * self.pp * self.cp * self.dp


class PrecisionConfig(Config):
    """Number formats of the trainer and the sampler."""

    train: Literal["bf16", "fp32"] = "bf16"
    """Weights and activations of the policy; with bf16 the optimizer keeps fp32 copies."""
    rollout: Literal["bf16", "fp32"] | None = None
    """Weights of the engine; default: as `train`."""


class DataConfig(Config):
    """Prompts for training."""

    path: Path
    """A .jsonl or .parquet file, or a folder written by `datasets.Dataset.save_to_disk`."""
    prompt_key: str = "prompt"
    """Column with the prompt: a string (becomes one user message) or a list of chat messages."""
    answer_key: str | None = "answer"
    """Column with the ground truth; null if the rewards need none."""
    system_prompt: str | None = None
    """System message put before every prompt."""
    chat_template: bool = True
    """Render prompts with the tokenizer's chat template; false feeds the string as it is."""
    shuffle: bool = True
    """Draw a new order, fixed by run.seed, for every pass over the data."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Prompts longer than this are refused or dropped, see `too_long`."""
    too_long: Literal["error", "drop"] = "error"
    """What to do with a prompt over `max_prompt_tokens`."""


class RolloutConfig(Config):
    """Sampling, and the engine that does it."""

    prompts_per_step: int = Field(128, ge=1)
    """P: prompts of one rollout batch."""
    samples_per_prompt: int = Field(8, ge=1)
    """G: responses sampled for each prompt."""
    max_response_tokens: int = Field(4096, ge=1)
    """A response is cut here (finish reason `length`)."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the trainer scales its logits the same way."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; values below 1 truncate the sampling distribution."""
    top_k: int = Field(-1, ge=-1)
    """Top-k sampling; -1 is off."""
    logprob_diff_limit: float | None = Field(None, gt=0)
    """Stop with a weight-sync error when the mean |trainer - engine| log-prob difference of a step
    exceeds this; null only logs it. Needs top_p = 1 and top_k = -1."""
    start_timeout_s: Seconds = 600.0
    """Longest wait for the engine to load."""
    step_timeout_s: Seconds = 3600.0
    """Longest wait for one generation or one weight refresh."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further fields of vLLM's EngineArgs, checked against its field names."""


class MathReward(Config):
    """1 if the final answer equals the ground truth mathematically (math-verify), else 0."""

    type: Literal["math"]
    weight: float = 1.0
    """Factor of this reward in the sum."""


class ExactMatchReward(Config):
    """1 if the response, stripped of white space, equals the ground truth, else 0."""

    type: Literal["exact_match"]
    weight: float = 1.0
    """Factor of this reward in the sum."""
    after: str | None = None
    """Compare only what follows the last occurrence of this text; 0 if it is missing."""


class FormatReward(Config):
    """1 if the whole response matches a regular expression, else 0."""

    type: Literal["format"]
    weight: float = 1.0
    """Factor of this reward in the sum."""
    pattern: str
    """Python regular expression, matched against the whole response with DOTALL."""


class PythonReward(Config):
    """A function of yours, `module.function(response: str, answer, fields: dict) -> float`."""

    type: Literal["python"]
    weight: float = 1.0
    """Factor of this reward in the sum."""
    path: str
    """Dotted path of the function; it is imported in the reward workers."""


Reward = Annotated[
    MathReward | ExactMatchReward | FormatReward | PythonReward, Field(discriminator="type")
]


class RewardsConfig(Config):
    """Reward functions and the processes that run them."""

    functions: list[Reward] = Field(min_length=1)
    """The reward is the weighted sum; `reward/accuracy` is the share with the first one > 0."""
    workers: int = Field(2, ge=1)
    """Worker processes."""
    timeout_s: Seconds = 10.0
    """Longest time of one call; a call that exceeds it scores 0 and is counted."""


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


class NoClip(Config):
    """No clipping: PG, or PGD with a drift."""

    type: Literal["none"]


Clip = Annotated[ConstantClip | TightToLooseClip | NoClip, Field(discriminator="type")]


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
    """beta. This version has no reference policy and refuses any other value than 0."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """k3 is GRPO's; k2 has the gradient of the reverse KL; k1 has none in expectation."""


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


class OptimConfig(Config):
    """Adam and its schedule."""

    lr: float = Field(1e-6, gt=0)
    """Learning rate after warm-up."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of a decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of Adam's first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of Adam's second moment."""
    eps: float = Field(1e-8, gt=0)
    """Adam's epsilon."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay of matrices; norms and biases have none."""
    grad_clip: float = Field(1.0, gt=0)
    """Bound of the global gradient norm."""
    distributed: bool = True
    """Shard the optimizer state over the data-parallel ranks."""


class BatchConfig(Config):
    """How sequences become micro-batches. None of it changes the gradient."""

    format: Literal["packed", "padded"] = "packed"
    """`packed`: sequences one behind the other (THD); `padded`: one row each (BSHD)."""
    tokens_per_micro_batch: int = Field(16384, ge=1)
    """Token budget of one forward-backward pass of one data-parallel rank, padding included."""
    tokens_per_logprob_batch: int | None = Field(None, ge=1)
    """Token budget of a pass without gradient; default: twice the one above."""
    logprob_chunk_tokens: int = Field(4096, ge=1)
    """Tokens whose logits exist at one time."""


class EvalSet(Config):
    """Held-out prompts."""

    path: Path
    """As data.path, with the same columns."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses per prompt; the accuracy is their mean."""
    temperature: float = Field(0.0, ge=0)
    """0 decodes greedily."""
    max_prompts: int | None = Field(None, ge=1)
    """Use only the first ones."""


class EvalConfig(Config):
    """Accuracy on held-out prompts, by the engine."""

    sets: dict[str, EvalSet] = Field(default_factory=dict)
    """Name -> prompts; logged as `eval/<name>/accuracy`."""
    every: int = Field(10, ge=1)
    """Steps between evaluations; step 0 and the last step are always evaluated."""


class CheckpointConfig(Config):
    """What is kept of the run."""

    every: int = Field(50, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints to keep."""
    export_every: int | None = Field(None, ge=1)
    """Steps between Hugging Face exports; the last step is always exported."""


class TrackingConfig(Config):
    """What is written about the run."""

    rollouts_per_step: int = Field(4, ge=0)
    """Rollouts written to rollouts/step_N.jsonl at each step."""
    max_bad_steps: int = Field(3, ge=1)
    """Optimizer steps in a row with a loss or gradient that is not finite before the run stops."""


class ExperimentConfig(Config):
    """One run. A YAML file states what it changes; `defaults: [other.yaml]` inherits."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    rewards: RewardsConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optim: OptimConfig = OptimConfig()
    batch: BatchConfig = BatchConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
