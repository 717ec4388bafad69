"""The cells of a scaling study: a layout on a number of nodes, as configuration and as plan."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from megatron_cpgd.config.checks import check_settings
from megatron_cpgd.config.load import load_config
from megatron_cpgd.config.model_folder import check_sizes
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.planning.machine import Machine, find_machine
from megatron_cpgd.planning.model import read_model
from megatron_cpgd.planning.plan import Plan
from megatron_cpgd.planning.search import (
    Overrides,
    Planner,
    find_nearest,
    search_layouts,
    with_overrides,
)
from megatron_cpgd.planning.workload import assumed_lengths
from megatron_cpgd.study.scaling.spec import Kind, LayoutSpec, ScalingSpec, load_spec
from megatron_cpgd.study.spec_file import as_overrides
from megatron_cpgd.weights.hf_checkpoint import read_config

ENGINE_SIZE = "rollout.engine_args.tensor_parallel_size"


class ImpossibleError(Exception):
    """This layout cannot run on so many nodes; the message says why."""

    state = "impossible"
    """Of the cell's row."""


class NothingFitsError(ImpossibleError):
    """By plan, no layout fits."""

    state = "does not fit"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the study."""

    model: str
    layout: LayoutSpec
    nodes: int
    gpus: int
    """Of all nodes."""
    prompts: int
    """Of a step."""
    planner: Planner
    """Of the model."""
    folder: Path
    """Everything of a real run."""

    @property
    def key(self) -> tuple[str, str, int, int]:
        """Tells cells apart."""
        return self.model, self.layout.label, self.nodes, self.prompts

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.model}, {self.layout.label}, {self.prompts} prompts, nodes: {self.nodes}"

    @property
    def engine_nodes(self) -> int:
        """Nodes with engines only; at least one, if there is a share of them."""
        share = self.layout.engine_nodes
        return max(int(share * self.nodes), 1) if share else 0

    @property
    def trainer_gpus(self) -> int:
        """Ranks of the trainer."""
        return self.gpus // self.nodes * (self.nodes - self.engine_nodes)

    @cached_property
    def config(self) -> ExperimentConfig:
        """Of the run.

        Raises:
            ImpossibleError: there is none.
        """
        return with_overrides(self.planner.config, self._overrides())

    @cached_property
    def plan(self) -> Plan:
        """The prediction for the configuration, with the lengths that are assumed.

        Raises:
            ImpossibleError: the settings contradict each other or do not divide the model.
        """
        config = self.config
        problems = [
            *check_settings(config),
            *check_sizes(self.planner.hf, config.model.path, config),
        ]
        if problems:
            raise ImpossibleError("; ".join(problems))
        plan = replace(self.planner, config=config, nodes=self.nodes).plan({})
        assert plan is not None, "the configuration was checked"
        return plan

    def _overrides(self) -> Overrides:
        layout = self.layout
        if not self.trainer_gpus:
            raise ImpossibleError("engine_nodes: no node is left to the trainer")
        common: Overrides = {
            "run.dir": self.folder / "run",
            "rollout.prompts_per_step": self.prompts,
            "rollout.nodes": self.engine_nodes,
            "parallel.stage_layers": layout.stage_layers,
        }
        if layout.search:
            return self._searched(common | {"parallel.pp": layout.pp})
        axes = ("tp", "pp", "vpp", "cp", "ep", "etp")
        sizes = {f"parallel.{axis}": getattr(layout, axis) for axis in axes}
        ranks = layout.tp * layout.pp * layout.cp
        if self.trainer_gpus % ranks:
            raise ImpossibleError(
                f"{self.trainer_gpus} GPUs of the trainer are no multiple of tp * pp * cp = {ranks}"
            )
        return common | sizes | {"parallel.dp": self.trainer_gpus // ranks} | self._engines()

    def _engines(self, size: int | None = None) -> Overrides:
        """As many engines as the engine nodes have room for."""
        if not self.engine_nodes:
            return {}
        given = self.planner.config.rollout.engine_args.get("tensor_parallel_size")
        gpus, taken = self.gpus // self.nodes, size or int(given or 1)
        if taken > gpus:
            raise ImpossibleError(f"{ENGINE_SIZE}={taken} is more than the {gpus} GPUs of a node")
        resized = {ENGINE_SIZE: size} if size else {}
        return resized | {"rollout.engines": self.engine_nodes * (gpus // taken)}

    def _searched(self, common: Overrides) -> Overrides:
        """Engines on nodes of their own first, since no layout of the trainer changes them."""
        engines = self._best_engines(common)
        config = with_overrides(self.planner.config, common | engines)
        found = search_layouts(
            replace(self.planner, config=config, nodes=self.nodes), self.trainer_gpus
        )
        if not found:
            raise NothingFitsError(self._why_nothing_fits(config))
        return common | found[0].overrides | engines

    def _why_nothing_fits(self, config: ExperimentConfig) -> str:
        planner = replace(self.planner, config=config, nodes=self.nodes)
        nearest = find_nearest(planner, self.trainer_gpus)
        problems = nearest.problems if nearest else ("none divides the model",)
        return f"no layout of the trainer's {self.trainer_gpus} GPUs fits: {'; '.join(problems)}"

    def _best_engines(self, common: Overrides) -> Overrides:
        """The engines whose prediction samples fastest."""
        if not self.engine_nodes:
            return {}
        gpus = self.gpus // self.nodes
        found: list[tuple[float, Overrides]] = []
        for size in (n for n in (1, 2, 4, 8, 16) if n <= gpus):
            engines = self._engines(size)
            plan = replace(self.planner, nodes=self.nodes).plan(common | engines)
            requests = plan and plan.workload.requests
            if plan and requests and plan.engine.cache_tokens >= requests.longest:
                found.append((plan.generation.total, engines))
        return min(found, key=lambda each: each[0])[1] if found else self._engines(gpus)


@dataclass(frozen=True, kw_only=True)
class Series:
    """Cells of one layout with a growing number of nodes."""

    kind: Kind
    model: str
    layout: str
    batch: int
    """Prompts of a step; of weak scaling, of the first cell."""
    keys: tuple[tuple[str, str, int, int], ...]
    """Of its cells."""


@dataclass(frozen=True, kw_only=True)
class ScalingStudy:
    """A study file with its cells."""

    path: Path
    spec: ScalingSpec
    machine: Machine
    cells: dict[tuple[str, str, int, int], Cell]
    series: list[Series]

    @property
    def unit(self) -> Literal["GPU", "rank"]:
        """What the nodes have; on CPU a "GPU" is a process."""
        return "GPU" if self.machine.accelerator else "rank"


def load_study(path: Path, out: Path, *, to_run: bool) -> ScalingStudy:
    """Read the file of a study and check the configurations in it.

    Args:
        out: folder of the runs.
        to_run: the models and the data must be there.

    Raises:
        ConfigError: lists every mistake.
    """
    spec = load_spec(path)
    machine = find_machine(spec.machine)
    if spec.gpus_per_node and machine.accelerator:
        machine = replace(machine, gpus_per_node=spec.gpus_per_node)
    gpus_per_node = spec.gpus_per_node or machine.gpus_per_node
    cells: dict[tuple[str, str, int, int], Cell] = {}
    series = []
    for name in spec.models:
        planner = _load_planner(path, spec, name, machine, to_run=to_run)
        for kind, batch, layout in _combinations(spec, name):
            keys = []
            for nodes in spec.nodes:
                prompts = batch * nodes // spec.nodes[0] if kind == "weak" else batch
                cell = Cell(
                    model=name, layout=layout, nodes=nodes, gpus=nodes * gpus_per_node,
                    prompts=prompts, planner=planner,
                    folder=out / "cells" / name / f"{layout.label}_n{nodes}_b{prompts}",
                )  # fmt: skip
                keys.append(cell.key)
                cells.setdefault(cell.key, cell)
            series.append(
                Series(kind=kind, model=name, layout=layout.label, batch=batch, keys=tuple(keys))
            )
    return ScalingStudy(path=path, spec=spec, machine=machine, cells=cells, series=series)


def _combinations(spec: ScalingSpec, model: str) -> Iterator[tuple[Kind, int, LayoutSpec]]:
    for kind, batch in spec.batch.items():
        for layout in spec.models[model].layouts or spec.layouts:
            yield kind, batch, layout


def _load_planner(
    path: Path, spec: ScalingSpec, name: str, machine: Machine, *, to_run: bool
) -> Planner:
    model = spec.models[name]
    if to_run and model.hf_config:
        raise ConfigError(f"{path}: models.{name}.hf_config: a model that is not here cannot run")
    # The last step evaluates and saves in any case; these seconds are in no part of a step.
    own = dict.fromkeys(("run.steps", "eval.every", "checkpoint.every"), spec.steps)
    common = {"run.dir": "unused", "tracking.rollouts_per_step": 0} | own
    overrides = as_overrides(common | spec.settings | model.settings)
    config = load_config(model.base, overrides, model.hf_config)
    hf = read_config(model.hf_config or config.model.path)
    return Planner(
        model=read_model(hf), hf=hf, config=config, machine=machine,
        lengths=assumed_lengths(config, spec.response_tokens),
    )  # fmt: skip
