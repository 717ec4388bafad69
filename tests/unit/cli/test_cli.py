"""The command line through real processes: exit codes and what the user sees."""

import errno
import json
import os
import subprocess
import sys
import types
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from megatron_cpgd.cli import main
from megatron_cpgd.errors import RolloutError
from megatron_cpgd.tracking.run_folder import RunFolder

LAUNCHER = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
"""What torchrun sets for a single rank."""


def run_cli(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_cpgd.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_config_prints_the_resolved_settings_on_stdout(run_yaml):
    result = run_cli("config", run_yaml, "optim.lr=2e-6")
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["optim"]["lr"] == 2e-6
    assert result.stderr == ""


def test_config_checks_a_recipe_without_its_model(capsys):
    recipe = "configs/cpgd-qwen3-8b-1n8g-tp2.yaml"
    assert main(["config", recipe]) == 2
    assert "model.path=/models/Qwen3-8B: no such folder" in capsys.readouterr().err
    assert main(["config", recipe, "--model-config", "configs/models/Qwen3-8B"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["rollout"]["samples_per_prompt"] == 8


def test_settings_may_stand_behind_an_option(capsys):
    recipe, model = "configs/cpgd-qwen3-8b-1n8g-tp2.yaml", "configs/models/Qwen3-8B"
    command = ["config", recipe, "optim.lr=2e-6", "--model-config", model, "run.seed=7"]
    assert main(command) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["optim"]["lr"], shown["run"]["seed"]) == (2e-6, 7)
    for wrong in ("--modle-config=x", "seed"):
        with pytest.raises(SystemExit, match="2"):
            main([*command, wrong])
        assert f"unrecognized arguments: run.seed=7 {wrong}" in capsys.readouterr().err


def test_verify_layout_tells_what_each_rank_holds():
    recipe, model = "configs/cpgd-qwen3-8b-1n8g-tp2.yaml", "configs/models/Qwen3-8B"
    result = run_cli("verify-layout", recipe, "--model-config", model, "--ranks", "0,7")
    assert result.returncode == 0, result.stderr
    # By hand: half of 8 190 735 360, and the other half of the norms: 36 layers with two norms of
    # 4096 and two of 128, and the last norm.
    half = (8_190_735_360 + 36 * (2 * 4096 + 2 * 128) + 4096) // 2
    assert result.stdout.splitlines() == [
        f"{model}: 8,190,735,360 parameters in 399 tensors; each element is on one of 8 ranks, "
        "replicas aside",
        f"rank 0: {half:,} parameters, as expected",
        f"rank 7: {half:,} parameters, as expected",
    ]


@pytest.mark.parametrize("ranks", ["8", "-1,0"])
def test_verify_layout_refuses_ranks_that_do_not_exist(ranks, capsys):
    recipe, model = "configs/cpgd-qwen3-8b-1n8g-tp2.yaml", "configs/models/Qwen3-8B"
    command = ["verify-layout", recipe, "--model-config", model, f"--ranks={ranks}"]
    assert main(command) == 2
    assert "are not among the 8 ranks of the layout" in capsys.readouterr().err


def test_mistakes_end_with_exit_code_2_and_no_traceback(run_yaml):
    result = run_cli("config", run_yaml, "optim.lrr=2", "run.steps=0")
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "2 problems" in result.stderr
    assert "optim.lrr: unknown setting; did you mean 'lr'?" in result.stderr


def test_train_refuses_a_mistake_before_it_creates_anything(run_yaml):
    result = run_cli("train", run_yaml, "parallel.tp=3")
    assert result.returncode == 2
    assert "parallel.tp=3 does not divide" in result.stderr
    assert not (run_yaml.parent / "run").exists()


def test_train_refuses_the_folder_of_another_run(run_yaml, capsys):
    folder = run_yaml.parent / "run"
    folder.mkdir()
    assert main(["config", str(run_yaml)]) == 0
    (folder / "config.yaml").write_text(capsys.readouterr().out)
    assert main(["train", str(run_yaml), "optim.lr=2e-6"]) == 2
    message = capsys.readouterr().err
    assert "optim.lr: the run in" in message
    assert "use another run.dir" in message


def test_train_refuses_to_end_before_the_step_where_the_run_is(run_yaml, capsys):
    checkpoints = run_yaml.parent / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest").write_text("step_000009\n")
    assert main(["train", str(run_yaml), "run.steps=8"]) == 2
    message = capsys.readouterr().err
    assert "run.steps=8: this run is behind step 9 already; set run.steps to at least 9" in message


def test_a_refused_start_does_not_remove_the_folder_that_another_run_has_made_meanwhile(
    run_yaml, monkeypatch
):
    monkeypatch.setattr("megatron_cpgd.tracking.folder_lock.END_S", 0.0)
    folder = RunFolder(run_yaml.parent / "run")
    with ExitStack() as stack:

        def refuse(*_: object, **__: object) -> int:
            stack.enter_context(folder.claim())
            return 2

        monkeypatch.setattr("megatron_cpgd.launch.launch_ranks", refuse)
        assert main(["train", str(run_yaml)]) == 2
        assert folder.dir.exists()


def test_train_starts_itself_once_for_each_rank_and_the_engine_nodes(run_yaml, monkeypatch):
    calls = []

    def record(*call: object, stop_within_s: float, engine_nodes: list[list[str]]) -> int:
        calls.append((*call, stop_within_s, engine_nodes))
        return 9

    monkeypatch.setattr("megatron_cpgd.launch.launch_ranks", record)
    overrides = ["parallel.tp=2", "parallel.dp=2", "rollout.nodes=1"]
    assert main(["train", str(run_yaml), *overrides]) == 9
    cli, given = [sys.executable, "-m", "megatron_cpgd.cli"], [str(run_yaml), *overrides]
    node = [*cli, "serve", "--node=0", *given]
    assert calls == [([*cli, "train", *given], 4, run_yaml.parent / "run" / "logs", 540.0, [node])]


def test_under_a_launcher_train_runs_as_that_rank(run_yaml, monkeypatch):
    trained = []
    loop = types.ModuleType("megatron_cpgd.train")
    loop.train = lambda config, stop: trained.append(config)
    monkeypatch.setitem(sys.modules, "megatron_cpgd.train", loop)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert main(["train", str(run_yaml), "parallel.dp=2"]) == 0
    assert trained[0].parallel.dp == 2
    assert main(["train", str(run_yaml), "parallel.dp=4"]) == 2


@pytest.mark.parametrize(
    ("arguments", "function", "expected"),
    [
        (
            ["hf-to-megatron", "a", "b", "--dtype", "fp32"],
            "hf_to_megatron",
            ((Path("a"), Path("b")), {"dtype": "fp32"}),
        ),
        (
            ["megatron-to-hf", "a", "b", "--max-shard-gb", "0.5"],
            "megatron_to_hf",
            ((Path("a"), Path("b")), {"max_shard_bytes": 500_000_000}),
        ),
    ],
)
def test_convert_passes_its_arguments_on(monkeypatch, arguments, function, expected):
    calls = []
    converter = types.ModuleType("megatron_cpgd.policy.convert")
    setattr(converter, function, lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setitem(sys.modules, "megatron_cpgd.policy.convert", converter)
    assert main(["convert", *arguments]) == 0
    assert calls == [expected]


def test_checking_a_configuration_imports_no_heavy_library(run_yaml):
    code = (
        "import sys; from megatron_cpgd.cli import main; main(['config', sys.argv[1]]);"
        "heavy = {'torch', 'megatron', 'vllm', 'transformers', 'numpy', 'matplotlib'};"
        "sys.exit(', '.join(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code, run_yaml], capture_output=True, text=True)
    assert result.stderr.strip() == ""


def test_the_schema_needs_no_file(capsys):
    assert main(["config", "--schema"]) == 0
    assert "| `optim.lr` | number > 0 | 1e-06 |" in capsys.readouterr().out


def test_config_without_file_says_what_to_give(capsys):
    assert main(["config"]) == 2
    assert "give a YAML file, or --schema" in capsys.readouterr().err


def test_a_reader_that_has_gone_is_no_error():
    """As in `megatron-cpgd config --schema | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "megatron_cpgd.cli", "config", "--schema"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_defect_shows_its_traceback_and_exits_with_1(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").mkdir()  # nobody expects a folder here
    result = run_cli("report", tmp_path / "run")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_a_run_that_cannot_go_on_shows_its_message_and_exits_with_3(run_yaml, monkeypatch, capsys):
    def fail(*_: object, stop: object) -> None:
        raise RolloutError("the engine is gone")

    loop = types.ModuleType("megatron_cpgd.train")
    loop.train = fail
    monkeypatch.setitem(sys.modules, "megatron_cpgd.train", loop)
    for name, value in LAUNCHER.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(run_yaml)]) == 3
    assert capsys.readouterr().err == "megatron-cpgd train: the engine is gone\n"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RANK", "first", "environment variable RANK: expected a number, got 'first'"),
        ("RANK", "1", "RANK=1 is not below WORLD_SIZE=1"),
        ("WORLD_SIZE", None, "environment variable WORLD_SIZE: expected a number, it is not set"),
        ("MASTER_PORT", None, "environment variable MASTER_PORT: expected a number, it is not set"),
        ("MASTER_ADDR", None, "MASTER_ADDR is not: export the host of rank 0"),
    ],
)
def test_an_environment_in_which_no_rank_can_start_is_one_message(
    run_yaml, monkeypatch, capsys, name, value, expected
):
    for variable, usual in LAUNCHER.items():
        monkeypatch.setenv(variable, usual)
    monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name)
    assert main(["train", str(run_yaml), "parallel.dp=1"]) == 2
    assert expected in capsys.readouterr().err
    assert not (run_yaml.parent / "run").exists()


@pytest.mark.parametrize(
    ("number", "code", "hint"),
    [
        (errno.ENOSPC, 3, "No space left on device; make room there"),
        (errno.EACCES, 2, "Permission denied; choose another place"),
    ],
)
def test_what_the_machine_refuses_is_one_message(run_yaml, monkeypatch, capsys, number, code, hint):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), "/full/file")

    monkeypatch.setattr("megatron_cpgd.tracking.report.read_metrics", fail)
    (run_yaml.parent / "metrics.jsonl").touch()
    assert main(["report", str(run_yaml.parent)]) == code
    assert capsys.readouterr().err.startswith(f"megatron-cpgd report: /full/file: {hint}")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_finished_run_is_not_started_by_torchrun_either(run_yaml, monkeypatch, capsys, rank):
    folder = run_yaml.parent / "run"
    (folder / "hf" / "step_000010").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest").write_text("step_000010\n")
    (folder / "metrics.jsonl").write_text('{"step": 10, "reward/mean": 1.0}\n')
    monkeypatch.setitem(sys.modules, "megatron_cpgd.train", None)  # an import would fail
    monkeypatch.setenv("RANK", rank)
    assert main(["train", str(run_yaml)]) == 0
    assert ("reward/mean" in capsys.readouterr().out) == (rank == "0")


def test_an_unknown_command_exits_with_2():
    with pytest.raises(SystemExit) as caught:
        main(["trian"])
    assert caught.value.code == 2


def test_ctrl_c_exits_with_130(monkeypatch, tmp_path):
    def interrupted(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_cpgd.tracking.report.read_metrics", interrupted)
    (tmp_path / "metrics.jsonl").touch()
    assert main(["report", str(tmp_path)]) == 130


def test_report_prints_a_table_and_draws_a_plot(tmp_path, capsys):
    rows = [{"step": step, "reward/mean": step / 2, "time/total_s": 30.0} for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("3 steps, 1.5 min\n")
    assert str(tmp_path / "learning_curve.png") in out
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_report_names_findings_by_the_configuration_of_the_run(tmp_path, capsys):
    rows = [{"step": step, "policy/kl_k3": 0.05} for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert main(["report", str(tmp_path)]) == 0
    assert "drift_explosion" not in capsys.readouterr().out
    (tmp_path / "config.yaml").write_text("stability: {drift_explosion: 0.01, patience: 3}\n")
    assert main(["report", str(tmp_path)]) == 0
    assert "step 3: drift_explosion since step 1: expected" in capsys.readouterr().out
    (tmp_path / "config.yaml").write_text("stability: {fear: 1}\n")
    assert main(["report", str(tmp_path)]) == 2
    assert "config.yaml: the section `stability` does not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), ("", "no finished step"), ("{}\nx", ":1: not")]
)
def test_report_says_why_it_has_nothing_to_show(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
