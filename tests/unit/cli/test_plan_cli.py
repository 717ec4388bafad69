"""`megatron-cpgd plan`: exit codes, tables and JSON."""

import json
from pathlib import Path

import pytest

from megatron_cpgd.cli import main
from tests.helpers.planning import MODELS
from tests.helpers.valid_run import write_run

MODEL = ("--model-config", str(MODELS / "Qwen3-8B"))
FITTING = (
    "parallel.tp=8", "model.recompute=full", "rollout.engine_args.gpu_memory_utilization=0.4",
)  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(write_run(tmp_path))


def test_a_plan_that_fits_ends_with_0_and_says_so(config: str, capsys) -> None:
    assert main(["plan", *MODEL, config, *FITTING]) == 0
    out = capsys.readouterr().out
    assert "FITS" in out and "8.19 B parameters; tp=8" in out


def test_a_plan_that_does_not_fit_ends_with_4_and_ready_overrides(config: str, capsys) -> None:
    assert main(["plan", *MODEL, config]) == 4
    out = capsys.readouterr().out
    assert "DOES NOT FIT: GPU memory" in out
    assert "It would fit with one of these lines:\n  " in out


def test_a_wrong_configuration_ends_with_2_and_the_message_of_train(config: str, capsys) -> None:
    assert main(["plan", *MODEL, config, "parallel.tp=3"]) == 2
    assert "parallel.tp=3 does not divide num_attention_heads=32" in capsys.readouterr().err
    assert main(["plan", config, "model.path=/nowhere"]) == 2
    assert "model.path=/nowhere: no such folder" in capsys.readouterr().err
    assert main(["plan", *MODEL, config, "--machine", "h1000"]) == 2
    assert "--machine h1000: neither one of a100" in capsys.readouterr().err
    assert main(["plan"]) == 2


def test_json_has_every_number_of_the_table(config: str, capsys) -> None:
    assert main(["plan", *MODEL, "--json", config, *FITTING, "--response-tokens", "300"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["gpus"] == 8 and plan["parameters"] == 8_190_735_360
    assert plan["generation"]["concurrent"] > 0
    parts = {name: s for name, s in plan["seconds"].items() if name != "total"}
    assert sum(parts.values()) == pytest.approx(plan["seconds"]["total"])
    # Weights of a rank: an eighth of the model in bf16, but for norms and padding.
    weights = plan["memory"]["stages"][0]["weights"]
    assert weights == pytest.approx(2 * 8_190_735_360 / 8, rel=0.001)


def test_a_search_prints_layouts_of_that_many_gpus(config: str, capsys) -> None:
    assert main(["plan", *MODEL, "--search", "8", config]) == 0
    first = capsys.readouterr().out.splitlines()[3]
    assert first.startswith("1 ") and "gpu_memory_utilization" in first
    assert main(["plan", *MODEL, "--search", "8", "--json", config]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(each["gpus"] == 8 for each in found)


def test_a_search_without_result_says_what_stands_in_the_way(config: str, capsys) -> None:
    model = ("--model-config", str(MODELS / "DeepSeek-V3"))
    assert main(["plan", *model, "--search", "8", config]) == 4
    first, *problems = capsys.readouterr().out.splitlines()
    assert first.startswith("No layout of 8 GPUs fits. The nearest one with the engines as they ")
    assert any("engine: with tensor_parallel_size=1" in problem for problem in problems)


OPTIONS = {
    ("--nodes=0",): "argument --nodes: must be an integer > 0, got '0'",
    ("--search=-8",): "argument --search: must be an integer > 0, got '-8'",
    ("--response-tokens=2k",): "argument --response-tokens: must be a number > 0, got '2k'",
    ("--response-tokens=5000",): "5000 tokens of a response is more than rollout.max_response_tok",
    ("--search=8", "--nodes=1"): "--nodes=1 does nothing: --search 8 takes the nodes",
    ("--out=m.yaml",): "--out m.yaml does nothing without --calibrate",
    ("--machine=",): "--machine : neither one of a100",
    ("tracking.machine=h1000",): "tracking.machine: h1000: neither one of a100",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_an_option_that_is_wrong_or_does_nothing_is_refused(
    config: str, capsys, options: tuple[str, ...]
) -> None:
    try:
        code = main(["plan", *MODEL, config, *options])
    except SystemExit as exit:  # argparse
        code = exit.code
    assert code == 2
    assert OPTIONS[options] in capsys.readouterr().err


def test_options_of_a_run_are_refused_where_no_run_is_given(capsys) -> None:
    assert main(["plan", "--calibrate", "runs/x", "--search", "8"]) == 2
    assert "--search does nothing without the YAML file of a run" in capsys.readouterr().err
