"""Plans of engines on nodes of their own."""

from pathlib import Path

import pytest

from megatron_cpgd.config.load import read_config
from megatron_cpgd.planning.estimate import Plan, make_plan
from megatron_cpgd.planning.machine import GPUS
from megatron_cpgd.planning.search import Planner, find_fixes
from megatron_cpgd.planning.workload import assumed_lengths
from tests.helpers.planning import public_config, public_model
from tests.helpers.valid_run import write_run

SIZES = (
    "parallel.tp=4", "parallel.dp=2", "model.recompute=full", "rollout.engines=4",
    "rollout.engine_args.tensor_parallel_size=4",
)  # fmt: skip
GIB = 2**30


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
    # A node of engines: the weights, eight workers and the process that serves; the trainer's:
    # eight ranks and their tokens, which is less.
    assert apart.host.name == "a node of engines"
    assert apart.host.arena == 2 * public_model("Qwen3-8B").parameters
    assert apart.host.processes == 9 * 3 * GIB


def test_sampling_takes_as_long_wherever_the_engines_are_but_runs_beside_training(
    tmp_path: Path,
) -> None:
    beside, apart = plan(tmp_path), plan(tmp_path, "rollout.nodes=2")
    assert apart.generation == beside.generation
    ahead = plan(tmp_path, "rollout.nodes=2", "rollout.staleness=1", "rollout.overlap=true")
    work = apart.seconds.old_logprobs + apart.seconds.train
    expected = max(apart.seconds.generate - work, 0)
    assert ahead.seconds.generate == pytest.approx(expected)


@pytest.mark.parametrize(("nodes", "turns"), [(1, 1), (2, 1), (4, 2)])
def test_nodes_of_different_replicas_receive_the_weights_at_one_time(
    tmp_path: Path, nodes: int, turns: int
) -> None:
    # dp 2: two replicas send. Each node takes 2 * 8.19e9 bytes over 0.7 of a link of 50 GB/s.
    beside, apart = plan(tmp_path), plan(tmp_path, f"rollout.nodes={nodes}")
    link = turns * 2 * public_model("Qwen3-8B").parameters / 35e9
    assert apart.seconds.sync - beside.seconds.sync == pytest.approx(link)


def test_experts_are_sent_by_their_own_replicas(tmp_path: Path) -> None:
    # ep 8 over 8 ranks: one replica of the experts, two of the rest.
    model = public_model("Qwen3-30B-A3B")
    sizes = ("parallel.ep=8", "model.recompute=full")
    beside = plan(tmp_path, *sizes, model="Qwen3-30B-A3B")
    apart = plan(tmp_path, *sizes, "rollout.nodes=2", model="Qwen3-30B-A3B")
    experts = 48 * 128 * 3 * 2048 * 768
    link = 2 * (2 * experts + (model.parameters - experts)) / 35e9
    assert apart.seconds.sync - beside.seconds.sync == pytest.approx(link)


def test_more_engines_than_a_node_has_gpus_for_is_a_problem(tmp_path: Path) -> None:
    [problem] = plan(tmp_path, "rollout.nodes=1").problems
    assert problem == (
        "rollout.nodes=1: tensor_parallel_size=4 for each of 4 engines on a node, which has 2 GPUs "
        "for each"
    )


def test_the_trainer_has_the_nodes_that_the_engines_leave(tmp_path: Path) -> None:
    [problem] = plan(tmp_path, "rollout.nodes=2", nodes=2).problems
    assert problem == "parallel.* needs 8 GPUs, 0 nodes have 0"


def test_weights_of_more_than_half_of_a_host_need_a_larger_dev_shm(tmp_path: Path) -> None:
    large = plan(tmp_path, "precision.rollout=fp8_block", "rollout.nodes=4", model="DeepSeek-V3")
    assert any("/dev/shm of a node of engines" in line for line in large.warnings)
    small = plan(tmp_path, "rollout.nodes=4")
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
