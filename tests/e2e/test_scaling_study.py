"""The scaling tool on the real stack: one and two ranks on this machine, and the report."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.full_run import ROOT, settings, write_yaml

pytestmark = pytest.mark.slow


def test_a_study_runs_once_and_is_reported(assets, tmp_path: Path) -> None:
    base = settings(assets) | {"run": {"dir": "unused", "steps": 1}, "parallel": {}}
    study = {
        "name": "tiny",
        "title": "A tiny study",
        "models": {"tiny": {"base": str(write_yaml(tmp_path / "base.yaml", base))}},
        "machine": "cpu",
        "gpus_per_node": 1,
        "nodes": [1, 2],
        "layouts": [{}],
        "batch": {"strong": [8], "weak": [8]},
        "steps": 3,
        "warmup_steps": 1,
    }
    spec, out = write_yaml(tmp_path / "study.yaml", study), tmp_path / "out"

    def run() -> list[str]:
        done = subprocess.run(
            [sys.executable, ROOT / "tools/scaling_study.py", "run", spec, "--out", out],
            cwd=ROOT, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    assert run()[0] == "3 cells: 0 done, 0 that cannot run, 3 to run"
    with (out / "table.csv").open() as file:
        rows = {(row["gpus"], row["prompts"]): row for row in csv.DictReader(file)}
    assert set(rows) == {("1", "8"), ("2", "8"), ("2", "16")}
    assert {(row["state"], row["steps"]) for row in rows.values()} == {("done", "2")}
    tokens = {key: float(row["response_tokens"]) for key, row in rows.items()}
    assert tokens["2", "16"] > 1.5 * tokens["2", "8"]
    assert "**Measured** on " in (out / "report.md").read_text()
    assert not list(out.glob("cells/tiny/*/run/checkpoints"))
    assert run()[0] == "3 cells: 3 done, 0 that cannot run, 0 to run"
