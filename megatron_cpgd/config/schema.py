"""Every setting of a run: type, default, bound and meaning. Imports pydantic only."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_cpgd.config.algorithm import AlgorithmConfig
from megatron_cpgd.config.base import Config
from megatron_cpgd.config.router import RouterConfig
from megatron_cpgd.config.stability import StabilityConfig

Seconds = Annotated[float, Field(gt=0)]

FP8_RECIPES: dict[str, Literal["blockwise", "tensorwise", "delayed", "mxfp8"]] = {
    "fp8_blockwise": "blockwise",
    "fp8_tensorwise": "tensorwise",
    "fp8_delayed": "delayed",
    "mxfp8": "mxfp8",
}
"""`precision.train` -> Megatron-Core's `fp8_recipe`."""


class RunConfig(Config):
    """Where the run lives and how long it goes on."""

    dir: Path
    """Output folder. Starting the same command again resumes what is in it."""
    steps: int = Field(gt=0)
    """Rollout steps; each generates, scores, trains and refreshes the engine once."""
    seed: int = Field(0, ge=0, lt=1_000_000)
    """Seed of the prompt order and the sampling; nothing else is random."""


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
    """Pipeline parallel size; pp * vpp divides the layers, unless `stage_layers` is given."""
    vpp: int = Field(1, ge=1)
    """Virtual pipeline chunks per rank (interleaved schedule); needs pp > 1."""
    stage_layers: list[Annotated[int, Field(ge=1)]] | None = None
    """Layers of each of the pp * vpp stages, in the order of the layers: with vpp > 1 the stages 0,
    pp, 2 * pp ... are those of the first rank. Default: equally many."""
    cp: int = Field(1, ge=1)
    """Context parallel size: every sequence is cut over this many ranks."""
    dp: int = Field(1, ge=1)
    """Data parallel size: sequences are spread over this many replicas."""
    sequence_parallel: bool = True
    """Shard norms and residuals over the tensor-parallel ranks; has no effect at tp = 1. A mixture
    of experts needs it."""
    ep: int = Field(1, ge=1)
    """Expert parallel size: rank e holds the e-th share of the experts of every layer. It takes no
    further processes: ep * etp divides tp * cp * dp."""
    etp: int = Field(1, ge=1)
    """Tensor parallel size inside an expert; attention and dense layers keep `tp`."""

    @property
    def world_size(self) -> int:
        """Trainer processes."""
        return self.tp * self.pp * self.cp * self.dp


class PrecisionConfig(Config):
    """Number formats of the trainer and the sampler."""

    train: Literal["bf16", "fp32", "fp8_blockwise", "fp8_tensorwise", "fp8_delayed", "mxfp8"] = (
        "bf16"
    )
    """Weights and activations of the policy; with bf16 the optimizer keeps fp32 copies. The others
    are bf16 whose layers multiply in FP8, by the recipes of Transformer Engine; see precision.md.
    """
    fp8_format: Literal["e4m3", "hybrid"] = "e4m3"
    """FP8 numbers of gradients: as weights and activations, or `hybrid`: e5m2, of wider range."""
    bf16_layers: int = Field(0, ge=0)
    """With FP8: this many of the first layers and of the last ones stay in bf16."""
    rollout: Literal["bf16", "fp32", "fp8_block"] | None = None
    """Weights of the engine; default: those of the policy. fp8_block: linear layers in FP8, a
    factor for each block of 128 x 128."""

    @property
    def recipe(self) -> Literal["blockwise", "tensorwise", "delayed", "mxfp8"] | None:
        """How the policy's layers multiply in FP8, as Megatron-Core calls it; None: they do not."""
        return FP8_RECIPES.get(self.train)

    @property
    def policy_weights(self) -> Literal["bf16", "fp32"]:
        """Number format of the policy's parameters."""
        return "fp32" if self.train == "fp32" else "bf16"

    @property
    def engine_weights(self) -> Literal["bf16", "fp32", "fp8_block"]:
        """Number format of the engine's weights."""
        return self.rollout or self.policy_weights


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
    staleness: int = Field(0, ge=0)
    """Batches sampled ahead: a step trains on responses of the weights so many steps before its
    own, as when sampling and training run side by side. 0 is on-policy."""
    piece_tokens: int | None = Field(None, ge=1)
    """Partial rollouts: a step samples at most so many tokens of a response at a time, until
    `prompts_per_step` groups are finished; the responses of other groups go on in later steps, by
    the weights of then. Divides `max_response_tokens`. null: each response in one go."""
    groups_in_flight: int | None = Field(None, ge=1)
    """With `piece_tokens`: prompts that are sampled at a time, at least `prompts_per_step`;
    default: twice that."""
    overlap: bool = False
    """Sample the waiting batches while a step trains, instead of before it; the batches are the
    same. Needs a staleness of at least 1; pays off if engine and trainer share no processors."""
    engines: int = Field(1, ge=1)
    """Engine processes; each answers a share of the prompts."""
    devices: list[Annotated[int, Field(ge=0)]] | None = None
    """CUDA devices of the engines, as rank 0 numbers them, in equal shares one after the other;
    null: every engine sees all of them. The trainer's ranks take the devices 0, 1, ... With
    `nodes`: as each engine node numbers its own; null: its engines share all of them."""
    nodes: int = Field(0, ge=0)
    """Nodes with engines only, beside those of the trainer; they take equal shares of `engines`.
    0: the engines are on the first node of the trainer."""
    sleep: bool = False
    """Engines give their GPU memory back while the trainer works, and take it again for the weights
    of a step. For engines on GPUs of the trainer. See architecture.md; on CPU nothing is freed."""
    sync: Literal["arena", "in_place"] = "arena"
    """How new weights reach the engines: `arena` writes all of them to a file in shared memory;
    with `in_place` the engines read the trainer's own memory, so there is no second copy, but the
    ranks on the host of rank 0 have to hold the whole model."""
    logprob_diff_limit: float | None = Field(None, gt=0)
    """Stop with a weight-sync error when the mean |trainer - engine| log-prob difference of a step
    exceeds this; null only logs it. Needs top_p = 1, top_k = -1 and staleness = 0."""
    start_timeout_s: Seconds = 600.0
    """Longest wait for the engine to load."""
    step_timeout_s: Seconds = 3600.0
    """Longest wait for one generation or one weight refresh."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further fields of vLLM's EngineArgs, checked against its field names."""

    @property
    def engines_per_node(self) -> int:
        """On each node that has any."""
        return self.engines // max(1, self.nodes)


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
    offload: bool = False
    """With `rollout.sleep`: keep weights and optimizer state in pinned host memory while the engine
    works, so that it has the GPUs for itself. Changes no bit of the training."""


class BatchConfig(Config):
    """How sequences become micro-batches. None of it changes the gradient."""

    format: Literal["packed", "padded"] = "packed"
    """`packed`: sequences one behind the other (THD); `padded`: one row each (BSHD)."""
    tokens_per_micro_batch: int = Field(16384, ge=1)
    """Token budget of one forward-backward pass of one data-parallel rank, padding included."""
    tokens_per_logprob_batch: int | None = Field(None, ge=1)
    """Token budget of a pass without gradient; default: twice the one above."""
    logprob_chunk_tokens: int = Field(8192, ge=1)
    """Tokens whose logits exist at one time. Fewer take less memory; if a micro-batch has more, the
    backward pass computes the logits of all but the last so many again."""


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
    stop_within_s: Seconds = 540.0
    """After SIGUSR1 or SIGTERM: longest time to end the step and save it; a step that takes longer
    is given up. Under Slurm it must be less than the notice, `--signal=USR1@600`."""


MACHINES = ("a100", "h100", "h200", "b200", "cpu")
"""Machines that `planning/machine.py` knows."""


class TrackingConfig(Config):
    """What is written about the run."""

    rollouts_per_step: int = Field(4, ge=0)
    """Rollouts written to rollouts/step_N.jsonl at each step."""
    routing_every: int | None = Field(None, ge=1)
    """Mixtures of experts: steps between measurements of how far the trainer's routes and log-probs
    are from the engine's (`routing/free_*`, `routing/replayed_*`). One takes a further pass without
    gradient, two with `algorithm.old_policy=sampler`, and the engine's routes."""
    machine: str | None = None
    """What `plan` and the report predict for: a100, h100, h200, b200, cpu, or a file that
    `plan --calibrate` wrote. Default: by the name of the GPU; h100 for `plan`."""


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
    router: RouterConfig = RouterConfig()
    optim: OptimConfig = OptimConfig()
    batch: BatchConfig = BatchConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    stability: StabilityConfig = StabilityConfig()

    @property
    def needs_rollout_routes(self) -> bool:
        """Whether any step needs the engine's routes."""
        replays = self.algorithm.routing_replay == "rollout"
        return replays or self.tracking.routing_every is not None

    def wants_rollout_routes(self, step: int) -> bool:
        """Whether this step does."""
        return self.algorithm.routing_replay == "rollout" or self.measures_routing(step)

    def measures_routing(self, step: int) -> bool:
        """Whether the step is one of those of `tracking.routing_every`."""
        every = self.tracking.routing_every
        return every is not None and step % every == 0

    @property
    def reference_path(self) -> Path | None:
        """Folder of the reference policy; None if no loss asks for one."""
        reference = self.algorithm.reference
        return (reference.path or self.model.path) if reference.coef > 0 else None
