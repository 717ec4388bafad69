"""The study tool on the real stack: two runs in one worker, tables and report."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_cpgd.study.tables import read_tables
from tests.helpers.full_run import ROOT, settings, write_yaml

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study_file(assets: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    base = settings(assets)
    base["parallel"]["tp"] = 1
    base["run"] |= {"dir": "unused", "steps": 2}
    study = {
        "prepare": "make things",
        "name": "tiny",
        "title": "A tiny study",
        "base": str(write_yaml(folder / "base.yaml", base)),
        "seeds": [3],
        "reference": "cpgd",
        "arms": {"cpgd": {}, "stale": {"algorithm.preset": "grpo", "rollout.staleness": 1}},
        "questions": {"q": {"title": "Which?", "arms": ["cpgd", "stale"]}},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder / "study.yaml"


def tool(study_file: Path, command: str, *more: str) -> str:
    out = study_file.parent / "out"
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tools/stability_study.py",
            command,
            study_file,
            "--out",
            out,
            *more,
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_study_runs_once_and_is_reported(study_file):
    lines = tool(study_file, "run", "--workers", "1").splitlines()
    assert lines[0] == "2 runs, 0 of them done" and lines[-1].startswith("[2/2] stale, seed 3")
    assert tool(study_file, "run") == "2 runs, 2 of them done\n"
    assert "2 of 2 runs done" in tool(study_file, "status")
    docs = study_file.parent / "docs"
    tool(study_file, "report", "--docs", str(docs))
    tables = read_tables(docs / "study")
    assert [(row.arm, row.steps, row.outcome) for row in tables.runs] == [
        ("cpgd", 2, "finished"), ("stale", 2, "finished"),
    ]  # fmt: skip
    assert tables.curves["cpgd", 3]["logprob_diff"][1] < 1e-4
    run = study_file.parent / "out" / "runs" / "cpgd" / "seed_3"
    assert not (run / "checkpoints").exists() and not (run / "hf").exists()
    assert "# A tiny study" in (docs / "study.md").read_text()
