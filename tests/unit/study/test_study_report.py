"""The report is a function of the study file and the tables."""

from pathlib import Path

import pytest

from megatron_cpgd.study.report import write_report
from megatron_cpgd.study.runs import plan_runs
from megatron_cpgd.study.spec import load_study
from megatron_cpgd.study.tables import collect_tables
from tests.helpers.full_run import ROOT
from tests.helpers.study import make_up_run

QUESTIONS = {
    "which": {
        "title": "Which one?",
        "text": "The words of the author.",
        "arms": ["cpgd", "grpo"],
        "figures": ["curves", "outcome", "dynamics"],
    },
    "alpha": {
        "title": "How much drift?",
        "arms": ["cpgd", "alpha"],
        "figures": ["sensitivity"],
        "x": "algorithm.drift.coef",
    },
}
GRIDS = {"alpha": {"vary": {"algorithm.drift.coef": [0.1]}}}


@pytest.fixture
def study(make_study, tmp_path):
    """cpgd rises, grpo collapses with seed 0 and falls behind with seed 1, alpha=0.1 is missing."""
    path = make_study(questions=QUESTIONS, grids=GRIDS, findings="What was found.")
    study = load_study(path, to_run=True)
    courses = {
        ("cpgd", 0): [0.4, 0.8, 0.8],
        ("cpgd", 1): [0.4, 0.8, 0.8],
        ("grpo", 0): [0.4, 0.1, 0.0],
        ("grpo", 1): [0.4, 0.6, 0.6],
    }
    runs = plan_runs(study, tmp_path / "out")
    for run in runs:
        if course := courses.get((run.arm.name, run.seed)):
            make_up_run(run, course)
    collect_tables(study, runs, tmp_path / "docs" / study.page)
    return study


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_report_states_the_numbers(study, tmp_path):
    text = write_report(study, tmp_path / "docs").read_text()
    # Final held-out: half of the last accuracy. Differences -0.4 and -0.1: mean -0.25, half width
    # 12.7062 * 0.2121 / sqrt(2) = 1.906.
    assert (
        "| grpo | `algorithm.preset=grpo` | 1/2 [0.09, 0.91] | 0.15 [-1.76, 2.06] "
        "| 0.28 [-0.04, 0.59] | -0.25 [-2.16, +1.66] | 0.44 | 0.5 |" in text
    )
    assert "No run collapsed of cpgd." in text
    assert "The interval of the difference from cpgd contains 0 for grpo." in text
    for words in ("The words of the author.", "What was found.", "| alpha=0.1 |", "no runs"):
        assert words in text
    assert "- alpha=0.1, seed 1" in text.split("## Runs that are missing")[1]


def test_the_report_is_the_same_bit_by_bit_every_time(study, tmp_path):
    write_report(study, tmp_path / "docs")
    first = contents(tmp_path / "docs")
    assert {name for name in first if name.endswith(".png")} == {
        "study/which_curves.png",
        "study/which_outcome.png",
        "study/which_dynamics.png",
        "study/alpha_sensitivity.png",
    }
    write_report(study, tmp_path / "docs")
    assert contents(tmp_path / "docs") == first


@pytest.mark.parametrize("page", ["stability_study", "moe_study"])
def test_the_committed_report_comes_from_the_committed_tables(page, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(Path(f"configs/{page}.yaml"), to_run=False)
    committed, folder = Path("docs") / page, tmp_path / page
    folder.mkdir()
    for path in committed.glob("*.*"):
        if path.suffix in (".csv", ".json"):
            (folder / path.name).write_bytes(path.read_bytes())
    text = write_report(study, tmp_path).read_text()
    assert text == Path(f"docs/{page}.md").read_text()
    assert {path.name for path in folder.iterdir()} == {path.name for path in committed.iterdir()}
