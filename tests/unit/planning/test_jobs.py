"""Searches over all GPUs of a job: the trainer's and those of the engines."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cpgd.config.load import read_config
from megatron_cpgd.planning.jobs import search_jobs
from megatron_cpgd.planning.machine import GPUS, cpu_machine
from megatron_cpgd.planning.report import format_search
from megatron_cpgd.planning.search import Candidate, Planner, iter_layouts
from megatron_cpgd.planning.workload import assumed_lengths
from tests.helpers.planning import public_config, public_model
from tests.helpers.valid_run import write_run

APART = ("rollout.nodes=1", "rollout.engine_args.tensor_parallel_size=8")


def planner(folder: Path, model: str, *overrides: str) -> Planner:
    config = read_config(write_run(folder), overrides)
    return Planner(
        model=public_model(model), hf=public_config(model), config=config, machine=GPUS["h100"],
        lengths=assumed_lengths(config),
    )  # fmt: skip


def engine_nodes(found: list[Candidate]) -> list[int]:
    return [each.plan.workload.engine.nodes for each in found]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Candidate]:
    """Jobs of four nodes."""
    return search_jobs(planner(tmp_path_factory.mktemp("found"), "Qwen3-8B"), 32)


def test_all_gpus_of_a_job_are_counted_wherever_its_engines_are(found: list[Candidate]) -> None:
    assert set(engine_nodes(found)) == {0, 1, 2, 3}
    for each in found:
        plan, apart = each.plan, each.plan.workload.engine.nodes
        assert (plan.gpus, plan.nodes, plan.layout.world_size) == (32, 4, 32 - 8 * apart)
    speeds = [each.plan.tokens_per_gpu_s for each in found]
    assert speeds == sorted(speeds, reverse=True)
    # 1024 sequences of 512 + 2048 tokens in the mean.
    best = found[0].plan
    assert best.tokens_per_gpu_s == pytest.approx(1024 * 2560 / best.seconds.total / 32)


def test_the_best_of_each_place_is_shown_however_slow_it_is(found: list[Candidate]) -> None:
    places = engine_nodes(found)
    slower = max(places.index(0), next(i for i, nodes in enumerate(places) if nodes))
    assert slower >= 3
    *_, last = format_search(found, None, 32, shown=3).splitlines()
    assert last.split()[0] == str(slower + 1)


def test_engines_on_nodes_of_their_own_work_beside_the_trainer_if_batches_may_be_stale(
    tmp_path: Path, found: list[Candidate]
) -> None:
    stale = search_jobs(planner(tmp_path, "Qwen3-8B", "rollout.staleness=1"), 16)
    for jobs, expected in ((found, False), (stale, True)):
        apart = [each.plan.workload.overlap for each in jobs if each.plan.workload.engine.nodes]
        assert set(apart) == {expected}
        assert ("rollout.staleness=0" in format_search(jobs, None, 16)) == (not expected)


@pytest.mark.parametrize("given", [APART, ("rollout.sleep=true", "rollout.devices=[0]")])
def test_what_is_found_is_a_command_line_with_that_plan(
    tmp_path: Path, given: tuple[str, ...]
) -> None:
    found = search_jobs(planner(tmp_path, "Qwen3-8B", *given), 16)
    places = engine_nodes(found)
    for each in (found[places.index(0)], found[places.index(1)]):
        again = planner(tmp_path, "Qwen3-8B", *given, *each.command_line.split()).plan({})
        assert again is not None and again.fits
        assert again.seconds == each.plan.seconds


def test_nodes_for_engines_are_whole_ones(tmp_path: Path) -> None:
    assert set(engine_nodes(search_jobs(planner(tmp_path, "Qwen3-8B"), 12))) == {0}


def test_a_search_on_cpu_has_no_nodes_for_engines(tmp_path: Path) -> None:
    machine = replace(cpu_machine(), gpus_per_node=2, memory=2**41, host_memory=2**41)
    on_cpu = replace(planner(tmp_path, "Qwen2.5-7B", "precision.train=fp32"), machine=machine)
    assert set(engine_nodes(search_jobs(on_cpu, 4))) == {0}


def test_layers_that_no_pipeline_divides_are_given_out_unevenly(tmp_path: Path) -> None:
    layouts = list(iter_layouts(planner(tmp_path, "DeepSeek-V3"), 256))
    given = {each["parallel.pp"]: each["parallel.stage_layers"] for each in layouts}
    assert given.keys() == {1, 2, 4, 8, 16, 32}
    assert given[1] is None
    assert given[4] == [16, 15, 15, 15]  # 61 layers
    assert given[16] == [4] * 13 + [3] * 3
