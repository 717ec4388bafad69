"""The file of a scaling study: which layouts run on how many nodes, with which batches."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from megatron_cpgd.config.base import Config
from megatron_cpgd.study.spec_file import Settings, read_spec, refusal

type Kind = Literal["strong", "weak"]
"""`strong`: the batch stays the same; `weak`: it grows with the nodes."""

OWN_SETTINGS = (
    "run.dir", "run.steps", "parallel", "rollout.prompts_per_step", "rollout.nodes",
)  # fmt: skip
"""Sections and settings that every cell has of its own."""


class LayoutSpec(Config):
    """A layout of the trainer. `dp` follows from the nodes."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")
    """Default: the sizes above 1, such as `tp4_pp2`; `search`, if it is searched for."""
    search: bool = False
    """Take the layout that `megatron-cpgd plan` predicts to be the fastest for each number of GPUs.
    Then no size is given, but `pp` with `stage_layers` for a model whose layers it does not
    divide."""
    tp: int = Field(1, ge=1)
    """As `parallel.tp`, and so the others."""
    pp: int = Field(1, ge=1)
    vpp: int = Field(1, ge=1)
    cp: int = Field(1, ge=1)
    ep: int = Field(1, ge=1)
    etp: int = Field(1, ge=1)
    stage_layers: list[int] | None = None
    engine_nodes: float = Field(0, ge=0, lt=1)
    """Share of the nodes that hold engines only, rounded down, but at least one: `rollout.nodes`.
    Their GPUs are filled with engines. 0: the engines are where the settings put them."""

    @property
    def label(self) -> str:
        """Its name."""
        sizes = {axis: getattr(self, axis) for axis in ("tp", "pp", "vpp", "cp", "ep", "etp")}
        axes = "_".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "dp"
        return self.name or ("search" if self.search else axes)


class ModelSpec(Config):
    """A configuration that is scaled."""

    base: Path
    """YAML file of a run."""
    settings: Settings = Field(default_factory=dict)
    """What changes in it, on top of the settings of the study."""
    hf_config: Path | None = None
    """Folder with the model's config.json, for a model that is not on this machine: it can be
    simulated only."""
    layouts: list[LayoutSpec] | None = None
    """Instead of those of the study."""


class BatchSpec(Config):
    """Values of `rollout.prompts_per_step`."""

    strong: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """On every number of nodes."""
    weak: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """On the fewest nodes; more nodes have as many for each node."""

    def items(self) -> Iterator[tuple[Kind, int]]:
        """All of them."""
        yield from (("strong", batch) for batch in self.strong)
        yield from (("weak", batch) for batch in self.weak)


class ScalingSpec(Config):
    """A scaling study as it is written."""

    name: str
    """Tells studies apart: an output folder holds one."""
    title: str
    """Heading of the report."""
    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")], ModelSpec] = (
        Field(min_length=1)
    )
    """Name -> configuration."""
    settings: Settings = Field(default_factory=dict)
    """What all of them change."""
    machine: str
    """What the predictions are made for: h100, cpu, ..., or a file of `plan --calibrate`."""
    gpus_per_node: int | None = Field(None, ge=1)
    """Ranks of a node; default: the GPUs of the machine."""
    nodes: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    """Numbers of nodes, engine nodes included, ascending."""
    layouts: list[LayoutSpec] = Field(default=[LayoutSpec(search=True)], min_length=1)
    """`search` alone stands for one layout that is searched for."""
    batch: BatchSpec
    """Prompts of a step: the same on every number of nodes (strong scaling), growing with them
    (weak scaling), or both."""
    steps: int = Field(8, ge=2)
    """Of each run."""
    warmup_steps: int = Field(2, ge=1)
    """The first steps, which are not counted."""
    response_tokens: float | None = Field(None, gt=0)
    """Assumed mean length of a response where nothing is measured; default: half of the longest."""
    hours: float = Field(1.0, gt=0)
    """Longest time of a run; its Slurm job has 11 minutes more, for the notice to stop."""
    findings: str = ""
    """Written by hand after the study, in the report word by word."""

    @field_validator("layouts", mode="before")
    @classmethod
    def _only_search(cls, given: object) -> object:
        return [{"search": True}] if given == "search" else given


def load_spec(path: Path) -> ScalingSpec:
    """Read the file of a study and check what can be seen in it alone.

    Raises:
        ConfigError: lists every mistake.
    """
    spec = read_spec(path, ScalingSpec)
    if problems := list(_problems(spec)):
        raise refusal(path, problems)
    return spec


def _problems(spec: ScalingSpec) -> Iterator[str]:
    lists = {"nodes": spec.nodes, "batch.strong": spec.batch.strong, "batch.weak": spec.batch.weak}
    for name, values in lists.items():
        if sorted(set(values)) != values:
            yield f"{name}: must ascend without repetition, got {values}"
    if not list(spec.batch.items()):
        yield "batch: has neither `strong` nor `weak`; give at least one number of prompts"
    if spec.warmup_steps >= spec.steps:
        yield f"warmup_steps={spec.warmup_steps}: must leave some of steps={spec.steps}"
    if spec.batch.weak and (odd := [n for n in spec.nodes if n % spec.nodes[0]]):
        yield f"nodes: weak scaling needs multiples of the first, {spec.nodes[0]}; got {odd}"
    yield from _layout_problems("layouts", spec.layouts)
    for name, model in spec.models.items():
        yield from _layout_problems(f"models.{name}.layouts", model.layouts or ())
        yield from (
            f"{where}.{key}: is set for each cell by the study; remove it"
            for where, settings in (("settings", spec.settings), (f"models.{name}", model.settings))
            for key in settings
            if key in OWN_SETTINGS or key.split(".")[0] in OWN_SETTINGS
        )


def _layout_problems(where: str, layouts: Sequence[LayoutSpec]) -> Iterator[str]:
    labels = [layout.label for layout in layouts]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        yield f"{where}: two layouts are called {', '.join(twice)}; give them a `name`"
    for layout in layouts:
        sizes = [getattr(layout, axis) for axis in ("tp", "vpp", "cp", "ep", "etp")]
        if layout.search and (any(size > 1 for size in sizes) or _fixes_half(layout)):
            yield f"{where}.{layout.label}: is searched for; give no sizes but `pp` with its layers"


def _fixes_half(layout: LayoutSpec) -> bool:
    return (layout.pp > 1) != (layout.stage_layers is not None)
