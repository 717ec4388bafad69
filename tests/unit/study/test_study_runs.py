"""Which runs are made, by worker processes that may die."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_cpgd.errors import ConfigError
from megatron_cpgd.study.pool import make_runs
from megatron_cpgd.study.runs import claim_folder, plan_runs
from megatron_cpgd.study.spec import load_study
from megatron_cpgd.tracking.folder_lock import lock_folder
from tests.helpers import study as workers
from tests.helpers.full_run import ROOT

TOOL = ROOT / "tools" / "stability_study.py"


@pytest.fixture
def runs(make_study, tmp_path):
    return plan_runs(load_study(make_study(), to_run=True), tmp_path / "out")


def make(runs, tmp_path, target, *, number=1):
    lines: list[str] = []
    failed = make_runs(
        runs, workers=number, logs=tmp_path / "workers", show=lines.append, target=target
    )
    return failed, lines


def test_seed_comes_before_arm(runs):
    assert [(run.seed, run.arm.name) for run in runs] == [
        (0, "cpgd"), (0, "grpo"), (1, "cpgd"), (1, "grpo"),
    ]  # fmt: skip
    assert runs[3].config.run.seed == 1
    assert runs[3].config.run.dir.parts[-3:] == ("runs", "grpo", "seed_1")


def test_a_run_is_done_only_with_the_configuration_that_is_asked_for(make_study, runs, tmp_path):
    workers.make_up_run(runs[0], [0.5])
    workers.make_up_run(runs[1], [0.5])
    path = make_study(arms={"cpgd": {}, "grpo": {"algorithm.preset": "grpo", "optim.lr": 1e-3}})
    changed = plan_runs(load_study(path, to_run=True), tmp_path / "out")
    assert [run.done() is not None for run in changed] == [True, False, False, False]


def test_a_record_that_was_cut_is_no_record(runs):
    workers.make_up_run(runs[0], [0.5])
    file = runs[0].folder.dir / "done.json"
    file.write_text(file.read_text()[:-20])
    assert runs[0].done() is None


def test_a_finished_run_keeps_no_weights(runs):
    for folder in (runs[0].folder.checkpoint(1), runs[0].folder.hf(1)):
        folder.mkdir(parents=True)
    runs[0].write_done("diverged", reason="nan", seconds=1.0)
    assert [path.name for path in runs[0].folder.dir.iterdir()] == ["done.json"]
    assert runs[0].done()["outcome"] == "diverged"


def test_every_run_is_made_and_workers_go_on(runs, tmp_path):
    failed, lines = make(runs, tmp_path, workers.pretend, number=2)
    assert not failed
    assert len({run.done()["reason"] for run in runs}) <= 2  # process ids
    assert lines[-1].startswith("[4/4] ") and lines[-1].endswith("; 0 s left")


def test_a_dead_worker_is_replaced_and_its_run_tried_again(runs, tmp_path):
    failed, lines = make(runs, tmp_path, workers.die_once)
    assert not failed and all(run.done() for run in runs)
    assert lines[0] == "cpgd, seed 0: its worker ended with exit code 7; trying again"


def test_a_run_that_fails_twice_is_reported_and_the_others_are_made(runs, tmp_path):
    failed, lines = make(runs, tmp_path, workers.break_on_grpo)
    assert failed == dict.fromkeys(("grpo, seed 0", "grpo, seed 1"), "RolloutError: no engine")
    assert [run.done() is not None for run in runs] == [True, False, True, False]
    assert lines[-1].startswith("[4/4] grpo, seed 1: FAILED") and lines[-1].endswith("2 failed")


def test_ctrl_c_leaves_no_worker(make_study, tmp_path):
    study = make_study()
    code = (
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from megatron_cpgd.study.pool import make_runs\n"
        "from megatron_cpgd.study.runs import plan_runs\n"
        "from megatron_cpgd.study.spec import load_study\n"
        "from tests.helpers.study import hang\n"
        "if __name__ == '__main__':\n"
        # A test run in the background has inherited that SIGINT is ignored.
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    out = Path(sys.argv[2])\n"
        "    runs = plan_runs(load_study(Path(sys.argv[1]), to_run=True), out)\n"
        "    make_runs(runs, workers=1, logs=out, show=print, target=hang)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen(
        [sys.executable, script, study, tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    file = tmp_path / "out" / "worker_0" / "pid"
    wait_until(lambda: file.exists() and file.read_text())
    process.send_signal(signal.SIGINT)
    process.wait(20)
    wait_until(lambda: not Path("/proc", file.read_text()).exists())


def test_a_folder_belongs_to_one_study(make_study, tmp_path):
    study = load_study(make_study(), to_run=True)
    claim_folder(tmp_path / "out", study.spec.name, study.path)
    claim_folder(tmp_path / "out", study.spec.name, study.path)
    other = load_study(make_study(name="other"), to_run=True)
    with pytest.raises(ConfigError, match="holds the study 'small'"):
        claim_folder(tmp_path / "out", other.spec.name, other.path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no study"):
        claim_folder(tmp_path / "full", study.spec.name, study.path)


def test_two_tools_do_not_work_in_one_folder(tmp_path):
    with (
        lock_folder(tmp_path),
        pytest.raises(ConfigError, match="another process writes to this folder"),
        lock_folder(tmp_path),
    ):
        pass
    with lock_folder(tmp_path):
        pass


def test_the_tool_says_in_one_message_what_is_wrong(make_study, tmp_path):
    path = make_study(reference="gone")
    done = subprocess.run(
        [sys.executable, TOOL, "status", path, "--out", tmp_path / "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"stability_study: {path}: 1 problem")


def wait_until(condition, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
