"""Rollouts reach every rank as rank 0 has them."""

import pytest
import torch

from megatron_cpgd.types import TrainSequence
from tests.helpers.ranks import run_distributed
from tests.helpers.weight_jobs import share_job, written_routes_job

pytestmark = pytest.mark.distributed


def sequence(
    group: int,
    prompt: list[int],
    response: list[int],
    advantage: float,
    truncated: bool = False,
    routes: list[list[list[int]]] | None = None,
) -> TrainSequence:
    return TrainSequence(
        group=group,
        prompt_ids=torch.tensor(prompt),
        response_ids=torch.tensor(response, dtype=torch.int64),
        rollout_logprobs=-torch.arange(len(response)) - 0.25,
        advantage=advantage,
        truncated=truncated,
        rollout_routes=None if routes is None else torch.tensor(routes, dtype=torch.int16),
    )


BATCHES = {
    "ragged, one response empty": [
        sequence(0, [7, 2**40], [3, 1, 4], -1.5, truncated=True),
        sequence(0, [7, 2**40], [], 0.0),
        sequence(3, [9], [5], 0.75),
    ],
    "with routes": [
        sequence(0, [7, 8], [3], 0.5, routes=[[[0, 300]], [[-1, -1]], [[2, 1]]]),
        sequence(1, [9], [], 0.5, routes=[[[4, 5]]]),
    ],
    "every response empty": [sequence(0, [1], [], 0.5), sequence(1, [2, 3], [], -0.5)],
    "no sequence": [],
}


@pytest.mark.parametrize("name", BATCHES)
def test_every_rank_gets_rank_0s_sequences(name):
    batch = BATCHES[name]
    for received in run_distributed(3, share_job, batch, ["a", "b", "b"]):
        for ours, theirs in zip(received, batch, strict=True):
            for field in ("group", "advantage", "truncated"):
                assert getattr(ours, field) == getattr(theirs, field), field
            for field in ("prompt_ids", "response_ids", "rollout_logprobs"):
                torch.testing.assert_close(
                    getattr(ours, field), getattr(theirs, field), rtol=0, atol=0
                )
            torch.testing.assert_close(ours.rollout_routes, theirs.rollout_routes, rtol=0, atol=0)


# 0.1 has no float32: were rank 0 to keep its double, ranks would train on different advantages.
def test_rank_0_uses_the_rounded_advantage_that_the_others_get():
    results = run_distributed(2, share_job, [sequence(0, [1], [2], 0.1)], ["a", "a"])
    assert results[0][0].advantage == results[1][0].advantage != 0.1


def test_the_ranks_of_a_host_have_the_routes_in_the_same_memory():
    batch, hosts = BATCHES["with routes"], ["a", "b", "a", "b"]
    assert run_distributed(4, written_routes_job, batch, hosts) == [100, 101, 100, 101]
