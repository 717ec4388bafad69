"""From cells to a report: simulated rows are plans, measured ones what the runs have noted."""

import importlib.util
import json
import math

import pytest

from megatron_cpgd.cli import main as cli
from megatron_cpgd.errors import UserError
from megatron_cpgd.planning.estimate import make_plan
from megatron_cpgd.planning.workload import Lengths
from megatron_cpgd.study.scaling.collect import collect, is_done, simulate
from megatron_cpgd.study.scaling.report import write_report
from megatron_cpgd.study.scaling.runs import CellRun, run_cells
from tests.helpers.full_run import ROOT
from tests.helpers.scaling import load_scaling_study, make_up_run, write_scaling_study


@pytest.fixture
def study(tmp_path):
    return load_scaling_study(tmp_path)


def test_a_simulated_cell_is_what_plan_says(study, tmp_path, capsys):
    rows = list(simulate(study).rows.values())
    assert [(row.gpus, row.dp, row.state) for row in rows] == [
        (8, 2, "done"), (16, 4, "done"), (32, 8, "done"),
    ]  # fmt: skip
    arguments = ["parallel.tp=4", "parallel.dp=4", "rollout.prompts_per_step=64"]
    arguments += [f"{name}={value}" for name, value in study.spec.settings.items()]
    assert cli(["plan", str(tmp_path / "run.yaml"), *arguments, "--nodes=2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    row = rows[1]
    assert row.step_s == pytest.approx(plan["seconds"]["total"])
    assert row.generate_s == pytest.approx(plan["seconds"]["generate"])
    assert row.train_s == pytest.approx(plan["seconds"]["train"])
    assert row.sync_s == pytest.approx(plan["seconds"]["sync"])
    assert row.mfu == pytest.approx(plan["mfu"])
    assert row.memory_gib == pytest.approx(plan["memory"]["worst_bytes"] / 2**30)
    # 64 prompts of 8 responses, half as long as allowed: 1024 tokens, and 512 of the prompt.
    assert row.response_tokens == 64 * 8 * 1024
    assert row.tokens == 64 * 8 * (1024 + study.cells[row.key].config.data.max_prompt_tokens / 2)
    assert row.tokens_per_s * row.step_s == pytest.approx(row.tokens)


def test_a_cell_that_does_not_fit_says_why(tmp_path):
    study = load_scaling_study(tmp_path, layouts=[{}, {"search": True}], settings={}, nodes=[1])
    dp, searched = simulate(study).rows.values()
    assert dp.state == "does not fit" and "GPU memory: a rank of stage 0 needs" in dp.reason
    assert (dp.dp, math.isnan(dp.step_s)) == (0, True)
    # The search lowers the engine's share of the memory, so it finds something.
    assert searched.state == "done" and searched.tp * searched.pp * searched.cp * searched.dp == 8


def test_the_search_gives_engine_nodes_the_engines_that_sample_fastest(tmp_path):
    study = load_scaling_study(
        tmp_path, layouts=[{"search": True, "engine_nodes": 0.5}], nodes=[2], settings={}
    )
    [cell] = study.cells.values()
    seconds = {}
    for size in (1, 2, 4, 8):
        overrides = {
            "parallel.dp": 8, "rollout.nodes": 1, "rollout.engines": 8 // size,
            "rollout.engine_args.tensor_parallel_size": size,
        }  # fmt: skip
        plan = cell.planner.plan(overrides)
        assert plan
        seconds[size] = plan.generation.total
    engine_args = cell.config.rollout.engine_args
    assert engine_args["tensor_parallel_size"] == min(seconds, key=seconds.__getitem__)
    assert cell.config.rollout.engines * engine_args["tensor_parallel_size"] == 8


def test_measured_seconds_leave_out_the_warm_up(study):
    for cell, seconds in zip(study.cells.values(), (100.0, 60.0, 40.0), strict=True):
        make_up_run(cell, seconds)
    table = collect(study)
    first, *_ = table.rows.values()
    assert first.step_s == pytest.approx(100) and first.steps == 6
    parts = (first.generate_s, first.logprobs_s, first.train_s, first.sync_s, first.other_s)
    assert parts == pytest.approx((10, 20, 50, 12.5, 7.5))
    assert first.idle == pytest.approx(0.1) and first.memory_gib == 60
    cell = study.cells[first.key]
    lengths = Lengths(prompt=512, response=1000, longest=2000)
    predicted = make_plan(cell.planner.model, cell.config, study.machine, lengths)
    assert first.predicted_train_s == pytest.approx(predicted.seconds.train)
    assert first.mfu == pytest.approx(predicted.mfu * predicted.seconds.train / 50)


def test_the_first_cell_calibrates_the_predictions_of_the_others(study, tmp_path):
    for cell in study.cells.values():
        make_up_run(cell, 100.0)
    first, _, last = collect(study).rows.values()
    assert first.calibrated_step_s == pytest.approx(100)
    assert first.calibrated_memory_gib == pytest.approx(60)
    # Of 100 s, 10 are for responses, 70 for the trainer's passes, 12.5 for the sync.
    expected = 7.5 + (
        10 * last.predicted_generate_s / first.predicted_generate_s
        + 12.5 * last.predicted_sync_s / first.predicted_sync_s
        + 70 * (last.predicted_train_s + last.predicted_logprobs_s)
        / (first.predicted_train_s + first.predicted_logprobs_s)
    )  # fmt: skip
    assert last.calibrated_step_s == pytest.approx(expected)
    # What the formulas lack is the same on every rank; on more nodes a rank holds less.
    lacking = 60 - first.predicted_memory_gib
    assert last.calibrated_memory_gib == pytest.approx(last.predicted_memory_gib + lacking)
    assert last.calibrated_memory_gib < 60


def test_a_report_of_measured_runs_fits_the_laws(study, tmp_path):
    for cell, seconds in zip(study.cells.values(), (100.0, 60.0, 40.0), strict=True):
        make_up_run(cell, seconds)  # 20 s + 80 s * 8 / n
    text = write_report(study, collect(study), tmp_path / "report").read_text()
    assert "**Measured** on " in text and "Simulated" not in text
    assert "2.50 times as fast, an efficiency of 0.62" in text  # 100 / 40 on 4 times the GPUs
    assert "serial share of the step on 8 GPUs 0.2 [0.2, 0.2], off by 0%" in text
    assert "Where the time goes on 8 GPUs (tp4): train 50%, logprobs 20%, sync 12%" in text
    assert "## Measured over predicted" in text


def test_a_simulated_report_says_so_and_is_the_same_twice(study, tmp_path):
    table = simulate(study)
    contents = []
    for name in ("one", "two"):
        path = write_report(study, table, tmp_path / name)
        contents.append({file.name: file.read_bytes() for file in path.parent.iterdir()})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == ["facts.json", "m_strong_64.svg", "report.md", "table.csv"]
    text = contents[0]["report.md"].decode()
    assert "**Simulated** on " in text and "nothing here was measured" in text
    assert "## What the simulation leaves out" in text


def test_two_points_have_no_interval_and_one_has_no_law(tmp_path):
    study = load_scaling_study(tmp_path, nodes=[1, 2], layouts=[{"tp": 4}, {"tp": 4, "cp": 4}])
    text = write_report(study, simulate(study), tmp_path / "report").read_text()
    assert "`tp4`, 2 points, which every law meets: no interval." in text
    assert "`tp4_cp4`, 1 point: too few for a law." in text


def test_a_run_is_done_with_exactly_its_settings(study, tmp_path):
    cell = next(iter(study.cells.values()))
    make_up_run(cell, 1.0)
    assert is_done(cell) and not (CellRun(cell).run.checkpoints).exists()
    changed = load_scaling_study(tmp_path, settings=study.spec.settings | {"optim.lr": 1e-3})
    assert not is_done(next(iter(changed.cells.values())))
    (cell.folder / "exit_code").write_text("3\n")
    assert not is_done(cell)


@pytest.mark.parametrize(
    ("log", "code", "reason"),
    [
        (
            "0: loading\n0: megatron-cpgd train: a wrong thing\n0:   in two lines\n",
            3,
            "exit code 3: megatron-cpgd train: a wrong thing in two lines",
        ),
        (
            "3: torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\nsrun: error: task 3: 1\n",
            1,
            "exit code 1: torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB srun: error: "
            "task 3: 1",
        ),
        ("Traceback\n  x\nKeyError: 'a'\n", 1, "exit code 1: KeyError: 'a'"),
        ("working\n", 124, "took longer than `hours`: working"),
        ("working\n", None, "did not end: working"),
        ("", 9, "exit code 9: it has said nothing"),
    ],
)
def test_a_failed_run_says_why(study, log, code, reason):
    cell = next(iter(study.cells.values()))
    run = CellRun(cell)
    run.prepare()
    run.log.write_text(log)
    if code is not None:
        run.end(code)
    assert run.failure() == reason
    row = collect(study).rows[cell.key]
    assert (row.state, row.reason) == ("failed", reason)


def test_without_any_run_there_is_no_report(study):
    with pytest.raises(UserError, match=r"no cell of .* has run"):
        collect(study)


def test_a_run_that_fails_is_recorded_and_the_others_go_on(study, tmp_path):
    (tmp_path / "train.jsonl").unlink()
    shown: list[str] = []
    cells = list(study.cells.values())[:2]
    assert run_cells(cells, hours=1, show=shown.append) == 2
    for number, (cell, line) in enumerate(zip(cells, shown, strict=True), start=1):
        assert line.startswith(
            f"[{number}/2] {cell.name}: FAILED, exit code 2: megatron-cpgd train"
        )
    assert CellRun(cells[0]).exit_code == 2 and "train.jsonl" in CellRun(cells[0]).failure()


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools/scaling_study.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_submitting_shows_an_array_for_each_number_of_nodes(tool, tmp_path, capsys, monkeypatch):
    file = write_scaling_study(tmp_path, layouts=[{"tp": 4}, {"tp": 8}, {"tp": 3}])
    out = tmp_path / "out"
    arguments = ["submit", str(file), "--out", str(out), "--sbatch=--partition=p"]
    assert tool([*arguments, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "9 cells, 6 to run; one array for each number of nodes"
    submitted = [line for line in lines if line.startswith("sbatch")]
    assert len(submitted) == 4
    script = f"{ROOT}/slurm/scaling_study.sh"
    assert submitted[1] == (
        f"sbatch --parsable --nodes=2 --array=1-2 --time=71 "
        f"--output={out}/slurm/nodes_2-%A_%a.log --gpus-per-node=8 --partition=p {script} cell "
        f"{out}/slurm/nodes_2.txt"
    )
    assert submitted[3].startswith("sbatch --parsable --nodes=1 --time=21 ")
    assert "--dependency=afterany:JOB1:JOB2:JOB3 " in submitted[3]
    assert submitted[3].endswith(f"{script} report {file} --out {out}")
    assert not out.exists()
    monkeypatch.setenv("PATH", "/nowhere")
    assert tool(arguments) == 2
    assert "there is no sbatch here" in capsys.readouterr().err


def test_a_simulation_does_not_replace_the_report_of_runs(tool, tmp_path, capsys):
    file, out = write_scaling_study(tmp_path), tmp_path / "out"
    make_up_run(next(iter(load_scaling_study(tmp_path).cells.values())), 1.0)
    assert tool(["simulate", str(file), "--out", str(out)]) == 2
    assert f"{out} holds runs" in capsys.readouterr().err
    assert tool(["report", str(file), "--out", str(out)]) == 0
    assert (out / "report.md").exists()


def test_a_wrong_file_is_one_message_and_exit_code_2(tool, tmp_path, capsys):
    file = tmp_path / "no.yaml"
    assert tool(["simulate", str(file), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"scaling_study: {file}: no such file\n"
    assert not (tmp_path / "out").exists()
