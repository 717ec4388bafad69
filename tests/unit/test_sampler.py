"""Which groups a step trains on, with an engine that answers from a script."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.data.run_prompts import Prompts, checksum
from megatron_cpgd.demo.tokenizer import build_tokenizer
from megatron_cpgd.errors import DataError, RolloutError
from megatron_cpgd.rollout.engine import RefreshReport, Sampling, stream_seeds
from megatron_cpgd.sampler import Sampler
from megatron_cpgd.scored_batch import ScoredBatch, batch_metrics, train_sequences
from megatron_cpgd.tracking.timer import StepTimer
from megatron_cpgd.types import Prompt, Rollout, RouteLayout, Routes
from tests.helpers.tiny import save_tiny_model

PROMPTS = 5
MAX_TOKENS = 4
G = 2
"""Responses per prompt."""

Group = list[str]
"""Its responses; one that begins with 1 has reward 1, any other 0."""


class ScriptedEngine:
    """Gives every call the groups of the script that come next, and notes what it was asked."""

    def __init__(self, tokenizer, script: Sequence[Group]) -> None:
        self._tokenizer = tokenizer
        self._script = iter(script)
        self.prompts: list[list[int]] = []
        self.seeds: list[list[int]] = []
        """Of every response, one list per call."""
        self.versions: list[int] = []
        self.routed = [0, 2]
        """Layers of the model with experts."""

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        seeds: list[int] | None = None,
        version: int,
    ) -> list[list[Rollout]]:
        self.prompts += prompts
        first = stream_seeds(sampling, len(prompts), seeds)
        self.seeds.append([seed + i for seed in first for i in range(sampling.n)])
        self.versions.append(version)
        groups = [[self._rollout(text, version) for text in next(self._script)] for _ in prompts]
        if not sampling.return_routes:
            return groups
        return [
            [replace(each, routes=self._routes(len(prompt + each.token_ids))) for each in group]
            for prompt, group in zip(prompts, groups, strict=True)
        ]

    def _routes(self, tokens: int) -> Routes:
        """Token t goes to the experts 2 * t and 2 * t + 1 in both layers."""
        experts = bytes(2 * t + i for t in range(tokens - 1) for _ in self.routed for i in (0, 1))
        layout = RouteLayout(layers=self.routed, top_k=2, num_experts=64)
        return Routes(layout=layout, experts=experts)

    def _rollout(self, text: str, version: int) -> Rollout:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        reason = "length" if len(ids) == MAX_TOKENS else "stop"
        return Rollout(
            token_ids=ids, logprobs=[-1.0] * len(ids), finish_reason=reason, weight_version=version
        )

    def refresh(self, arena: Path, version: int) -> RefreshReport:
        raise NotImplementedError

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    build_tokenizer(max_length=64).save_pretrained(folder)
    rows = "".join(f'{{"prompt": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(PROMPTS))
    (folder / "train.jsonl").write_text(rows)
    return folder


@pytest.fixture
def start(assets) -> Iterator:
    """start(script, ..., **algorithm) -> (sampler, engine, prompt stream)."""
    with ExitStack() as stack:

        def build(
            script, per_step=2, model=assets, data=assets, routing_every=None, piece_tokens=None,
            **algorithm,
        ):  # fmt: skip
            config = ExperimentConfig.model_validate(
                {
                    "run": {"dir": "unused", "steps": 1, "seed": 3},
                    "model": {"path": model, "tokenizer": assets},
                    "data": {"path": data / "train.jsonl"},
                    "rollout": {
                        "prompts_per_step": per_step,
                        "samples_per_prompt": G,
                        "max_response_tokens": MAX_TOKENS,
                        "piece_tokens": piece_tokens,
                    },
                    "rewards": {"workers": 1, "functions": [{"type": "format", "pattern": "1.*"}]},
                    "algorithm": {"prompt_weight": {"type": "equal"}, **algorithm},
                    "tracking": {"routing_every": routing_every},
                }
            )
            prompts = Prompts(config)
            engine = ScriptedEngine(prompts.tokenizer, script)
            sampler = Sampler(config, prompts, engine)
            stack.callback(sampler.close)
            return sampler, engine, prompts.stream

        yield build


def sample(sampler: Sampler, version: int = 0, step: int = 1) -> ScoredBatch:
    return sampler.sample(step=step, version=version, timer=StepTimer())


def texts(batch: ScoredBatch) -> list[Group]:
    return [[rollout.text for rollout in group.rollouts] for group in batch.groups]


def filtering(max_batches: int) -> dict:
    return {"filter": {"max_batches": max_batches}}


EASY, HARD, FIRST, SECOND, THIRD = ["1", "11"], ["0", "00"], ["1", "0"], ["0", "1"], ["12", "0"]


def test_without_a_filter_every_group_is_trained_on(start):
    sampler, engine, _ = start([EASY, FIRST, HARD, HARD])
    timer = StepTimer()
    batch = sampler.sample(step=8, version=7, timer=timer)
    assert texts(batch) == [EASY, FIRST]
    # Centred in the group: 1, 0 minus 1/2.
    assert batch.advantages.values.tolist() == [[0.0, 0.0], [0.5, -0.5]]
    assert engine.versions == [7] and batch.groups[0].rollouts[0].weight_version == 7
    assert {"time/generate_s", "time/score_s"} <= timer.finish_step().keys()
    metrics = batch_metrics(batch, step=9)
    assert metrics["rollout/staleness"] == 1
    counts = [metrics[f"rollout/{name}"] for name in COUNTS]
    assert counts == [1, 0, 0] and metrics["reward/zero_variance_frac"] == 0.5


COUNTS = ("sampled_batches", "filtered_groups", "surplus_groups")


@pytest.mark.parametrize(
    ("script", "max_batches", "kept", "counts"),
    [
        ([FIRST, SECOND], 3, [FIRST, SECOND], [1, 0, 0]),
        ([EASY, FIRST, HARD, SECOND], 3, [FIRST, SECOND], [2, 2, 0]),
        ([HARD, HARD, EASY, FIRST, HARD, SECOND], 3, [FIRST, SECOND], [3, 4, 0]),
        # The surplus is what came last.
        ([EASY, FIRST, SECOND, THIRD], 3, [FIRST, SECOND], [2, 1, 1]),
        # The limit: fewer groups, or none.
        ([EASY, FIRST, HARD, EASY], 2, [FIRST], [2, 3, 0]),
        ([EASY, FIRST], 1, [FIRST], [1, 1, 0]),
        ([EASY, HARD, HARD, EASY], 2, [], [2, 4, 0]),
    ],
)
def test_groups_of_equal_rewards_are_replaced_up_to_the_limit(
    start, script, max_batches, kept, counts
):
    sampler, engine, _ = start(script, **filtering(max_batches))
    batch = sample(sampler)
    assert texts(batch) == kept and len(engine.seeds) == counts[0]
    sequences = train_sequences(batch)
    assert [s.group for s in sequences] == [i for i in range(len(kept)) for _ in range(G)]
    rewards = [[float(text[0] == "1") for text in group] for group in kept]
    assert batch.rewards == batch.reward_parts["format"] == rewards
    assert batch.advantages.values.tolist() == [[r - 0.5 for r in group] for group in rewards]
    metrics = batch_metrics(batch, step=1)
    assert [metrics[f"rollout/{name}"] for name in COUNTS] == counts
    # Of all that was sampled, so that accuracy is not that of the filter.
    everything = [text for group in script for text in group]
    accuracy = sum(text[0] == "1" for text in everything) / len(everything)
    assert metrics["reward/accuracy"] == metrics["reward/mean"] == pytest.approx(accuracy)
    assert metrics["reward/format_mean"] == pytest.approx(accuracy)
    assert metrics["rollout/response_tokens"] == sum(map(len, everything))
    assert metrics["reward/zero_variance_frac"] == pytest.approx(2 * counts[1] / len(everything))
    assert ("reward/prompt_weight_mean" in metrics) == bool(kept)


@pytest.mark.parametrize(
    ("script", "max_batches", "warning"),
    [
        ([EASY, FIRST, HARD, EASY], 2, "1 of 4 sampled groups have unequal rewards"),
        ([EASY, HARD], 1, "0 of 2 sampled groups have unequal rewards"),
        ([EASY, FIRST], 1, None),  # nothing was to be replaced
        ([FIRST, SECOND], 2, None),
    ],
)
def test_a_batch_that_stays_short_is_a_warning(start, caplog, script, max_batches, warning):
    sampler, _, _ = start(script, **filtering(max_batches))
    with caplog.at_level(logging.WARNING):
        sample(sampler, version=4)
    messages = [record.message for record in caplog.records]
    assert len(messages) == (warning is not None)
    assert all(m.startswith(f"weights of step 4: {warning}, training on") for m in messages)


def test_equal_rewards_stay_equal_whatever_overlong_shaping_adds(start):
    # 4 and 1 tokens, buffer 2: shaped -1 and 0, but both are wrong
    shaping = {"advantage": {"overlong_buffer_tokens": 2}}
    sampler, _, _ = start([["0000", "0"], ["1111", "0"]], **filtering(1), **shaping)
    batch = sample(sampler)
    assert texts(batch) == [["1111", "0"]]
    # Shaping comes before the group's mean: 1 - 1 and 0.
    assert batch.advantages.values.tolist() == [[0.0, 0.0]]


def test_whitening_sees_only_what_is_trained_on(start):
    # centred 1/2, -1/2 with one token each; variance over 2 tokens with divisor 1: 1/2
    sampler, _, _ = start([EASY, FIRST], **filtering(1), advantage={"whiten": True})
    [values] = sample(sampler).advantages.values.tolist()
    assert values == pytest.approx([0.5**0.5, -(0.5**0.5)])


def test_the_trainer_is_told_which_responses_were_cut(start):
    sampler, _, _ = start([["1111", "0"], ["0", "1"]])
    assert [s.truncated for s in train_sequences(sample(sampler))] == [True, False, False, False]


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    """A model whose layers 0 and 2 have experts."""
    folder = tmp_path_factory.mktemp("experts")
    save_tiny_model(folder, "qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1])
    return folder


def test_the_routes_of_the_engine_are_those_of_the_trainers_tokens(start, experts):
    sampler, _, _ = start([FIRST, SECOND], model=experts, routing_replay="rollout")
    for sequence in train_sequences(sample(sampler)):
        length = sequence.length
        routes = sequence.rollout_routes
        assert routes.shape == (length, 2, 2) and routes.dtype == torch.int16
        assert routes[:-1, 1, 0].tolist() == list(range(0, 2 * length - 2, 2))
        assert routes[-1].unique().tolist() == [-1]  # was never fed


def test_routes_of_other_layers_than_the_trainers_are_refused(start, experts):
    sampler, engine, _ = start([FIRST, SECOND], model=experts, routing_replay="rollout")
    engine.routed = [0, 1]
    with pytest.raises(RolloutError, match=r"expected routes of the layers \[0, 2\]"):
        sample(sampler)


def test_nobody_asks_for_routes_that_are_not_replayed(start):
    sampler, _, _ = start([FIRST, SECOND])
    batch = sample(sampler)
    assert {sequence.rollout_routes for sequence in train_sequences(batch)} == {None}
    assert "routing/engine_bytes" not in batch.metrics


def test_routes_are_asked_for_in_the_steps_that_measure_them(start, experts):
    sampler, _, _ = start([FIRST, SECOND] * 6, model=experts, routing_every=3)
    routed = []
    for step in range(1, 7):
        [*sequences] = train_sequences(sample(sampler, step=step))
        routed.append({sequence.rollout_routes is not None for sequence in sequences})
    assert routed == [{False}, {False}, {True}] * 2


# It is not known yet whether the step that will train on a response measures.
def test_of_responses_in_pieces_routes_are_always_asked_for(start, experts):
    responses = [[text] for group in (FIRST, SECOND) * 4 for text in group]
    sampler, _, _ = start(responses, model=experts, routing_every=3, piece_tokens=2)
    for step in (1, 2):
        for sequence in train_sequences(sample(sampler, step=step)):
            assert sequence.rollout_routes is not None


# Two layers with top-2, one byte each: 4 bytes for each token that was fed.
def test_the_engines_bytes_are_those_of_all_that_was_sampled(start, experts):
    script = [EASY, FIRST, HARD, SECOND]
    sampler, engine, _ = start(script, model=experts, routing_replay="rollout", **filtering(2))
    batch = sample(sampler)
    assert texts(batch) == [FIRST, SECOND]
    fed = [
        len(prompt) + len(text) - 1
        for prompt, group in zip(engine.prompts, script, strict=True)
        for text in group
    ]
    assert batch.metrics["routing/engine_bytes"] == 4 * sum(fed)


SCRIPT = [EASY, FIRST, HARD, SECOND, FIRST, SECOND, HARD, EASY, THIRD, FIRST, EASY, FIRST] * 2
"""With two prompts per step and up to three batches: 2, 1, 2, 2, 2 batches."""


def test_no_two_responses_of_a_run_share_a_random_stream(start):
    sampler, engine, _ = start(SCRIPT, **filtering(3))
    batches = [sample(sampler).metrics["rollout/sampled_batches"] for _ in range(5)]
    assert batches == [2, 1, 2, 2, 2]
    seeds = [seed for call in engine.seeds for seed in call]
    assert len(set(seeds)) == len(seeds) == 9 * 2 * G


def test_without_refills_the_streams_are_those_of_the_step_number(start):
    sampler, engine, _ = start([FIRST] * 6)
    for step in (1, 2, 3):
        sample(sampler, version=step - 1)
    # (seed << 40) + step * P * G + response, seed 3, P * G = 4
    assert engine.seeds == [[(3 << 40) + step * 4 + i for i in range(4)] for step in (1, 2, 3)]


@pytest.mark.parametrize("others", [[[1, 2], [3]], [[3], [1, 2]], [[1], [2, 3]], [[1, 2], [4]]])
def test_training_prompts_have_one_checksum_in_their_order(others):
    def prompts(ids: list[list[int]]) -> list[Prompt]:
        return [Prompt(id="", token_ids=tokens, text="", answer=None) for tokens in ids]

    one = prompts([[1, 2], [3]])
    assert (checksum(prompts(others)) == checksum(one)) == (others == [[1, 2], [3]])


def test_a_resumed_run_refuses_other_prompts(start, assets, tmp_path):
    _, _, stream = start([])
    rows = (assets / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(reversed(rows)))
    _, _, other = start([], data=tmp_path)
    with pytest.raises(DataError, match="the saved prompt stream has"):
        other.load_state(stream.state())


def test_a_resumed_run_draws_the_same_prompts_and_streams(start):
    sampler, engine, stream = start(SCRIPT, **filtering(3))
    for _ in range(3):  # 5 batches
        sample(sampler)
    saved = stream.state()
    for _ in range(2):
        sample(sampler)
    resumed, again, other_stream = start(SCRIPT[10:], **filtering(3))
    other_stream.load_state(saved)
    for _ in range(2):
        sample(resumed)
    assert again.seeds == engine.seeds[5:] and again.prompts == engine.prompts[10:]
    assert other_stream.state() == stream.state()
