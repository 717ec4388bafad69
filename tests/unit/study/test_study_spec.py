"""The study file: arms, grids, questions, and one message for every mistake."""

import pytest

from megatron_cpgd.errors import ConfigError
from megatron_cpgd.study.spec import format_settings, load_study

ALPHA = {"vary": {"algorithm.drift.coef": [0.1, 1]}}
EPSILON = {
    "settings": {"algorithm.preset": "ppo_clip"},
    "vary": {"algorithm.clip": {"tight": {"low": 0.05, "high": 0.05}}, "optim.lr": [1e-4, 2e-4]},
}


def problems(path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_study(path, to_run=True)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_an_arm_is_the_base_the_common_settings_and_its_own(make_study):
    study = load_study(make_study(), to_run=True)
    assert study.arms["cpgd"].config.algorithm.policy.type == "log_ratio"
    assert study.arms["grpo"].config.algorithm.policy.type == "ratio"
    assert study.eval_set == "held"


def test_a_grid_is_an_arm_for_each_combination_and_a_question_may_name_it(make_study):
    questions = {"q": {"title": "?", "arms": ["cpgd", "alpha", "eps=tight,0.0002"]}}
    path = make_study(grids={"alpha": ALPHA, "eps": EPSILON}, questions=questions)
    study = load_study(path, to_run=True)
    assert list(study.arms) == [
        "cpgd", "grpo", "alpha=0.1", "alpha=1", "eps=tight,0.0001", "eps=tight,0.0002",
    ]  # fmt: skip
    [question] = study.questions
    names = [arm.name for arm in question.arms]
    assert names == ["cpgd", "alpha=0.1", "alpha=1", "eps=tight,0.0002"]
    last = question.arms[-1].config
    assert (last.algorithm.preset, last.algorithm.clip.high, last.optim.lr) == (
        "ppo_clip", 0.05, 2e-4,
    )  # fmt: skip


def test_settings_are_shown_as_the_command_line_takes_them():
    settings = {"optim.lr": 1e-4, "algorithm.clip": {"type": "none"}, "rollout.x": None}
    assert format_settings(settings) == "optim.lr=0.0001 algorithm.clip={type: none} rollout.x=null"


def test_every_mistake_of_the_file_is_one_line(make_study):
    path = make_study(
        arms={"cpgd": {"run.seed": 3}, "a/b": {}},
        reference="cpdg",
        seeds=[1, 1],
        questions={"q": {"title": "?", "arms": ["grpo"]}},
        grids={"cpgd": ALPHA},
    )
    lines = problems(path)
    assert len(lines) == 6
    for piece in (
        "grids.cpgd: there is an arm of this name",
        "run.seed is set for each run",
        "arm 'a/b'",
        "[1, 1] names one twice",
        "did you mean 'cpgd'?",
        "no arm or grid 'grpo'",
    ):
        assert any(piece in line for line in lines), piece


def test_an_unknown_section_is_named(make_study):
    [line] = problems(make_study(sedes=[1]))
    assert line.startswith("sedes: ")


def test_a_wrong_setting_is_said_once_for_all_arms_that_have_it(make_study):
    lines = problems(make_study(settings={"optim.lrr": 1}))
    assert lines[0].startswith("cpgd, grpo: ")
    assert "did you mean 'lr'?" in lines[1]


def test_two_arms_that_are_the_same_run_are_refused(make_study):
    lines = problems(make_study(grids={"alpha": {"vary": {"algorithm.drift.coef": [0.01]}}}))
    assert "cpgd, alpha=0.01 are the same run" in lines[0]


def test_runs_of_several_ranks_are_refused(make_study):
    path = make_study()
    path.write_text(path.read_text().replace("eval.sets.held", "parallel.tp: 2\n  eval.sets.held"))
    assert "parallel.* makes 2 ranks" in problems(path)[0]


def test_a_sensitivity_needs_a_number_on_its_axis(make_study):
    def question(**more):
        return {"q": {"title": "?", "arms": ["cpgd"], **more}}

    [line] = problems(make_study(questions=question(figures=["sensitivity"])))
    assert "give both or none" in line
    [line] = problems(make_study(questions=question(figures=["sensitivity"], x="algorithm.preset")))
    assert "is no number in arm cpgd: 'cpgd'" in line


def test_only_a_run_needs_the_model_and_the_data(make_study, tmp_path):
    path = make_study()
    (tmp_path / "train.jsonl").unlink()
    assert problems(path)
    assert load_study(path, to_run=False).arms
