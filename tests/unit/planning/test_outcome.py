"""Predicted against measured, on rows that the formulas themselves have written."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_cpgd.config.load import read_config, save_config
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import UserError
from megatron_cpgd.planning.estimate import make_plan
from megatron_cpgd.planning.machine import GPUS, Machine, save_machine, with_factors
from megatron_cpgd.planning.outcome import (
    calibrate,
    format_outcome,
    predicted_and_measured,
    read_outcome,
)
from megatron_cpgd.planning.rates import StepRates, note_machine
from megatron_cpgd.planning.workload import Lengths
from megatron_cpgd.tracking.run_folder import RunFolder
from tests.helpers.planning import public_config, public_model
from tests.helpers.valid_run import write_run

TRUTH = with_factors(
    GPUS["h100"], train_factor=1.5, generate_factor=0.8, sync_factor=2.0, other_s=3.0,
    rank_memory=5 * 2**30,
)  # fmt: skip
"""A machine that is not as the data sheet has it."""


def write_outcome(folder: Path, machine: Machine, *overrides: str) -> RunFolder:
    """A run of Qwen3-8B on that machine, noted as an H100."""
    config = read_config(write_run(folder), ["parallel.tp=4", *overrides])
    path = folder / "model/config.json"
    path.write_text(json.dumps(public_config("Qwen3-8B")))
    lengths = Lengths(prompt=100.0, response=1000.0, longest=3000)
    plan = make_plan(public_model("Qwen3-8B"), config, machine, lengths)
    run = RunFolder(config.run.dir)
    run.dir.mkdir()
    save_config(config, run.config)
    save_machine(GPUS["h100"], run.machine)
    run.metrics.write_text("".join(rows(plan.seconds, plan.worst.total, config)))
    return run


def rows(seconds: object, memory: int, config: ExperimentConfig) -> list[str]:
    """Four steps, the first of them slow; every later one as predicted."""
    sequences = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    parts = {f"time/{name}_s": value for name, value in asdict(seconds).items()}  # type: ignore[call-overload]
    row = parts | {
        "perf/memory_peak_gib": memory / 2**30,
        "perf/tokens_per_s": sequences * 1100 / parts["time/train_s"],
        "rollout/response_tokens_mean": 1000.0,
        "rollout/response_tokens_max": 3000.0,
    }
    slow = row | {"time/generate_s": 1e6}
    first = json.dumps({"step": 0, "eval/x/accuracy": 0.5})
    steps = [slow, row, row, row]
    return [f"{first}\n", *(json.dumps({"step": i} | x) + "\n" for i, x in enumerate(steps, 1))]


def test_a_calibrated_machine_predicts_its_run_and_others(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    fitted = calibrate(read_outcome(write_outcome(tmp_path / "a", TRUTH)))
    assert fitted.efficiency.train_factor == pytest.approx(1.5)
    assert fitted.efficiency.generate_factor == pytest.approx(0.8)
    assert fitted.efficiency.sync_factor == pytest.approx(2.0)
    assert fitted.efficiency.rank_memory == pytest.approx(5 * 2**30, abs=8)
    other = write_outcome(tmp_path / "b", TRUTH, "rollout.samples_per_prompt=2")
    outcome = read_outcome(other, fitted)
    assert sum(outcome.seconds.values()) == pytest.approx(outcome.plan.seconds.total)
    assert outcome.memory_gib == pytest.approx(outcome.plan.worst.total / 2**30)


def test_calibrating_twice_changes_nothing(tmp_path: Path) -> None:
    run = write_outcome(tmp_path, TRUTH)
    once = calibrate(read_outcome(run))
    twice = calibrate(read_outcome(run, once))
    assert asdict(twice.efficiency) == pytest.approx(asdict(once.efficiency))


def test_the_report_says_by_how_much_each_part_was_missed(tmp_path: Path) -> None:
    lines = predicted_and_measured(write_outcome(tmp_path, TRUTH))
    ratios = {line.split()[0]: line.split()[-1] for line in lines[1:]}
    assert (ratios["train"], ratios["generate"], ratios["sync"]) == ("1.50", "0.80", "2.00")


def test_the_report_of_a_run_never_fails_for_its_prediction(tmp_path: Path) -> None:
    run = write_outcome(tmp_path, TRUTH)
    run.machine.write_text("name: {")
    assert predicted_and_measured(run)[0].startswith("predicted and measured: none")
    run.metrics.write_text("")
    assert "needs at least 2 trained steps" in predicted_and_measured(run)[0]
    with pytest.raises(UserError, match="2 trained steps"):
        read_outcome(run)


def test_a_rate_that_is_not_measured_is_left_out(tmp_path: Path) -> None:
    run = write_outcome(tmp_path, TRUTH)
    text = run.metrics.read_text().replace("perf/memory_peak_gib", "perf/other")
    run.metrics.write_text(text)
    outcome = read_outcome(run)
    assert outcome.memory_gib is None
    assert not any(line.startswith("memory") for line in format_outcome(outcome))


def test_mfu_is_model_flops_over_the_peak_of_all_gpus(tmp_path: Path) -> None:
    config = read_config(write_run(tmp_path), ["parallel.dp=2", "algorithm.epochs=3"])
    rates = StepRates(public_config("Qwen3-8B"), config, "NVIDIA H100 80GB HBM3")
    metrics = rates.metrics([1000, 3000], {"time/train_s": 2.0})
    model = public_model("Qwen3-8B")
    # Attention counts each sequence by its own length, so not the mean of 2000.
    flops = 6 * model.active_parameters * 4000 + 3 * 36 * 8192 * (1000**2 + 3000**2)
    assert metrics["perf/mfu"] == pytest.approx(3 * flops / 2 / (2 * 989e12))
    assert metrics["perf/tokens_per_s"] == 3 * 2000


def test_mfu_needs_a_known_gpu_and_a_trained_batch(tmp_path: Path) -> None:
    config = read_config(write_run(tmp_path))
    rates = StepRates(public_config("Qwen3-8B"), config, None)
    assert rates.metrics([10], {"time/train_s": 1.0}) == {"perf/tokens_per_s": 10.0}
    assert rates.metrics([], {"time/train_s": 1.0}) == {}


def test_a_run_notes_its_machine_if_it_knows_it(tmp_path: Path) -> None:
    note_machine(tmp_path / "a", None, "NVIDIA H200")
    assert "name: h200" in (tmp_path / "a").read_text()
    note_machine(tmp_path / "b", None, "Tesla V100")
    assert not (tmp_path / "b").exists()
    mine = replace(GPUS["h100"], name="mine")
    save_machine(mine, tmp_path / "mine.yaml")
    note_machine(tmp_path / "c", str(tmp_path / "mine.yaml"), "NVIDIA H200")
    assert "name: mine" in (tmp_path / "c").read_text()
