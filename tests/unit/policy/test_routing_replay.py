"""The choice of one router, by hand: 5 experts, the best 2."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_cpgd.policy import routing_replay
from megatron_cpgd.policy.routing_replay import (
    NOT_NEEDED,
    LayerReplay,
    LayerRouting,
    RouteComparison,
)

SCORES = torch.tensor([[0.1, 0.5, 0.2, 0.4, 0.3], [0.9, 0.8, 0.0, 0.1, 0.2]])  # best: 1 3, 0 1


def top_k(scores: Tensor, k: int, *_) -> tuple[Tensor, Tensor]:
    return torch.topk(scores, k)


def choose(routing: LayerRouting, scores: Tensor = SCORES) -> tuple[Tensor, Tensor]:
    return routing.get_replay_topk(scores, 2, None, None, top_k)


def replaying(routes: list[list[int]]) -> tuple[LayerRouting, LayerReplay, Tensor]:
    """The last are the counted fallbacks, and all choices that matter."""
    counts = torch.zeros(2, dtype=torch.int64)
    routing, replay = LayerRouting(column=0), LayerReplay(counts)
    routing.choose = replay
    replay.start_forward(torch.tensor(routes, dtype=torch.int16), backward=True)
    return routing, replay, counts


def compared(*passes: list[list[int]], layers: int = 2, tokens: int = 4) -> RouteComparison:
    """The routers' choices for SCORES beside the routes of tokens 2 and 1, then 3 and padding."""
    comparison = RouteComparison(layers=layers, tokens=tokens)
    for number, routes in enumerate(passes):
        routing = LayerRouting(column=number % layers)
        routing.watch = partial(comparison, routing)
        rows = torch.tensor([[2, 1], [3, -1]][number // layers])
        comparison.start_forward(routing, torch.tensor(routes, dtype=torch.int16), rows)
        choose(routing)
    return comparison


@pytest.fixture
def no_other_rank(monkeypatch):
    monkeypatch.setattr(routing_replay.dist, "all_reduce", lambda counts: None)


def test_a_replayed_token_goes_to_its_experts_with_the_live_scores():
    routing, _, _ = replaying([[2, 4], [1, 3]])
    scores, experts = choose(routing)
    assert experts.tolist() == [[4, 2], [1, 3]]  # the best first
    assert torch.equal(scores, torch.tensor([[0.3, 0.2], [0.8, 0.1]]))


def test_other_weights_change_the_gates_and_not_the_experts():
    routing, replay, _ = replaying([[2, 4], [1, 3]])
    choose(routing)
    scores, experts = choose(routing, SCORES.flip(1))  # the recomputation of the same tokens
    assert experts.sort(1).values.tolist() == [[2, 4], [1, 3]]
    assert torch.equal(scores, torch.tensor([[0.2, 0.1], [0.1, 0.8]]).sort(1, True).values)
    replay.finish()


def test_a_token_without_a_route_follows_its_router_and_is_counted():
    routing, _, counts = replaying([[-1, -1], [0, 2]])
    _, experts = choose(routing)
    assert experts.tolist() == [[1, 3], [0, 2]]
    assert counts.tolist() == [1, 2]


def test_a_token_on_which_nothing_depends_is_no_fallback():
    routing, _, counts = replaying([[NOT_NEEDED, NOT_NEEDED], [0, 2]])
    _, experts = choose(routing)
    assert experts.tolist() == [[1, 3], [0, 2]]
    assert counts.tolist() == [0, 1]


def test_a_recomputation_counts_nothing():
    routing, _, counts = replaying([[-1, -1], [1, 3]])
    choose(routing)
    choose(routing)
    assert counts.tolist() == [1, 2]


# SCORES choose 1 3 and 0 1. Layer 0 differs on token 1, layer 1 on tokens 1 and 3.
def test_disagreement_is_counted_by_choice_by_layer_and_by_token(no_other_rank):
    comparison = compared(
        [[3, 1], [2, 0]], [[1, 3], [0, 4]],
        [[1, 3], [NOT_NEEDED, NOT_NEEDED]], [[0, 1], [NOT_NEEDED, NOT_NEEDED]],
    )  # fmt: skip
    for _ in range(2):  # asking changes nothing
        agreement = comparison.agreement()
        assert agreement.disagreement == 3 / 6  # the order of the same experts does not count
        assert agreement.by_layer == [1 / 3, 2 / 3]
        assert agreement.token_frac == 2 / 3


def test_a_token_without_a_route_is_not_compared(no_other_rank):
    agreement = compared([[-1, -1], [2, 4]], [[-1, -1], [-1, -1]]).agreement()
    assert (agreement.disagreement, agreement.token_frac) == (1.0, 1.0)
    assert agreement.by_layer == [1.0, pytest.approx(math.nan, nan_ok=True)]


def test_a_comparison_with_nothing_is_not_a_number(no_other_rank):
    agreement = compared([[-1, -1], [-1, -1]]).agreement()
    assert math.isnan(agreement.disagreement) and math.isnan(agreement.token_frac)


def test_who_watches_changes_nothing_that_the_router_returns():
    routing = LayerRouting(column=0)
    expected = top_k(SCORES, 2)
    seen = []
    routing.watch = seen.append
    result = routing.get_replay_topk(SCORES, 2, None, None, lambda *_: expected)
    assert result is expected and seen == [expected[1]]


def test_a_replay_is_watched_by_the_routers_own_choice():
    routing, _, _ = replaying([[2, 4], [1, 3]])
    seen = []
    routing.watch = seen.append
    choose(routing)
    assert seen[0].tolist() == [[1, 3], [0, 1]]


def test_the_gradient_reaches_the_scores_of_the_replayed_experts():
    routing, _, _ = replaying([[2, 4], [1, 3]])
    live = SCORES.clone().requires_grad_()
    scores, _ = choose(routing, live)
    scores.sum().backward()
    assert torch.equal(live.grad, torch.tensor([[0.0, 0, 1, 0, 1], [0, 1, 0, 1, 0]]))


def test_without_a_pass_the_router_chooses():
    _, experts = choose(LayerRouting(column=0))
    assert experts.tolist() == [[1, 3], [0, 1]]


def test_routes_that_no_forward_pass_took_are_an_error():
    _, replay, _ = replaying([[2, 4], [1, 3]])
    with pytest.raises(AssertionError, match="did not ask"):
        replay.finish()


def test_a_recomputation_that_is_missing_is_an_error():
    routing, replay, _ = replaying([[2, 4], [1, 3]])
    choose(routing)
    replay.start_forward(torch.tensor([[0, 1], [0, 1]]), backward=True)
    choose(routing)
    choose(routing)  # one of the two micro-batches
    with pytest.raises(AssertionError, match="recomputed"):
        replay.finish()
