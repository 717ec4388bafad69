"""Weights of ranks on other hosts arrive in the memory of rank 0's host, and no others travel."""

import pytest
from safetensors.torch import load_file

from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config
from tests.helpers.weight_jobs import delivered_job

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}
    for architecture in ("qwen3", "qwen3_moe", "gpt_oss"):
        made[architecture] = tmp_path_factory.mktemp(architecture)
        save_tiny_model(made[architecture], architecture)
    return made


# Ranks are numbered tp first, then (ep within) dp, then pp. The second number of a case is how many
# ranks have to send: those whose shard no rank beside rank 0 holds.
CASES = {
    "second_pipeline_stage": ("qwen3", {"tp": 2, "pp": 2}, "aabb", 2),
    "three_senders_to_one_receiver": ("qwen3", {"tp": 2, "pp": 2}, "abbb", 3),
    "replica_sends_nothing": ("qwen3", {"tp": 2, "dp": 2}, "aabb", 0),
    "experts_only": ("qwen3_moe", {"dp": 2, "ep": 2}, "ab", 1),
    "packed_experts": ("gpt_oss", {"dp": 2, "ep": 2}, "ab", 1),
    "packed_experts_in_halves": ("gpt_oss", {"dp": 2, "etp": 2}, "ab", 1),
    "ranks_of_two_hosts_in_turn": ("qwen3_moe", {"tp": 2, "dp": 2, "ep": 2}, "abab", 2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_ranks_beside_rank_0_write_the_whole_model(models, case):
    architecture, parallel, hosts, senders = CASES[case]
    config = tiny_config(models[architecture], parallel=parallel)
    # 2048 bytes: 8 rows of 64 fp32 numbers, so that most matrices are cut.
    results = run_distributed(len(hosts), delivered_job, config, list(hosts), 2048)
    near = [tensors for (tensors, _), host in zip(results, hosts, strict=True) if host == "a"]
    for name, expected in load_file(models[architecture] / "model.safetensors").items():
        parts = [tensors[name] for tensors in near]
        assert sum((~part.isnan()).int() for part in parts).eq(1).all(), name
        assert sum(part.nan_to_num() for part in parts).equal(expected), name
    assert sum(sent > 0 for _, sent in results) == senders
