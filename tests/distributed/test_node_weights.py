"""Weights of the ranks arrive, whole and once, in the memory of every engine node."""

import pytest
from safetensors.torch import load_file

from megatron_cpgd.weight_sync import shared_memory
from megatron_cpgd.weight_sync.arena import quantized_checkpoint
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
    assert results[0].read == [results[0].sums] * nodes
    assert all(result.sums == results[0].sums for result in results)
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
    assert results[0].read == [results[0].sums] * 2


def test_a_killed_receiver_ends_the_run_with_its_reason(tmp_path):
    # With a tied head the first stage has more to send, so the second goes to the second receiver.
    save_tiny_model(tmp_path / "model", "qwen3", tie_word_embeddings=True)
    config = tiny_config(tmp_path / "model", parallel={"pp": 2})
    first, second = run_distributed(
        2, node_weights_job, config, tmp_path / "run", 1, 2048, receivers=2, killed=True
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


# 192 rows of gate on each of two ranks: the second block of 128 has rows of both. Two replicas
# serve a node each; three processes of a node take from four ranks.
@pytest.mark.parametrize(
    ("parallel", "nodes", "receivers"),
    [({"dp": 2}, 2, 1), ({"tp": 2, "pp": 2}, 1, 3), ({"tp": 2, "dp": 2, "ep": 2}, 2, 1)],
    ids=["dp2", "tp2_pp2", "tp2_dp2_ep2"],
)
def test_nodes_get_the_fp8_blocks_of_the_whole_matrices(
    tmp_path, monkeypatch, parallel, nodes, receivers
):
    architecture = "qwen3_moe" if "ep" in parallel else "qwen3"
    save_tiny_model(tmp_path / "model", architecture, intermediate_size=384, initializer_range=1.0)
    config = tiny_config(tmp_path / "model", parallel=parallel)
    ranks = config.parallel.world_size
    results = run_distributed(
        ranks, node_weights_job, config, tmp_path / "run", nodes, 2**20,
        format="fp8_block", receivers=receivers,
    )  # fmt: skip
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    with quantized_checkpoint(tmp_path / "model") as whole:
        sums, nbytes = whole.fingerprints(), whole.nbytes
    assert results[0].read == [sums] * nodes
    assert all(result.sums == sums for result in results)
    assert [report.network_bytes for report in results[0].reports] == [nbytes] * nodes
