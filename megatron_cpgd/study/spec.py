"""The study file: which arms run over which seeds, and which of them answer which question."""

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_cpgd.config.base import Config
from megatron_cpgd.config.load import load_config, read_config
from megatron_cpgd.config.messages import did_you_mean
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.study.spec_file import Settings, as_overrides, read_spec, refusal

FigureName = Literal["curves", "outcome", "dynamics", "sensitivity"]
MAX_CURVES = 10
"""In one panel; an eye cannot follow more."""
_ARM_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]*")


class GridSpec(Config):
    """Arms that differ in some settings: one for each combination of their values."""

    settings: Settings = Field(default_factory=dict)
    """What all of them have in common."""
    vary: dict[str, list[Any] | dict[str, Any]] = Field(min_length=1)
    """Dotted setting -> values, or a mapping of labels to values. The arms are called
    GRID=LABEL,LABEL."""


class CollapseSpec(Config):
    """When a run counts as collapsed; `tables.py` has the definition."""

    window: int = Field(5, ge=1)
    """Steps of the moving mean of the training accuracy."""
    share: float = Field(0.5, gt=0, lt=1)
    """Collapsed: the last window is below this share of the best."""


class QuestionSpec(Config):
    """A comparison of some arms."""

    title: str
    """Its heading in the report."""
    text: str = ""
    """What is compared, in the report word by word."""
    arms: list[str] = Field(min_length=1)
    """Arms and grids; a grid stands for all its arms."""
    reference: str | None = None
    """Arm that the others are compared with, seed by seed; default: that of the study."""
    figures: tuple[FigureName, ...] = ("curves", "outcome")
    """`curves`: accuracy over the steps, one panel per arm; `outcome`: collapse rate, final
    accuracy and its difference from the reference; `dynamics`: gradient norm, KL, entropy and
    length over the steps; `sensitivity`: outcome over `x`."""
    x: str | None = None
    """Dotted numeric setting on the x axis of `sensitivity`; one curve for each preset."""


class StudySpec(Config):
    """The study file as it is written."""

    name: str
    """Tells studies apart: an output folder holds one."""
    title: str
    """Heading of the report."""
    base: Path
    """Configuration that everything lies on."""
    prepare: str
    """Command that makes the model and the data of `base`, for the report."""
    settings: Settings = Field(default_factory=dict)
    """What all arms change in it."""
    seeds: list[int] = Field(min_length=1)
    """`run.seed` of the runs of every arm: runs with the same seed see the same prompts."""
    reference: str
    """Arm that the others are compared with, seed by seed, where a question names no other."""
    collapse: CollapseSpec = CollapseSpec()
    """When a run counts as collapsed."""
    arms: dict[str, Settings] = Field(min_length=1)
    """Name -> settings on top of the common ones."""
    grids: dict[str, GridSpec] = Field(default_factory=dict)
    """Name -> several arms."""
    questions: dict[str, QuestionSpec] = Field(min_length=1)
    """Short name -> comparison."""
    chosen: str = ""
    """How the setting was found, in the report word by word."""
    findings: str = ""
    """Written by hand after the study, in the report word by word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One configuration that runs with every seed."""

    name: str
    settings: Settings
    """On top of the study's."""
    config: ExperimentConfig
    """With the study's first seed; `run.dir` has no meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A comparison with its arms looked up."""

    name: str
    spec: QuestionSpec
    arms: list[Arm]
    reference: str
    """Name of the arm that the others are compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A study file, expanded and checked."""

    path: Path
    spec: StudySpec
    arms: dict[str, Arm]
    questions: list[Question]

    @property
    def page(self) -> str:
        """Name of the report and of the folder with its tables and plots: that of the file."""
        return self.path.stem

    @property
    def eval_set(self) -> str:
        """The held-out set."""
        [name] = self.arms[self.spec.reference].config.eval.sets
        return name


def load_study(path: Path, *, to_run: bool) -> Study:
    """Read a study file and check every configuration in it.

    Args:
        to_run: the model and the data must be there too.

    Raises:
        ConfigError: lists every mistake.
    """
    spec = read_spec(path, StudySpec)
    settings, groups, problems = _expand(spec)
    problems += _check_names(spec, settings, groups)
    if problems:
        raise refusal(path, problems)
    arms = _load_arms(path, spec, settings, to_run)
    questions = [
        Question(
            name=name,
            spec=question,
            arms=[arms[arm] for member in question.arms for arm in groups[member]],
            reference=question.reference or spec.reference,
        )
        for name, question in spec.questions.items()
    ]
    study = Study(path=path, spec=spec, arms=arms, questions=questions)
    if problems := [*_check_arms(arms), *_check_figures(questions)]:
        raise refusal(path, problems)
    return study


def find_setting(config: ExperimentConfig, name: str) -> Any:
    """The value of a dotted setting; None if the configuration has none of this name."""
    value: Any = config.model_dump(mode="json")
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def format_settings(settings: Settings) -> str:
    """`a.b=1 c={type: x}` as a user gives it to the command line."""
    return " ".join(f"{name}={_flow(value)}" for name, value in settings.items())


def _flow(value: Any) -> str:
    return json.dumps(value).replace('"', "") if value is not None else "null"


def _expand(spec: StudySpec) -> tuple[dict[str, Settings], dict[str, list[str]], list[str]]:
    """Settings of every arm, arms of every name that a question may use, and problems."""
    arms = dict(spec.arms)
    groups = {name: [name] for name in spec.arms}
    problems = []
    for grid, grid_spec in spec.grids.items():
        if grid in groups:
            problems.append(f"grids.{grid}: there is an arm of this name")
            continue
        groups[grid] = []
        for label, varied in _combinations(grid_spec.vary):
            name = f"{grid}={label}"
            if name in arms:
                problems.append(f"grids.{grid}: two combinations are called {name!r}; label them")
            arms[name] = grid_spec.settings | varied
            groups[grid].append(name)
            groups[name] = [name]
    return arms, groups, problems


def _combinations(vary: Mapping[str, list[Any] | dict[str, Any]]) -> Iterator[tuple[str, Settings]]:
    axes = [
        [(label, name, value) for label, value in _labelled(values)]
        for name, values in vary.items()
    ]
    for combination in itertools.product(*axes):
        label = ",".join(label for label, _, _ in combination)
        yield label, {name: value for _, name, value in combination}


def _labelled(values: list[Any] | dict[str, Any]) -> list[tuple[str, Any]]:
    if isinstance(values, dict):
        return list(values.items())
    return [(_flow(value), value) for value in values]


def _check_names(
    spec: StudySpec, arms: Mapping[str, Settings], groups: Mapping[str, list[str]]
) -> list[str]:
    problems = []
    for name, settings in arms.items():
        if not _ARM_NAME.fullmatch(name):
            problems.append(
                f"arm {name!r}: names a folder; use letters, digits and _ . , = + - (a grid's "
                "values may be given labels)"
            )
        problems += [
            f"arm {name}: {key} is set for each run by the study; remove it"
            for key in settings | spec.settings
            if key in ("run", "run.dir", "run.seed")
        ]
    if len(set(spec.seeds)) < len(spec.seeds):
        problems.append(f"seeds: {spec.seeds} names one twice")
    references = {"reference": spec.reference} | {
        f"questions.{name}.reference": question.reference
        for name, question in spec.questions.items()
        if question.reference is not None
    }
    for where, name in references.items():
        if name not in arms:
            problems.append(f"{where}={name!r}: no such arm; {did_you_mean(name, arms)}")
    for question, question_spec in spec.questions.items():
        problems += [
            f"questions.{question}.arms: no arm or grid {name!r}; {did_you_mean(name, groups)}"
            for name in question_spec.arms
            if name not in groups
        ]
    return problems


def _load_arms(
    path: Path, spec: StudySpec, arms: Mapping[str, Settings], to_run: bool
) -> dict[str, Arm]:
    loaded: dict[str, Arm] = {}
    refused: dict[str, list[str]] = defaultdict(list)
    for name, settings in arms.items():
        overrides = [*as_overrides(spec.settings), *as_overrides(settings)]
        common = ["run.dir=unused", f"run.seed={spec.seeds[0]}"]
        try:
            load = load_config if to_run else read_config
            config = load(spec.base, [*overrides, *common])
        except ConfigError as error:
            refused[str(error)].append(name)
            continue
        loaded[name] = Arm(name=name, settings=settings, config=config)
    if refused:
        raise refusal(path, [f"{', '.join(names)}: {text}" for text, names in refused.items()])
    return loaded


def _check_arms(arms: Mapping[str, Arm]) -> Iterator[str]:
    twins: dict[str, list[str]] = defaultdict(list)
    for name, arm in arms.items():
        twins[arm.config.model_dump_json()].append(name)
        if len(arm.config.eval.sets) != 1:
            yield f"arm {name}: needs one held-out set, has {len(arm.config.eval.sets)}: eval.sets"
        if arm.config.parallel.world_size != 1:
            yield (
                f"arm {name}: parallel.* makes {arm.config.parallel.world_size} ranks, but each "
                "run of a study has one process; set parallel={tp: 1}"
            )
    for names in twins.values():
        if len(names) > 1:
            yield f"arms {', '.join(names)} are the same run; keep one and name it in each question"


def _check_figures(questions: list[Question]) -> Iterator[str]:
    for question in questions:
        x, where = question.spec.x, f"questions.{question.name}.x"
        if "dynamics" in question.spec.figures and len(question.arms) > MAX_CURVES:
            yield (
                f"questions.{question.name}: `dynamics` draws at most {MAX_CURVES} arms in a "
                f"panel, got {len(question.arms)}; ask a question of its own with fewer"
            )
        if (x is None) == ("sensitivity" in question.spec.figures):
            yield f"{where}: belongs to the figure `sensitivity`; give both or none"
        elif x is not None:
            for arm in question.arms:
                value = find_setting(arm.config, x)
                if isinstance(value, bool) or not isinstance(value, int | float):
                    yield f"{where}={x}: is no number in arm {arm.name}: {value!r}"
