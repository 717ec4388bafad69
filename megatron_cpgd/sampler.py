"""Rank 0's side of a step: prompts to responses to rewards to weighted advantages."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from torch import Tensor

from megatron_cpgd.algorithm.advantages import (
    Advantages,
    compute_advantages,
    overlong_penalty,
)
from megatron_cpgd.config.schema import EvalSet, ExperimentConfig
from megatron_cpgd.data.run_prompts import Prompts
from megatron_cpgd.errors import RolloutError
from megatron_cpgd.in_flight import InFlight, OpenGroup, age_metrics
from megatron_cpgd.rewards.base import RewardRequest, RewardResult
from megatron_cpgd.rewards.pool import RewardPool
from megatron_cpgd.rollout.engine import RolloutEngine, Sampling
from megatron_cpgd.scored_batch import SampledResponses, ScoredBatch, accuracy
from megatron_cpgd.tracking.timer import StepTimer
from megatron_cpgd.types import Prompt, Rollout, RolloutGroup
from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
from megatron_cpgd.weights.registry import read_decoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SamplerPosition:
    """How far the sampling has come."""

    prompts: dict[str, int]
    groups: list[OpenGroup]
    """In flight."""


class Sampler:
    """Generates and scores rollouts; owns the reward workers."""

    def __init__(self, config: ExperimentConfig, prompts: Prompts, engine: RolloutEngine) -> None:
        """Start the reward workers."""
        self._config = config
        self._prompts = prompts
        self.engine = engine
        self._routed_layers: list[int] | None = None
        if config.needs_rollout_routes:
            with HfCheckpoint.open(config.model.path) as checkpoint:
                self._routed_layers = read_decoder(checkpoint.config).moe_layers
        rollout = config.rollout
        self.in_flight: InFlight | None = None
        """Groups that have begun, if responses are sampled in pieces."""
        if rollout.piece_tokens is not None:
            self.in_flight = InFlight(
                piece_tokens=rollout.piece_tokens, max_tokens=rollout.max_response_tokens
            )
        self._rewards = RewardPool(
            config.rewards.functions,
            workers=config.rewards.workers,
            timeout_s=config.rewards.timeout_s,
        )

    def sample(self, *, step: int, version: int, timer: StepTimer) -> ScoredBatch:
        """The batch of one step, scored and filtered.

        With dynamic sampling, batches of prompts follow each other until there are enough groups of
        unequal rewards; the first ones are kept. A prompt may then occur twice in a step, as two
        groups, if an epoch ends in between.

        Args:
            step: that trains on it.
            version: of the weights that produce it.
            timer: gets the parts `generate` and `score`.
        """
        rollout, limit = self._config.rollout, self._config.algorithm.filter.max_batches
        wanted = rollout.prompts_per_step
        sampled = SampledResponses(rollout.samples_per_prompt)
        # A response in pieces does not know yet which step will train on it.
        pieces = self.in_flight is not None and self._routed_layers is not None
        routed = pieces or self._config.wants_rollout_routes(step)
        groups: list[RolloutGroup] = []
        kept: list[int] = []  # their places among all that were sampled
        while len(groups) < wanted and sampled.batches < (limit or 1):
            with timer("generate"):
                new = self._next_groups(version, routed=routed)
            with timer("score"):
                rewards = self._score(new)
            equal = sampled.add(new, rewards)
            usable = [i for i in range(wanted) if limit is None or not equal[i]]
            chosen = usable[: wanted - len(groups)]
            groups += [new[i] for i in chosen]  # the tokens of the others are let go
            kept += [(sampled.batches - 1) * wanted + i for i in chosen]
        if len(groups) < wanted and (limit != 1 or not groups):
            logger.warning(
                "weights of step %d: %d of %d sampled groups have unequal rewards, training on "
                "them instead of %d (algorithm.filter.max_batches=%d); prompts that are neither "
                "too easy nor too hard would give more",
                version, len(groups), sampled.batches * wanted, wanted, limit,
            )  # fmt: skip
        with timer("score"):
            rewards = sampled.rewards()
            return ScoredBatch(
                groups=groups,
                rewards=sampled.per_group(rewards.total)[kept].tolist(),
                reward_parts={
                    name: sampled.per_group(values)[kept].tolist()
                    for name, values in rewards.columns.items()
                },
                advantages=self._advantages(
                    sampled.per_group(rewards.total)[kept].float(),
                    sampled.per_group(sampled.lengths)[kept].long(),
                ),
                version=version,
                metrics=sampled.metrics(kept) | self._age(groups, version),
            )

    def _age(self, groups: Sequence[RolloutGroup], version: int) -> dict[str, float]:
        if self.in_flight is None or not groups:
            return {}
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        return age_metrics(rollouts, version)

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

    def position(self) -> SamplerPosition:
        """What `return_to` needs."""
        groups = self.in_flight.copy_groups() if self.in_flight else []
        return SamplerPosition(self._prompts.stream.state(), groups)

    def return_to(self, position: SamplerPosition) -> None:
        """As if nothing had been sampled since."""
        self._prompts.stream.load_state(position.prompts)
        if self.in_flight:
            self.in_flight.groups = position.groups

    def close(self) -> None:
        """End the workers."""
        self._rewards.close()

    def _next_groups(self, version: int, *, routed: bool) -> list[RolloutGroup]:
        """All responses to a batch of prompts, the next ones or the first that are finished."""
        rollout = self._config.rollout
        size = rollout.samples_per_prompt
        sampling = self._sampling(size, rollout.temperature, rollout.top_p, rollout.top_k)
        sampling = replace(sampling, return_routes=routed)
        if self.in_flight is None:
            prompts, seed = self._next_prompts()
            chosen = [self._prompts.train[i] for i in prompts]
            groups = self._generate(chosen, sampling, seed=seed, version=version)
        else:
            groups = self._finished_groups(self.in_flight, sampling, version)
        if routed:
            self._check_routes(groups)
        return groups

    def _next_prompts(self) -> tuple[list[int], int]:
        """The next batch of prompts, and the seed of its first response."""
        stream, rollout = self._prompts.stream, self._config.rollout
        prompts = stream.next_batch()
        # One stream per response of the whole run: a resumed run samples the same.
        first = stream.batches * len(prompts) * rollout.samples_per_prompt
        return prompts, (self._config.run.seed << 40) + first

    def _finished_groups(
        self, in_flight: InFlight, sampling: Sampling, version: int
    ) -> list[RolloutGroup]:
        """Go on with all that is in flight until a batch of it is finished."""
        rollout, train = self._config.rollout, self._prompts.train
        limit = rollout.groups_in_flight or 2 * rollout.prompts_per_step
        while (taken := in_flight.take(rollout.prompts_per_step)) is None:
            while len(in_flight.groups) + rollout.prompts_per_step <= limit:
                prompts, seed = self._next_prompts()
                in_flight.begin(prompts, seed=seed, size=rollout.samples_per_prompt)
            in_flight.advance(self.engine, lambda i: train[i].token_ids, sampling, version=version)
        return [
            RolloutGroup(
                prompt=train[group.prompt],
                rollouts=[self._with_text(each) for each in group.rollouts if each is not None],
            )
            for group in taken
        ]

    def _check_routes(self, groups: Sequence[RolloutGroup]) -> None:
        """Raises RolloutError: the trainer has its experts in other layers."""
        for rollout in (rollout for group in groups for rollout in group.rollouts):
            layers = rollout.routes.layout.layers if rollout.routes else None
            if layers != self._routed_layers:
                raise RolloutError(
                    f"expected routes of the layers {self._routed_layers}, which have experts in "
                    f"{self._config.model.path}; the engine returned those of {layers}"
                )

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
