"""What is proposed fits, and is valid."""

from pathlib import Path

import pytest

from megatron_cpgd.config.load import read_config
from megatron_cpgd.config.schema import MACHINES
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.planning.machine import GPUS, find_machine, save_machine, with_factors
from megatron_cpgd.planning.search import Planner, find_fixes, search_layouts, with_overrides
from megatron_cpgd.planning.workload import assumed_lengths
from tests.helpers.planning import public_config, public_model
from tests.helpers.valid_run import write_run


def planner(folder: Path, model: str, *overrides: str) -> Planner:
    """Of a public model on H100."""
    config = read_config(write_run(folder), overrides)
    return Planner(
        model=public_model(model),
        hf=public_config(model),
        config=config,
        machine=GPUS["h100"],
        lengths=assumed_lengths(config),
    )


def test_every_fix_is_a_command_line_that_makes_the_configuration_fit(tmp_path: Path) -> None:
    given = ("parallel.tp=2", "parallel.dp=4")
    broken = planner(tmp_path, "Qwen3-8B", *given)
    plan = broken.plan({})
    assert plan is not None and not plan.fits
    fixes = find_fixes(broken)
    assert fixes
    for fix in fixes:
        again = planner(tmp_path, "Qwen3-8B", *given, *fix.command_line.split()).plan({})
        assert again is not None and again.fits
        assert again.worst.total == fix.plan.worst.total


def test_one_change_is_preferred_to_two(tmp_path: Path) -> None:
    # Of 16 384 tokens the activations of 8 B parameters do not fit beside 18 bytes of state for
    # each of 8.2 / 8 B; recomputing them does it. The engine's share is settled beside the changes.
    broken = planner(
        tmp_path, "Qwen3-8B", "parallel.tp=2", "parallel.dp=4",
        "rollout.engine_args={tensor_parallel_size: 8, gpu_memory_utilization: 0.3}",
    )  # fmt: skip
    assert {"model.recompute": "full"} in [fix.overrides for fix in find_fixes(broken)]


def test_an_engine_that_reads_the_weights_in_place_needs_no_arena(tmp_path: Path) -> None:
    arena, in_place = (
        planner(tmp_path, "Qwen3-8B", f"rollout.sync={sync}").plan({})
        for sync in ("arena", "in_place")
    )
    assert arena is not None and in_place is not None
    assert in_place.host.arena == 0
    assert in_place.host.total == arena.host.total - arena.host.arena


def test_what_fits_needs_no_fix(tmp_path: Path) -> None:
    fitting = planner(
        tmp_path, "Qwen3-8B", "parallel.tp=8", "model.recompute=full",
        "rollout.engine_args.gpu_memory_utilization=0.4",
    )  # fmt: skip
    plan = fitting.plan({})
    assert plan is not None and plan.fits


def test_a_search_finds_valid_layouts_of_the_count_fastest_first(tmp_path: Path) -> None:
    found = search_layouts(planner(tmp_path, "Qwen3-30B-A3B"), 8)
    seconds = [each.plan.seconds.total for each in found]
    assert found and seconds == sorted(seconds)
    assert all(each.plan.fits and each.plan.layout.world_size == 8 for each in found)


def test_overrides_of_one_section_and_one_mapping_do_not_lose_each_other(tmp_path: Path) -> None:
    config = read_config(write_run(tmp_path), ["rollout.engine_args={max_num_seqs: 7}"])
    changed = with_overrides(
        config,
        {"rollout.engine_args.tensor_parallel_size": 2, "rollout.engine_args.seed": 3}
        | {"parallel.tp": 2, "parallel.dp": 3},
    )
    expected = {"max_num_seqs": 7, "tensor_parallel_size": 2, "seed": 3}
    assert changed.rollout.engine_args == expected
    assert (changed.parallel.tp, changed.parallel.dp) == (2, 3)


def test_hardware_rules_are_named(tmp_path: Path) -> None:
    wide = planner(tmp_path, "Qwen3-235B-A22B", "parallel.dp=16", "parallel.ep=16").plan({})
    assert wide is not None and "parallel.ep=16" in wide.warnings[0]
    crossing = planner(tmp_path, "Qwen2.5-7B", "parallel.tp=16").plan({})
    assert crossing is None  # 4 KV heads
    deep = planner(tmp_path, "Llama-3.1-405B", "parallel.tp=8", "parallel.pp=2")
    too_few = Planner(
        model=deep.model, hf=deep.hf, config=deep.config, machine=deep.machine,
        lengths=deep.lengths, nodes=1,
    ).plan({})  # fmt: skip
    assert too_few is not None
    assert "parallel.* needs 16 GPUs, 1 nodes have 8" in too_few.problems


def test_the_settings_know_the_same_machines() -> None:
    assert set(MACHINES) == {*GPUS, "cpu"}


def test_a_machine_file_is_read_back_equal(tmp_path: Path) -> None:
    machine = with_factors(GPUS["h200"], train_factor=1.25, rank_memory=7)
    save_machine(machine, tmp_path / "machine.yaml")
    assert find_machine(str(tmp_path / "machine.yaml")) == machine


@pytest.mark.parametrize("content", ["[1, 2]", "name: h100", "name: {"])
def test_a_file_that_is_no_machine_is_one_clear_message(tmp_path: Path, content: str) -> None:
    file = tmp_path / "machine.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"machine\.yaml"):
        find_machine(str(file))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("gpus_per_node: 8", "gpus_per_node: 0", "gpus_per_node: must be > 0, got 0"),
        ("  dense: 0.45", "  dens: 0.45", "efficiency.dens: unknown; did you mean 'dense'?"),
        ("  dense: 0.45", "  dense: 0", "efficiency.dense: must be > 0, got 0"),
        ("  other_s: 0.0", "  other_s: -1", "efficiency.other_s: must be >= 0, got -1"),
        ("network: 50000000000.0", "network: .nan", "network: must be > 0, got nan"),
        ("name: h100", "name: h100\nnvlnk: 1", "nvlnk: unknown; did you mean 'nvlink'?"),
        ("  bf16: 989000000000000.0\n", "", "flops.bf16: missing"),
    ],
)
def test_a_machine_with_which_nothing_can_be_computed_is_refused(
    tmp_path: Path, before: str, after: str, expected: str
) -> None:
    file = tmp_path / "machine.yaml"
    save_machine(GPUS["h100"], file)
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))
    with pytest.raises(ConfigError, match="not a machine") as caught:
        find_machine(str(file))
    assert expected in str(caught.value)


def test_engines_with_gpus_of_their_own_leave_the_trainer_s_alone(tmp_path: Path) -> None:
    own = ("rollout.engines=2", "rollout.devices=[4,5,6,7]", "parallel.tp=4")
    plan = planner(tmp_path, "Qwen2.5-7B", "model.recompute=full", *own).plan({})
    assert plan is not None and plan.fits and plan.gpus == 8
    assert plan.beside(0) == 0
    engine = plan.workload.engine
    # Each has two GPUs and uses the first of them.
    assert [engine.on_gpu(gpu) for gpu in range(8)] == [0, 0, 0, 0, 1, 0, 1, 0]
    shared = planner(tmp_path, "Qwen2.5-7B", "rollout.engines=2", "parallel.tp=4").plan({})
    assert shared is not None and shared.beside(0) == 2 * shared.engine.claimed


def test_sampling_beside_training_takes_no_time_until_it_is_longer(tmp_path: Path) -> None:
    own = ("rollout.devices=[4]", "parallel.tp=4", "rollout.staleness=1")
    one = planner(tmp_path, "Qwen2.5-7B", *own).plan({})
    beside = planner(tmp_path, "Qwen2.5-7B", *own, "rollout.overlap=true").plan({})
    assert one is not None and beside is not None
    work = one.seconds.old_logprobs + one.seconds.train
    assert one.seconds.generate > work
    assert beside.seconds.generate == pytest.approx(one.seconds.generate - work)
