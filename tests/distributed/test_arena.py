"""All ranks of a host map the one arena that rank 0 creates, and quantise it together."""

import pytest

from megatron_cpgd.weight_sync import shared_memory
from megatron_cpgd.weight_sync.arena import quantized_checkpoint
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config
from tests.helpers.weight_jobs import arena_job, quantized_arena_job

pytestmark = pytest.mark.distributed


def test_ranks_write_into_one_file_that_goes_away_at_the_end(tmp_path):
    results = run_distributed(2, arena_job, tmp_path)
    # Each rank writes rank + 1 into its row and reads both, then leaves the arena.
    assert [result["values"] for result in results] == [[1.0, 2.0], [1.0, 2.0]]
    assert [result["dtype"] for result in results] == ["bfloat16", "bfloat16"]
    assert len({result["path"] for result in results}) == 1
    assert {result["mode"] for result in results} == {0o600}
    assert [result["after_rank_1_left"] for result in results] == [True, True]
    assert list(tmp_path.iterdir()) == []


LAYOUTS = {
    "tp2": ("qwen3", {"tp": 2}, "aa"),
    "tp2_over_two_hosts": ("qwen3", {"tp": 2}, "ab"),
    "pp2": ("qwen3", {"pp": 2}, "aa"),
    "dp2": ("qwen3", {"dp": 2}, "aa"),
    "tp2_ep2": ("qwen3_moe", {"tp": 2, "ep": 2}, "aa"),
    "tp2_etp2": ("qwen3_moe", {"tp": 2, "etp": 2}, "aa"),
    "tp2_dp2_ep2_over_two_hosts": ("qwen3_moe", {"tp": 2, "dp": 2, "ep": 2}, "abab"),
}


# 192 rows of gate on each of two ranks: the second block of 128 has rows of both.
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_blocks_are_those_of_the_whole_matrices_in_every_layout(layout, tmp_path, monkeypatch):
    architecture, parallel, hosts = LAYOUTS[layout]
    folder = tmp_path / "arena"
    folder.mkdir()
    sizes = {"num_hidden_layers": 2, "intermediate_size": 384, "initializer_range": 1.0}
    save_tiny_model(tmp_path / "model", architecture, **sizes)
    config = tiny_config(tmp_path / "model", parallel=parallel)
    results = run_distributed(len(hosts), quantized_arena_job, config, folder, hosts)
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", folder)
    with quantized_checkpoint(tmp_path / "model") as whole:
        sums = whole.fingerprints()
    assert results == [(sums, sums if host == "a" else None, []) for host in hosts]
