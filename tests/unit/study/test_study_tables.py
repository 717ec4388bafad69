"""What counts as a collapse, and tables that read back as they were written."""

import pytest

from megatron_cpgd.errors import DataError
from megatron_cpgd.study.runs import plan_runs
from megatron_cpgd.study.spec import CollapseSpec, load_study
from megatron_cpgd.study.tables import assess, collect_tables, read_tables
from tests.helpers.study import make_up_run

SPEC = CollapseSpec(window=2, share=0.5)


def test_a_run_whose_last_window_is_far_below_its_best_has_collapsed():
    course = assess([0.4, 0.8, 0.8, 0.2, 0.2], SPEC, diverged=False)
    assert course.means == pytest.approx([0.4, 0.6, 0.8, 0.5, 0.2])
    assert course.best == pytest.approx([0.4, 0.6, 0.8, 0.8, 0.8])
    assert course.collapsed and course.collapse_step == 5  # 0.5 at step 4 is above 0.4
    assert course.largest_drop == pytest.approx(0.75)


def test_a_run_that_recovers_has_not_collapsed_but_its_drop_is_known():
    course = assess([0.8, 0.8, 0.0, 0.0, 0.8, 0.8], SPEC, diverged=False)
    assert not course.collapsed and course.collapse_step is None
    assert course.largest_drop == 1


def test_losing_what_the_untrained_policy_could_do_is_a_collapse():
    course = assess([0.4, 0.0, 0.0, 0.0], SPEC, diverged=False)  # no window is above 0.2
    assert course.collapsed and course.collapse_step == 3


def test_only_complete_windows_count_besides_step_1():
    spec = CollapseSpec(window=4)
    assert assess([0.9, 0.0, 0.0, 0.0, 0.0], spec, diverged=False).collapse_step == 4
    course = assess([0.2, 1.0, 0.2, 0.2, 0.2, 0.2], spec, diverged=False)
    assert course.best[-1] == pytest.approx(0.4) and not course.collapsed  # 0.6 at step 2


def test_a_run_that_only_rises_never_drops():
    course = assess([0.2, 0.3, 0.4], SPEC, diverged=False)
    assert not course.collapsed and course.largest_drop == 0


def test_a_diverged_run_has_collapsed_whatever_its_accuracy():
    assert assess([0.4, 0.4], SPEC, diverged=True).collapse_step == 2
    assert assess([], SPEC, diverged=True).collapsed


def test_the_tables_hold_what_the_runs_did(make_study, tmp_path):
    study = load_study(make_study(), to_run=True)
    runs = plan_runs(study, tmp_path / "out")
    make_up_run(runs[0], [0.4, 0.5, 0.6])
    make_up_run(runs[1], [0.4, 0.8, 0.8, 0.0, 0.1], **{"policy/grad_norm": 123456.0})
    collect_tables(study, runs, tmp_path / "tables")
    tables = read_tables(tmp_path / "tables")
    assert [(row.arm, row.seed, row.collapsed) for row in tables.runs] == [
        ("cpgd", 0, False), ("grpo", 0, True),
    ]  # fmt: skip
    row = tables.of("grpo")[0]
    assert (row.preset, row.steps, row.collapse_step) == ("grpo", 5, 5)
    assert (row.accuracy_start, row.accuracy_best, row.accuracy_final) == (0.4, 0.8, 0.05)
    assert (row.heldout_start, row.heldout_best, row.heldout_final) == (0.25, 0.4, 0.05)
    assert row.grad_norm_max == 123500  # four digits
    assert row.settings == "algorithm.preset=grpo"
    assert tables.curves["cpgd", 0]["step"] == [0, 1, 2, 3]
    assert tables.curves["cpgd", 0]["heldout"] == [0.25, 0.2, 0.25, 0.3]
    assert tables.curves["cpgd", 0]["accuracy"][1:] == [0.4, 0.5, 0.6]
    assert tables.versions == {"python": "3.12.1", "torch": "torch 2.11.0"}


def test_without_a_run_there_is_no_table(make_study, tmp_path):
    study = load_study(make_study(), to_run=True)
    with pytest.raises(DataError, match="no run of"):
        collect_tables(study, plan_runs(study, tmp_path / "out"), tmp_path / "tables")
    with pytest.raises(DataError, match=r"runs\.csv: no such file"):
        read_tables(tmp_path / "tables")
