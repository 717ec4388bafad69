"""Weights of the ranks arrive, whole and once, in the memory of every engine node."""

import pytest
from safetensors.torch import load_file

from tests.helpers.node_jobs import node_weights_job
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}
    for architecture in ("qwen3", "qwen3_moe", "gpt_oss"):
        made[architecture] = tmp_path_factory.mktemp(architecture)
        save_tiny_model(made[architecture], architecture)
    return made


# Ranks are numbered tp first, then (ep within) dp, then pp. Behind the number of nodes: the nodes
# that each rank sends to.
CASES = {
    "each_replica_serves_its_own_node": (
        "qwen3", {"tp": 2, "dp": 2}, 2, [{0}, {0}, {1}, {1}]
    ),
    "every_stage_sends_its_layers": ("qwen3", {"pp": 2}, 2, [{0, 1}, {0, 1}]),
    "fewer_replicas_than_nodes": ("qwen3", {"dp": 2}, 3, [{0, 2}, {1}]),
    "fewer_nodes_than_replicas": ("qwen3", {"dp": 2, "cp": 2}, 1, [{0}, set(), set(), set()]),
    "experts_have_one_replica_dense_layers_two": (
        "qwen3_moe", {"dp": 2, "ep": 2}, 2, [{0, 1}, {0, 1}]
    ),
    "packed_experts_in_halves": ("gpt_oss", {"dp": 2, "etp": 2}, 1, [{0}, {0}]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_node_receives_the_whole_model(models, tmp_path, case):
    architecture, parallel, nodes, serves = CASES[case]
    config = tiny_config(models[architecture], parallel=parallel)
    # 2048 bytes: 8 rows of 64 fp32 numbers, so that most matrices are cut.
    results = run_distributed(len(serves), node_weights_job, config, tmp_path, nodes, 2048)
    expected = load_file(models[architecture] / "model.safetensors")
    whole = sum(tensor.nbytes for tensor in expected.values())
    for node in range(nodes):
        received = results[0].tensors[node]
        assert received.keys() == expected.keys()
        assert all(received[name].equal(tensor) for name, tensor in expected.items())
    assert [set(result.sent) for result in results] == serves
    for node in range(nodes):
        assert sum(result.sent.get(node, 0) for result in results) == whole
    assert [report.network_bytes for report in results[0].reports] == [whole] * nodes
    assert len({report.digest for report in results[0].reports}) == 1
    assert all(result.reports == [] for result in results[1:])


def test_processes_of_a_node_receive_together_what_one_receives(models, tmp_path):
    """Each rank of the one replica belongs to one of two processes on both nodes."""
    config = tiny_config(models["qwen3"], parallel={"pp": 2})
    results = run_distributed(2, node_weights_job, config, tmp_path, 2, 2048, receivers=2)
    expected = load_file(models["qwen3"] / "model.safetensors")
    for received in results[0].tensors:
        assert received.keys() == expected.keys()
        assert all(received[name].equal(tensor) for name, tensor in expected.items())
    whole = sum(tensor.nbytes for tensor in expected.values())
    assert [report.network_bytes for report in results[0].reports] == [whole, whole]
    assert len({report.digest for report in results[0].reports}) == 1


def test_a_killed_receiver_ends_the_run_with_its_reason(models, tmp_path):
    config = tiny_config(models["qwen3"], parallel={"pp": 2})
    first, second = run_distributed(
        2, node_weights_job, config, tmp_path, 1, 2048, receivers=2, killed=True
    )
    assert first.error == ("RolloutError: receiver 1 of the weights has ended with exit code -9")
    assert second.error  # its connection broke: no rank waits for the other end


def test_each_of_two_experts_replicas_sends_its_half_of_the_experts_alone(models, tmp_path):
    """Dense layers come from the replica of the node's number, experts from both ranks."""
    config = tiny_config(models["qwen3_moe"], parallel={"dp": 2, "ep": 2})
    first, second = run_distributed(2, node_weights_job, config, tmp_path, 2, 2**20)
    tensors = load_file(models["qwen3_moe"] / "model.safetensors")
    experts = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    dense = sum(tensor.nbytes for tensor in tensors.values()) - experts
    assert first.sent == {0: dense + experts // 2, 1: experts // 2}
    assert second.sent == {0: experts // 2, 1: dense + experts // 2}


def test_a_parameter_that_is_not_sent_is_named(models, tmp_path):
    config = tiny_config(models["qwen3"], parallel={"dp": 2})
    lost = "decoder.final_layernorm.weight"
    first, _ = run_distributed(2, node_weights_job, config, tmp_path, 1, 2**20, lost=lost)
    assert "model.norm.weight: 0 of 64 elements written" in first.error
    assert first.error.startswith("WeightSyncError")


def test_a_node_makes_the_fp8_blocks_that_ranks_beside_the_engine_make(models, tmp_path):
    from tests.helpers.weight_jobs import quantized_arena_job

    config = tiny_config(models["qwen3"], parallel={"dp": 2})
    (tmp_path / "arena").mkdir()
    digest, _ = run_distributed(1, quantized_arena_job, tiny_config(models["qwen3"]), tmp_path)[0]
    results = run_distributed(
        2, node_weights_job, config, tmp_path / "run", 2, 2**20, format="fp8_block"
    )
    assert [report.digest for report in results[0].reports] == [digest, digest]
    [split] = run_distributed(  # three processes for four ranks
        4,
        node_weights_job,
        tiny_config(models["qwen3"], parallel={"tp": 2, "pp": 2}),
        tmp_path / "split",
        1,
        2**20,
        format="fp8_block",
        receivers=3,
    )[0].reports
    assert split.digest == digest
