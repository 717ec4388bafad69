"""Real vLLM that reads the memory of two trainer ranks, against the same weights in an arena."""

from typing import Any

import pytest
import torch

from tests.helpers.engines import random_model
from tests.helpers.in_place_jobs import engine_job
from tests.helpers.policy_jobs import with_old_logprobs
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import tiny_config, tiny_sequences
from tests.helpers.tiny_moe_engine import moe_config

ENGINE = {"kv_cache_memory_bytes": 32 << 20, "max_num_seqs": 32}


def sampled(folder, **engine_args: Any) -> dict[str, Any]:
    """Of an engine for a mixture of experts on ranks that cut attention and spread experts."""
    random_model(moe_config(), 1).save_pretrained(folder / "model")
    config = tiny_config(folder / "model", parallel={"tp": 2, "ep": 2}, optim={"lr": 0.01}, eval={})
    sequences = tiny_sequences(vocab_size=67)
    old = [torch.full((sequence.response_length,), -5.0) for sequence in sequences]
    batch = with_old_logprobs(sequences, old)
    args = ENGINE | engine_args
    # Tensor-parallel workers poll for one another, which is slow where cores are shared.
    ranks = run_distributed(2, engine_job, config, batch, folder, engine_args=args, timeout_s=600)
    return ranks[0]


def check(results: dict[str, Any]) -> None:
    before, after = results["arena"]
    assert results["in_place"] == [before, after]
    assert results["healed"] == before != after
    missing, gap, shape, gone, replaced = results["refused"]
    assert "missing ['lm_head.weight'], unknown []; nothing was overwritten" in missing
    assert "lm_head.weight: 1 pieces with 192 of 4288 elements do not make up [67, 64]" in gap
    assert "lm_head.weight: expected [67, 64], the arena has [1, 1]; nothing was over" in shape
    assert "cannot read the weights of trainer process 4194305 in place: " in gone
    assert "the memory belongs to another process by now" in replaced


@pytest.mark.slow
def test_an_engine_samples_the_same_from_weights_in_place_and_refuses_others(tmp_path):
    check(sampled(tmp_path))


@pytest.mark.slow
def test_two_tensor_parallel_workers_assemble_the_same_weights(tmp_path):
    check(sampled(tmp_path, tensor_parallel_size=2))
