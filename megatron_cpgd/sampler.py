"""Rank 0's side of a step: prompts to responses to rewards to weighted advantages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from megatron_cpgd.algorithm.advantages import Advantages, compute_advantages, overlong_penalty
from megatron_cpgd.config.schema import EvalSet, ExperimentConfig
from megatron_cpgd.data.prompts import load_prompts, load_tokenizer
from megatron_cpgd.data.stream import PromptStream
from megatron_cpgd.errors import DataError
from megatron_cpgd.rewards.base import RewardRequest, RewardResult
from megatron_cpgd.rewards.pool import RewardPool
from megatron_cpgd.rollout.engine import RolloutEngine, Sampling
from megatron_cpgd.rollout.vllm_engine import VllmEngine
from megatron_cpgd.stability.repetition import repetition_frac
from megatron_cpgd.tracking.timer import StepTimer
from megatron_cpgd.types import Prompt, Rollout, RolloutGroup, TrainSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBatch:
    """One rollout batch with everything that rank 0 knows about it."""

    groups: list[RolloutGroup]
    rewards: RewardResult
    """Flat, response after response."""
    advantages: Advantages

    @property
    def group_size(self) -> int:
        return len(self.groups[0].rollouts)

    def per_group(self, values: Sequence[float]) -> list[list[float]]:
        """A flat list of the batch as [P, G]."""
        return torch.tensor(values, dtype=torch.float64).view(-1, self.group_size).tolist()


class Prompts:
    """Training and evaluation prompts, loaded and checked before anything is started."""

    def __init__(self, config: ExperimentConfig) -> None:
        """Raises DataError: data, tokenizer or chat template cannot be used."""
        self.tokenizer = load_tokenizer(
            config.model.tokenizer or config.model.path,
            trust_remote_code=config.model.trust_remote_code,
        )
        self.stop_token_ids = find_stop_tokens(self.tokenizer, config.model.path)
        self.train = self._load(config, config.data.path)
        self.eval = {
            name: self._load(config, each.path)[: each.max_prompts]
            for name, each in config.eval.sets.items()
        }
        self.stream = PromptStream(
            len(self.train),
            config.rollout.prompts_per_step,
            seed=config.run.seed,
            shuffle=config.data.shuffle,
        )

    def _load(self, config: ExperimentConfig, path: Path) -> list[Prompt]:
        data = config.data
        return load_prompts(
            path,
            tokenizer=self.tokenizer,
            prompt_key=data.prompt_key,
            answer_key=data.answer_key,
            system_prompt=data.system_prompt,
            chat_template=data.chat_template,
            max_prompt_tokens=data.max_prompt_tokens,
            too_long=data.too_long,
        )


class Sampler:
    """Generates and scores rollouts; owns the reward workers."""

    def __init__(self, config: ExperimentConfig, prompts: Prompts, engine: RolloutEngine) -> None:
        """Start the reward workers."""
        self._config = config
        self._prompts = prompts
        self.engine = engine
        self._rewards = RewardPool(
            config.rewards.functions,
            workers=config.rewards.workers,
            timeout_s=config.rewards.timeout_s,
        )

    def sample(self, *, version: int, timer: StepTimer) -> ScoredBatch:
        """The next batch of the run, by the weights `version`."""
        with timer("generate"):
            groups = self.generate(version)
        with timer("score"):
            return self.score(groups)

    def generate(self, version: int) -> list[RolloutGroup]:
        """All responses to the next prompts."""
        rollout, stream = self._config.rollout, self._prompts.stream
        prompts = [self._prompts.train[i] for i in stream.next_batch()]
        size = rollout.samples_per_prompt
        # One stream per response of the whole run: a resumed run samples the same.
        first = (self._config.run.seed << 40) + stream.batches * len(prompts) * size
        sampling = self._sampling(size, rollout.temperature, rollout.top_p, rollout.top_k)
        return self._generate(prompts, sampling, seed=first, version=version)

    def score(self, groups: Sequence[RolloutGroup]) -> ScoredBatch:
        """Rewards of all responses, and their advantages."""
        rewards = self._score(groups)
        advantages = self._advantages(
            torch.tensor(rewards.total).view(len(groups), -1),
            torch.tensor([[len(each.token_ids) for each in group.rollouts] for group in groups]),
        )
        return ScoredBatch(groups=list(groups), rewards=rewards, advantages=advantages)

    def evaluate(self, version: int) -> dict[str, float]:
        """Accuracy and response length on every evaluation set."""
        metrics: dict[str, float] = {}
        for name, each in self._config.eval.sets.items():
            groups = self._generate(
                self._prompts.eval[name],
                self._eval_sampling(each),
                seed=self._config.run.seed,
                version=version,
            )
            rollouts = [rollout for group in groups for rollout in group.rollouts]
            metrics |= {
                f"eval/{name}/accuracy": accuracy(self._score(groups)),
                f"eval/{name}/response_tokens_mean": fmean(len(r.token_ids) for r in rollouts),
            }
        return metrics

    def close(self) -> None:
        """End the workers."""
        self._rewards.close()

    def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, version: int
    ) -> list[RolloutGroup]:
        responses = self.engine.generate(
            [prompt.token_ids for prompt in prompts],
            replace(sampling, seed=seed),
            version=version,
        )
        return [
            RolloutGroup(prompt=prompt, rollouts=[self._with_text(each) for each in rollouts])
            for prompt, rollouts in zip(prompts, responses, strict=True)
        ]

    def _with_text(self, rollout: Rollout) -> Rollout:
        text = self._prompts.tokenizer.decode(rollout.token_ids, skip_special_tokens=True)
        return replace(rollout, text=text)

    def _advantages(self, rewards: Tensor, lengths: Tensor) -> Advantages:
        """Of rewards and response lengths [P, G]."""
        algorithm = self._config.algorithm
        advantage, weight = algorithm.advantage, algorithm.prompt_weight
        if advantage.overlong_buffer_tokens is not None:
            rewards = rewards + overlong_penalty(
                lengths,
                max_tokens=self._config.rollout.max_response_tokens,
                buffer_tokens=advantage.overlong_buffer_tokens,
            )
        return compute_advantages(
            rewards,
            prompt_weight=weight.type,
            max_weight=weight.max_weight,
            baseline=advantage.baseline,
            whiten_lengths=lengths if advantage.whiten else None,
        )

    def _score(self, groups: Sequence[RolloutGroup]) -> RewardResult:
        return self._rewards.score(
            [
                RewardRequest(
                    response=rollout.text, answer=group.prompt.answer, fields=group.prompt.fields
                )
                for group in groups
                for rollout in group.rollouts
            ]
        )

    def _sampling(self, n: int, temperature: float, top_p: float, top_k: int) -> Sampling:
        return Sampling(
            n=n,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_tokens=self._config.rollout.max_response_tokens,
            stop_token_ids=self._prompts.stop_token_ids,
        )

    def _eval_sampling(self, each: EvalSet) -> Sampling:
        return self._sampling(each.samples_per_prompt, each.temperature, 1.0, -1)


def find_stop_tokens(tokenizer: Any, model_dir: Path) -> list[int]:
    """End tokens of the tokenizer and of the model's generation_config.json.

    Raises:
        DataError: there is none, so that no response would ever end.
    """
    stop = {tokenizer.eos_token_id} - {None}
    file = model_dir / "generation_config.json"
    if file.is_file():
        more = json.loads(file.read_text()).get("eos_token_id")
        stop |= set(more if isinstance(more, list) else [more]) - {None}
    if not stop:
        raise DataError(
            f"neither the tokenizer {tokenizer.name_or_path} nor {file} names an end token; set "
            "eos_token in tokenizer_config.json"
        )
    return sorted(stop)


def accuracy(rewards: RewardResult) -> float:
    """Share of responses whose first reward is above 0."""
    first = next(iter(rewards.columns.values()))
    return fmean(value > 0 for value in first)


def start_engine(config: ExperimentConfig, log_path: Path) -> VllmEngine:
    """Start vLLM on model.path; it loads in its own process while this one goes on."""
    return VllmEngine(
        config.model.path,
        dtype=config.precision.rollout or config.precision.train,
        max_model_len=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        engine_args=config.rollout.engine_args,
        start_timeout_s=config.rollout.start_timeout_s,
        step_timeout_s=config.rollout.step_timeout_s,
        log_path=log_path,
        seed=config.run.seed,
        trust_remote_code=config.model.trust_remote_code,
    )


def train_sequences(batch: ScoredBatch) -> list[TrainSequence]:
    """The batch as the trainer takes it."""
    return [
        TrainSequence(
            group=i,
            prompt_ids=torch.tensor(group.prompt.token_ids),
            response_ids=torch.tensor(rollout.token_ids, dtype=torch.int64),
            rollout_logprobs=torch.tensor(rollout.logprobs, dtype=torch.float32),
            advantage=advantage,
        )
        for i, (group, row) in enumerate(
            zip(batch.groups, batch.advantages.values.tolist(), strict=True)
        )
        for rollout, advantage in zip(group.rollouts, row, strict=True)
    ]


def batch_metrics(batch: ScoredBatch, step: int) -> dict[str, float]:
    """What the batch of a step says before any training on it."""
    rollouts = [rollout for group in batch.groups for rollout in group.rollouts]
    lengths = torch.tensor([len(rollout.token_ids) for rollout in rollouts]).double()
    repetition = [repetition_frac(rollout.token_ids) for rollout in rollouts]
    rewards = torch.tensor(batch.rewards.total, dtype=torch.float64)
    return {
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std(correction=0).item(),
        "reward/accuracy": accuracy(batch.rewards),
        "reward/timeouts": batch.rewards.timeouts,
        "reward/errors": batch.rewards.errors,
        "reward/zero_variance_frac": batch.advantages.zero_variance.double().mean().item(),
        "reward/prompt_weight_mean": batch.advantages.prompt_weight.double().mean().item(),
        "rollout/response_tokens": lengths.sum().item(),
        "rollout/response_tokens_mean": lengths.mean().item(),
        "rollout/response_tokens_max": lengths.max().item(),
        "rollout/staleness": fmean(step - 1 - r.weight_version for r in rollouts),
        "rollout/truncated_frac": fmean(r.finish_reason == "length" for r in rollouts),
        "rollout/repetition_frac": fmean(repetition),
        "rollout/repetition_frac_max": max(repetition),
        **_column_means(batch.rewards.columns),
    }


def _column_means(columns: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    return {f"reward/{name}_mean": fmean(values) for name, values in columns.items()}
