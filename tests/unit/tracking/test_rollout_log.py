import json

import pytest

from megatron_cpgd.tracking.rollout_log import write_rollouts
from megatron_cpgd.types import Prompt, Rollout, RolloutGroup


@pytest.fixture
def batch():
    """2 groups of 3 rollouts; reward 10 p + g, advantage -g."""

    def rollout(p, g):
        return Rollout(
            token_ids=[p, g], logprobs=[-0.5, -1.0], finish_reason="stop", weight_version=4,
            text=f"résponse {p}{g}\n",
        )  # fmt: skip

    def prompt(p):
        return Prompt(id=f"math:{p}", token_ids=[1, 2, 3], text=f"question {p}", answer=str(p))

    groups = [
        RolloutGroup(prompt=prompt(p), rollouts=[rollout(p, g) for g in range(3)]) for p in range(2)
    ]
    rewards = [[10.0 * p + g for g in range(3)] for p in range(2)]
    return {
        "groups": groups,
        "rewards": rewards,
        "reward_parts": {"math": rewards},
        "advantages": [[0.0, -1.0, -2.0]] * 2,
    }


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_holds_what_a_reader_asks_about_a_rollout(tmp_path, batch):
    path = tmp_path / "rollouts" / "step_000012.jsonl"
    write_rollouts(path, **batch, limit=6)
    assert read(path)[5] == {
        "prompt_id": "math:1",
        "sample": 2,
        "prompt": "question 1",
        "answer": "1",
        "response": "résponse 12\n",
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "response_tokens": 2,
        "weight_version": 4,
        "reward": 12.0,
        "rewards": {"math": 12.0},
        "advantage": -2.0,
    }


def test_the_rows_are_spread_over_the_groups(tmp_path, batch):
    write_rollouts(tmp_path / "a.jsonl", **batch, limit=2)
    assert [row["prompt_id"] for row in read(tmp_path / "a.jsonl")] == ["math:0", "math:1"]


def test_more_than_there_are_writes_each_once(tmp_path, batch):
    write_rollouts(tmp_path / "a.jsonl", **batch, limit=100)
    assert [row["reward"] for row in read(tmp_path / "a.jsonl")] == [0, 1, 2, 10, 11, 12]


def test_a_limit_of_zero_writes_nothing(tmp_path, batch):
    write_rollouts(tmp_path / "rollouts" / "a.jsonl", **batch, limit=0)
    assert list(tmp_path.iterdir()) == []


def test_token_level_adds_ids_and_logprobs(tmp_path, batch):
    write_rollouts(tmp_path / "a.jsonl", **batch, limit=1, token_level=True)
    (row,) = read(tmp_path / "a.jsonl")
    assert (row["token_ids"], row["rollout_logprobs"]) == ([0, 0], [-0.5, -1.0])
