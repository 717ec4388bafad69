"""Plans of engines on nodes of their own."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_cpgd.config.load import read_config
from megatron_cpgd.planning import memory
from megatron_cpgd.planning.estimate import make_plan
from megatron_cpgd.planning.machine import GPUS, cpu_machine
from megatron_cpgd.planning.plan import Plan
from megatron_cpgd.planning.search import UTILIZATION, Planner, find_fixes
from megatron_cpgd.planning.workload import assumed_lengths
from megatron_cpgd.weight_sync import receiver
from megatron_cpgd.weight_sync.node_arena import max_receivers
from tests.helpers.planning import public_config, public_model
from tests.helpers.valid_run import write_run

SIZES = (
    "parallel.tp=4", "parallel.dp=2", "model.recompute=full", "rollout.engines=4",
    "rollout.engine_args.tensor_parallel_size=4",
)  # fmt: skip
GIB = 2**30


def planner(folder: Path, *overrides: str) -> Planner:
    config = read_config(write_run(folder), [*SIZES, *overrides])
    return Planner(
        model=public_model("Qwen3-8B"), hf=public_config("Qwen3-8B"), config=config,
        machine=GPUS["h100"], lengths=assumed_lengths(config),
    )  # fmt: skip


def plan(folder: Path, *overrides: str, model: str = "Qwen3-8B", nodes: int | None = None) -> Plan:
    config = read_config(write_run(folder), [*SIZES, *overrides])
    lengths = assumed_lengths(config)
    return make_plan(public_model(model), config, GPUS["h100"], lengths, nodes=nodes)


def test_engines_on_nodes_of_their_own_leave_the_trainer_s_gpus_and_host_alone(
    tmp_path: Path,
) -> None:
    beside, apart = plan(tmp_path), plan(tmp_path, "rollout.nodes=2")
    assert (beside.gpus, beside.nodes) == (8, 1)
    assert (apart.gpus, apart.nodes) == (8 + 16, 3)
    assert beside.beside(0) == 4 * beside.engine.claimed
    assert apart.beside(0) == 0 and apart.fits and not beside.fits
    # A node of engines: the weights, eight workers, eight processes that receive, of which one
    # serves; the trainer's: eight ranks with their tokens and their part of a checkpoint.
    trainer, engines = apart.hosts
    assert (trainer.name, engines.name) == ("the first node", "a node of engines")
    assert (trainer.arena, engines.arena) == (0, 2 * public_model("Qwen3-8B").parameters)
    assert (trainer.processes, engines.processes) == (8 * 3 * GIB, 16 * 3 * GIB)
    assert engines.checkpoint == 0


def test_sampling_takes_as_long_wherever_the_engines_are_but_runs_beside_training(
    tmp_path: Path,
) -> None:
    beside, apart = plan(tmp_path), plan(tmp_path, "rollout.nodes=2")
    assert apart.generation == beside.generation
    ahead = plan(tmp_path, "rollout.nodes=2", "rollout.staleness=1", "rollout.overlap=true")
    work = apart.seconds.old_logprobs + apart.seconds.train
    expected = max(apart.seconds.generate - work, 0)
    assert ahead.seconds.generate == pytest.approx(expected)


# Links of 35 GB/s, 0.7 of 50. Beside the trainer weights are written at 10 GB/s, and each of the
# two engines that have room there sums them up at 100 GB/s.
@pytest.mark.parametrize(
    ("nodes", "trainer", "link_rate", "written_rate"),
    [
        (1, ("parallel.dp=2",), 4 * 35e9, 40e9),  # tp 4: four ranks send, four processes receive
        (2, ("parallel.dp=2",), 4 * 35e9, 40e9),  # each replica to its own node
        (4, ("parallel.dp=2",), 4 * 35e9 / 2, 40e9),  # each to two: half of a rank's link for one
        (1, ("parallel.cp=2", "parallel.dp=1"), 4 * 35e9, 40e9),
        (2, ("parallel.cp=2", "parallel.dp=1"), 4 * 35e9, 40e9),  # a replica by cp is one
        (2, ("parallel.pp=4", "parallel.dp=1"), 8 * 35e9, 80e9),  # 16 ranks, half of their links
        (4, ("parallel.pp=4", "parallel.dp=1"), 16 * 35e9 / 4, 80e9),
    ],
)
def test_every_gpu_of_a_node_receives_and_ranks_share_their_links_over_the_nodes(
    tmp_path: Path, nodes: int, trainer: tuple[str, ...], link_rate: float, written_rate: float
) -> None:
    beside, apart = plan(tmp_path, *trainer), plan(tmp_path, *trainer, f"rollout.nodes={nodes}")
    nbytes = 2 * public_model("Qwen3-8B").parameters
    more = nbytes / link_rate + nbytes / written_rate - nbytes / 10e9
    more += nbytes * (min(4 // nodes, 2) - 2) / 100e9
    assert apart.seconds.sync - beside.seconds.sync == pytest.approx(more)


def test_experts_are_sent_by_their_own_replicas(tmp_path: Path) -> None:
    # ep 8 over 8 ranks: one replica of the experts, whose eight ranks send to both nodes; two of
    # the rest, of which four ranks send to one.
    model = public_model("Qwen3-30B-A3B")
    sizes = ("parallel.ep=8", "model.recompute=full")
    beside = plan(tmp_path, *sizes, model="Qwen3-30B-A3B")
    apart = plan(tmp_path, *sizes, "rollout.nodes=2", model="Qwen3-30B-A3B")
    experts = 48 * 128 * 3 * 2048 * 768
    dense = model.parameters - experts
    link = 2 * (experts / 4 + dense / 4) / 35e9
    write = 2 * (experts / 80e9 + dense / 40e9 - model.parameters / 10e9)
    # Two engines of a host sum up, here as there.
    assert apart.seconds.sync - beside.seconds.sync == pytest.approx(link + write)


def test_a_plan_knows_what_a_node_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert max_receivers("nccl") == GPUS["h100"].receivers
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    assert max_receivers("gloo") == replace(cpu_machine(), gpus_per_node=12).receivers == 3
    assert memory.SENDERS_AT_A_TIME == receiver.SENDERS_AT_A_TIME


def test_more_engines_than_a_node_has_gpus_for_is_a_problem(tmp_path: Path) -> None:
    [problem] = plan(tmp_path, "rollout.nodes=1").problems
    assert problem == (
        "rollout.nodes=1: tensor_parallel_size=4 for each of 4 engines on a node, which has 2 GPUs "
        "for each"
    )


def test_a_process_that_receives_weights_is_beside_an_engine_on_its_gpu(tmp_path: Path) -> None:
    beside, apart = plan(tmp_path), plan(tmp_path, "rollout.nodes=2")
    assert beside.engine.total == beside.engine.claimed
    # Context and communicators, and a bucket of 64 MiB from each of four senders.
    assert apart.engine.total - apart.engine.claimed == GIB + 4 * 64 * 2**20
    # Of 79.6 GiB 95 % may be filled: 75.7; 0.94 are 74.9 and leave no 1.25.
    [problem] = plan(tmp_path, "rollout.nodes=2", f"{UTILIZATION}=0.94").problems
    assert problem == (
        "GPU memory of an engine: it claims 74.9 GiB, 1.2 GiB the process that receives weights; "
        "of a GPU 75.7 GiB may be filled"
    )
    full = planner(tmp_path, "rollout.nodes=2", f"{UTILIZATION}=0.94")
    assert next(fix.overrides for fix in find_fixes(full)) == {UTILIZATION: 0.93}


def test_engines_on_gpus_of_their_own_may_not_overfill_them(tmp_path: Path) -> None:
    own = ("parallel.dp=1", "rollout.engines=1", "rollout.devices=[4,5,6,7]")
    assert plan(tmp_path, *own, f"{UTILIZATION}=0.95").fits
    [problem] = plan(tmp_path, *own, f"{UTILIZATION}=0.97").problems
    assert problem == "GPU memory of an engine: it claims 77.3 GiB; of a GPU 75.7 GiB may be filled"


def test_the_trainer_has_the_nodes_that_the_engines_leave(tmp_path: Path) -> None:
    [problem] = plan(tmp_path, "rollout.nodes=2", nodes=2).problems
    assert problem == "parallel.* needs 8 GPUs, 0 nodes have 0"


def test_weights_of_more_than_half_of_a_host_need_a_larger_dev_shm(tmp_path: Path) -> None:
    large = plan(tmp_path, "rollout.nodes=4", model="DeepSeek-V3")
    assert any("/dev/shm of a node of engines" in line for line in large.warnings)
    small = plan(tmp_path, "precision.rollout=fp8_block", "rollout.nodes=4", model="DeepSeek-V3")
    assert not any("/dev/shm" in line for line in small.warnings)


def test_nodes_for_the_engines_are_proposed_where_a_host_is_too_small(tmp_path: Path) -> None:
    # 70.6e9 * 2 bytes leave nothing of 8 x 80 GB beside a trainer that fills them.
    config = read_config(
        write_run(tmp_path),
        ["parallel.tp=8", "parallel.dp=1", "parallel.pp=2", "model.recompute=full"],
    )
    planner = Planner(
        model=public_model("Llama-3.1-70B"), hf=public_config("Llama-3.1-70B"), config=config,
        machine=GPUS["h100"], lengths=assumed_lengths(config),
    )  # fmt: skip
    found = [fix.overrides for fix in find_fixes(planner)]
    assert any("rollout.nodes" in overrides for overrides in found)
