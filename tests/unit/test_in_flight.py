"""Responses in pieces, with an engine whose next token is a function of all tokens before it."""

from pathlib import Path

import pytest

from megatron_cpgd.in_flight import InFlight, age_metrics, join
from megatron_cpgd.rollout.engine import Sampling
from megatron_cpgd.types import Rollout, RouteLayout, Routes

END = 0
SAMPLING = Sampling(max_tokens=99, stop_token_ids=[END])
LAYOUT = RouteLayout(layers=[0, 1], top_k=1, num_experts=256)


class CountingEngine:
    """Counts up from the last token of its prompt; a multiple of 10 becomes the end token."""

    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []
        self.seeds: list[int] = []

    def generate(self, prompts, sampling, *, seeds, version):
        assert sampling.n == 1 and len(seeds) == len(prompts)
        self.calls.append(prompts)
        self.seeds += seeds
        return [[self._respond(prompt, sampling.max_tokens, version)] for prompt in prompts]

    def _respond(self, prompt: list[int], max_tokens: int, version: int) -> Rollout:
        tokens = []
        while len(tokens) < max_tokens and (not tokens or tokens[-1] != END):
            next_token = (prompt + tokens)[-1] + 1
            tokens.append(next_token if next_token % 10 else END)
        return Rollout(
            token_ids=tokens, logprobs=[-float(version)] * len(tokens), weight_version=version,
            finish_reason="stop" if tokens[-1] == END else "length",
        )  # fmt: skip


def in_flight(prompts: dict[int, list[int]], *, size: int = 1) -> InFlight:
    groups = InFlight(piece_tokens=3, max_tokens=6)
    groups.begin(list(prompts), seed=100, size=size)
    return groups


def advance(groups: InFlight, engine: CountingEngine, prompts, version: int) -> None:
    groups.advance(engine, prompts.__getitem__, SAMPLING, version=version)


def test_a_response_goes_on_where_it_stopped_until_it_ends_or_reaches_the_limit():
    prompts = {7: [28], 8: [15], 9: [31]}  # ends at once; after 5 tokens; never
    groups, engine = in_flight(prompts), CountingEngine()
    advance(groups, engine, prompts, version=4)
    advance(groups, engine, prompts, version=5)
    assert engine.calls == [[[28], [15], [31]], [[15, 16, 17, 18], [31, 32, 33, 34]]]
    taken = groups.take(3)
    assert [group.prompt for group in taken] == [7, 8, 9] and groups.groups == []
    short, middle, long = (group.rollouts[0] for group in taken)
    assert short.token_ids == [29, END] and short.versions == [(4, 2)]
    assert middle.token_ids == [16, 17, 18, 19, END] and middle.finish_reason == "stop"
    assert middle.logprobs == [-4, -4, -4, -5, -5] and middle.versions == [(4, 3), (5, 2)]
    assert long.token_ids == [32, 33, 34, 35, 36, 37] and long.finish_reason == "length"


def test_a_group_is_taken_when_all_its_responses_are_finished_the_oldest_first():
    prompts = {0: [31], 1: [28], 2: [18]}
    groups, engine = in_flight(prompts, size=2), CountingEngine()
    advance(groups, engine, prompts, version=0)
    assert groups.take(3) is None and len(groups.groups) == 3
    assert [group.prompt for group in groups.take(1)] == [1]
    assert [group.prompt for group in groups.groups] == [0, 2]


def test_pieces_of_one_version_count_as_one():
    prompts = {0: [31]}
    groups, engine = in_flight(prompts), CountingEngine()
    advance(groups, engine, prompts, version=2)
    advance(groups, engine, prompts, version=2)
    [group] = groups.take(1)
    assert group.rollouts[0].versions == [(2, 6)]


def test_no_two_pieces_draw_from_one_random_stream():
    prompts = {i: [31] for i in range(50)}
    groups, engine = in_flight(prompts, size=8), CountingEngine()
    advance(groups, engine, prompts, version=0)
    assert engine.seeds == list(range(100, 500))
    advance(groups, engine, prompts, version=1)
    assert len(set(engine.seeds)) == 800 and all(0 <= seed < 2**63 for seed in engine.seeds)


def test_a_checkpoint_holds_what_has_begun(tmp_path: Path):
    prompts = {0: [31], 1: [15]}
    groups, engine = in_flight(prompts), CountingEngine()
    advance(groups, engine, prompts, version=0)
    groups.begin([1], seed=900, size=1)
    for name, content in groups.files().items():
        (tmp_path / name).write_bytes(content)
    resumed = InFlight(piece_tokens=3, max_tokens=6)
    resumed.load(tmp_path)
    assert resumed.groups == groups.groups
    assert InFlight(piece_tokens=3, max_tokens=6).files() == {}


def test_every_input_token_keeps_the_routes_with_which_its_successor_was_sampled():
    def piece(tokens: list[int], rows: list[int], version: int) -> Rollout:
        experts = bytes(expert for row in rows for expert in (row, row + 1))
        return Rollout(
            token_ids=tokens, logprobs=[0.0] * len(tokens), finish_reason="length",
            weight_version=version, routes=Routes(layout=LAYOUT, experts=experts),
        )  # fmt: skip

    # Prompt of 2 tokens: 2 + 2 - 1 rows, then 4 + 1 - 1, of which the first 3 are known already.
    first = piece([5, 6], [10, 20, 30], version=0)
    whole = join(first, piece([7], [11, 21, 31, 41], version=1))
    assert whole.routes.tensor()[:, 0, 0].tolist() == [10, 20, 30, 41]
    assert whole.routes.tensor()[:, 1, 0].tolist() == [11, 21, 31, 42]


def test_older_tokens_are_those_of_weights_before_the_batchs():
    rollout = Rollout(
        token_ids=[1] * 6, logprobs=[0.0] * 6, finish_reason="length", weight_version=6,
        pieces=[(2, 1), (4, 2), (6, 3)],
    )  # fmt: skip
    young = Rollout(token_ids=[1, 1], logprobs=[0, 0], finish_reason="stop", weight_version=6)
    metrics = age_metrics([rollout, young], 6)
    assert metrics == {"rollout/older_tokens_frac": 3 / 8, "rollout/older_steps_max": 4}


def test_a_piece_that_does_not_divide_the_limit_is_refused():
    with pytest.raises(AssertionError, match="max_tokens=7 piece_tokens=3"):
        InFlight(piece_tokens=3, max_tokens=7)
