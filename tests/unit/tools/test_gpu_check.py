"""tools/gpu_check.py on a machine without a GPU: its refusal, its rehearsal, its failures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpgd.gpu_check import runner
from megatron_cpgd.gpu_check.checks import Check, Setup, append_check, read_checks
from megatron_cpgd.gpu_check.record import make_record
from megatron_cpgd.gpu_check.runner import SECTIONS, SectionResult, run_sections

ROOT = Path(__file__).parents[3]
REHEARSAL = Setup(scale="rehearsal", scratch="")


def gpu_check(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/gpu_check.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def rehearse(*arguments: object, out: Path) -> dict[str, list[Check]]:
    """Checks by section."""
    done = gpu_check("--cpu", "--out", out, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((out / "record.json").read_text())
    assert record["command"].startswith("python tools/gpu_check.py --cpu --out ")
    assert "torch" in record["versions"]
    return {each["name"]: [Check(**c) for c in each["checks"]] for each in record["sections"]}


def test_without_a_gpu_there_is_one_message():
    done = gpu_check()
    assert done.returncode == 2
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "torch sees no GPU on this machine" in done.stderr and "--cpu" in done.stderr


def test_sections_can_be_rehearsed_on_the_cpu(tmp_path):
    checks = rehearse("--only", "quantiser", "weights", out=tmp_path)
    assert {check.status for each in checks.values() for check in each} == {"PASS"}
    assert [len(each) for each in checks.values()] == [3, 2]
    assert all(check.figures["sum, quantise and write GB/s"] > 0 for check in checks["weights"])


@pytest.mark.slow
def test_all_sections_can_be_rehearsed_on_the_cpu(tmp_path):
    checks = rehearse(out=tmp_path)
    assert list(checks) == list(SECTIONS)
    statuses = {name: {check.status for check in each} for name, each in checks.items()}
    assert statuses.pop("suite") == {"SKIP"}, "its tests need a GPU"
    assert statuses.pop("training") == {"PASS", "SKIP"}, "and so do the FP8 recipes"
    assert all(status == {"PASS"} for status in statuses.values()), statuses


def test_a_section_that_crashes_or_hangs_is_a_failure_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "SECTIONS", SECTIONS | {"nowhere": ("", 60), "engine": ("", 3)})
    names, lines = ["nowhere", "engine", "environment"], []
    results = run_sections(names, REHEARSAL, tmp_path, root=ROOT, show=lines.append)
    crashed, hung, after = (result.checks for result in results)
    assert crashed[0].status == "FAIL" and "ModuleNotFoundError" in crashed[0].reason
    assert hung[0].status == "FAIL" and hung[0].reason.startswith("no end within 3 s")
    assert "most recent call first" in (tmp_path / "engine.log").read_text()
    assert {check.name for check in after} >= {"python", "packages", "gpus"}
    assert any(line.startswith("  FAIL nowhere") for line in lines)


def test_what_was_reported_before_a_crash_is_kept(tmp_path):
    first = Check(name="a", status="PASS", figures={"GB/s": 1.5})
    append_check(tmp_path / "results", first)
    with (tmp_path / "results").open("a") as file:
        file.write('{"name": "b", "sta')
    assert read_checks(tmp_path / "results") == [first]


def test_a_quick_run_ends_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "QUICK_S", 0.0)
    setup = Setup(scale="quick", scratch="")
    [result] = run_sections(["suite"], setup, tmp_path, root=ROOT, show=str)
    assert result.checks[0].status == "SKIP" and "--only suite" in result.checks[0].reason


def test_the_record_has_a_row_for_each_check(tmp_path):
    checks = [
        Check(name="a|b", status="PASS", figures={"GB/s": 1234.5678, "found": "x"}),
        Check(name="c", status="SKIP", reason="needs two GPUs"),
    ]
    section = SectionResult(name="weights", title="Title", seconds=2.4, checks=checks)
    text = make_record([section], "python tools/gpu_check.py", root=tmp_path).as_markdown()
    assert "1 PASS, 0 FAIL, 1 SKIP" in text.splitlines()[0]
    assert "## Title (weights, 2 s)" in text
    assert "| a\\|b | PASS | GB/s 1.23e+03, found x |  |" in text
    assert "| c | SKIP |  | needs two GPUs |" in text
