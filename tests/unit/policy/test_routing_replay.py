"""The choice of one router, by hand: 5 experts, the best 2."""

import pytest
import torch
from torch import Tensor

from megatron_cpgd.policy.routing_replay import LayerReplay, LayerRouting

SCORES = torch.tensor([[0.1, 0.5, 0.2, 0.4, 0.3], [0.9, 0.8, 0.0, 0.1, 0.2]])  # best: 1 3, 0 1


def top_k(scores: Tensor, k: int, *_) -> tuple[Tensor, Tensor]:
    return torch.topk(scores, k)


def choose(routing: LayerRouting, scores: Tensor = SCORES) -> tuple[Tensor, Tensor]:
    return routing.get_replay_topk(scores, 2, None, None, top_k)


def replaying(routes: list[list[int]]) -> tuple[LayerRouting, LayerReplay, Tensor]:
    counts = torch.zeros(2, dtype=torch.int64)
    routing, replay = LayerRouting(column=0), LayerReplay(counts)
    routing.choose = replay
    replay.start_forward(torch.tensor(routes, dtype=torch.int16), backward=True)
    return routing, replay, counts


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


def test_a_token_without_a_route_follows_its_router_and_is_not_compared():
    routing, _, counts = replaying([[-1, -1], [0, 2]])
    _, experts = choose(routing)
    assert experts.tolist() == [[1, 3], [0, 2]]
    assert counts.tolist() == [1, 1]


def test_the_order_of_the_same_experts_is_no_disagreement():
    routing, _, counts = replaying([[3, 1], [1, 0]])
    _, experts = choose(routing)
    assert experts.tolist() == [[1, 3], [0, 1]]
    assert counts.tolist() == [0, 2]


def test_a_recomputation_counts_no_disagreement():
    routing, _, counts = replaying([[2, 4], [1, 3]])
    choose(routing)
    choose(routing)
    assert counts.tolist() == [2, 2]


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
