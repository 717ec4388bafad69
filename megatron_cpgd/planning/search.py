"""Other settings that would fit: small changes to one configuration, or all layouts of a count."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cpgd.config.checks import check_settings
from megatron_cpgd.config.model_folder import check_sizes
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.planning.estimate import make_plan
from megatron_cpgd.planning.machine import Machine
from megatron_cpgd.planning.model import Model
from megatron_cpgd.planning.plan import Plan
from megatron_cpgd.planning.workload import VLLM_UTILIZATION, Lengths

type Overrides = dict[str, Any]
"""Dotted setting -> value, as on the command line."""

UTILIZATION = "rollout.engine_args.gpu_memory_utilization"
ENGINE_SIZE = "rollout.engine_args.tensor_parallel_size"
TURNS: Overrides = {
    "rollout.sleep": True, "optim.offload": True, UTILIZATION: VLLM_UTILIZATION
}  # fmt: skip
"""Engines that sleep while the trainer works, with as much of the memory as vLLM takes at most."""
LEAST_MICRO_TOKENS = 1024
MOST_CHANGES = 3
FIXES = 3
"""How many are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Settings over the given configuration, and what they would do."""

    overrides: Overrides
    plan: Plan

    @property
    def command_line(self) -> str:
        """As `train` takes it."""
        return " ".join(f"{name}={_yaml(value)}" for name, value in self.overrides.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """What every candidate shares."""

    model: Model
    hf: dict[str, Any]
    config: ExperimentConfig
    machine: Machine
    lengths: Lengths
    nodes: int | None = None

    def plan(self, overrides: Overrides) -> Plan | None:
        """None: the settings contradict each other or do not divide the model."""
        config = with_overrides(self.config, overrides)
        if check_settings(config) or any(check_sizes(self.hf, config.model.path, config)):
            return None
        return make_plan(self.model, config, self.machine, self.lengths, nodes=self.nodes)

    def changed(self, overrides: Overrides) -> Overrides:
        """Those that differ from the configuration."""
        return {
            name: value
            for name, value in overrides.items()
            if with_overrides(self.config, {name: value}) != self.config
        }

    def fitting(self, overrides: Overrides) -> Candidate | None:
        """The candidate if it fits, with the engine's share of the memory lowered if that helps."""
        plan = self.plan(overrides)
        if plan is None:
            return None
        if plan.fits:
            return Candidate(overrides=overrides, plan=plan)
        share = _engine_share(plan)
        if share is None:
            return None
        overrides = overrides | {UTILIZATION: share}
        plan = self.plan(overrides)
        return Candidate(overrides=overrides, plan=plan) if plan and plan.fits else None


def find_fixes(planner: Planner) -> list[Candidate]:
    """The smallest sets of changes after which the configuration fits; those with the fewest GPUs
    come first, of them the fastest.

    Changes that keep the number of GPUs are tried before those that need more.
    """
    seen: set[str] = set()
    for grow in (False, True):
        for size in range(MOST_CHANGES + 1):
            found = []
            for changes in itertools.combinations(_changes(planner, grow=grow), size):
                overrides = _joined(changes)
                if overrides is None or (key := str(sorted(overrides.items()))) in seen:
                    continue
                seen.add(key)
                candidate = planner.fitting(overrides)
                if candidate:
                    found.append(candidate)
            if found:
                return sorted(found, key=_cost)[:FIXES]
    return []


def search_layouts(
    planner: Planner, gpus: int, engines: Sequence[Overrides] | None = None
) -> list[Candidate]:
    """Every layout of so many GPUs of the trainer that fits, fastest first; of each the best
    engine, the least recompute and the largest micro-batches that fit.

    Args:
        engines: those to choose from; default: the one as it is, and cut over more GPUs.
    """
    if engines is None:
        engines = list(_engines(planner))

    def fitting(layout: Overrides, memory: Overrides) -> list[Candidate]:
        given = (planner.changed(layout | memory | engine) for engine in engines)
        return [candidate for each in given if (candidate := planner.fitting(each))]

    *others, leanest = _memory_settings(planner.config)
    found = []
    for layout in iter_layouts(planner, gpus):
        if not (lean := fitting(layout, leanest)):
            continue  # nor does it with more memory
        fast = [candidate for memory in others for candidate in fitting(layout, memory)]
        found.append(min(fast + lean, key=_seconds))
    return sorted(found, key=_seconds)


def find_nearest(planner: Planner, gpus: int) -> Plan | None:
    """Of all layouts of so many GPUs, with the leanest settings, the one with the fewest problems,
    of these with the least memory; None: there is no layout. For where nothing fits."""
    *_, leanest = _memory_settings(planner.config)
    plans = [planner.plan(layout | leanest) for layout in iter_layouts(planner, gpus)]
    found = [plan for plan in plans if plan is not None]
    return min(found, key=lambda plan: (len(plan.problems), plan.fullest.total), default=None)


def with_overrides(config: ExperimentConfig, overrides: Overrides) -> ExperimentConfig:
    """The configuration with some settings replaced, unchecked."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in overrides.items():
        section, setting, *key = name.split(".")
        settings = sections.setdefault(section, {})
        if key:
            before = settings.get(setting, getattr(getattr(config, section), setting))
            value = {**before, key[0]: value}
        settings[setting] = value
    return config.model_copy(
        update={
            name: getattr(config, name).model_copy(update=settings)
            for name, settings in sections.items()
        }
    )


def _changes(planner: Planner, *, grow: bool) -> list[Overrides]:
    """Single changes, cheapest in speed first."""
    config, sizes = planner.config, planner.config.parallel
    changes: list[Overrides] = [*_turns(planner), *_engine_gpus(planner)]
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    least = max(LEAST_MICRO_TOKENS, longest)
    tokens = config.batch.tokens_per_micro_batch
    while tokens // 2 >= least:
        tokens //= 2
        changes.append({"batch.tokens_per_micro_batch": tokens})
    if config.batch.logprob_chunk_tokens > 1024:
        changes.append({"batch.logprob_chunk_tokens": 1024})
    if config.model.recompute != "full":
        changes.append({"model.recompute": "full"})
    if not config.optim.distributed:
        changes.append({"optim.distributed": True})
    for factor in (2, 4, 8):
        for name in ("ep", "tp", "pp", "cp"):
            change = {f"parallel.{name}": getattr(sizes, name) * factor}
            if name != "ep" and not grow:
                if sizes.dp % factor:
                    continue
                change["parallel.dp"] = sizes.dp // factor
            changes.append(change)
        if grow:
            changes.append({"parallel.dp": sizes.dp * factor})
        engine = int(config.rollout.engine_args.get("tensor_parallel_size") or 1) * factor
        if engine <= planner.machine.gpus_per_node:
            changes.append({"rollout.engine_args.tensor_parallel_size": engine})
    return changes + list(_engine_nodes(planner)) if grow else changes


def _engine_nodes(planner: Planner) -> Iterator[Overrides]:
    """A node of their own for as many engines as it holds; for large ones with FP8 weights too."""
    config, machine = planner.config, planner.machine
    if not machine.accelerator or config.rollout.nodes:
        return
    size = int(config.rollout.engine_args.get("tensor_parallel_size") or 1)
    while size <= machine.gpus_per_node:
        apart: Overrides = {
            "rollout.nodes": 1,
            "rollout.engines": machine.gpus_per_node // size,
            "rollout.engine_args.tensor_parallel_size": size,
        }
        yield apart
        if config.precision.engine_weights == "bf16":
            yield apart | {"precision.rollout": "fp8_block"}
        size *= 2


def _turns(planner: Planner) -> Iterator[Overrides]:
    """Engines that sleep while the trainer works, and the trainer's state away meanwhile."""
    if not planner.machine.accelerator:
        return
    sleep: Overrides = {} if planner.config.rollout.sleep else {"rollout.sleep": True}
    if sleep:
        yield sleep
    if not planner.config.optim.offload:
        yield sleep | {"optim.offload": True}


def _engine_gpus(planner: Planner) -> Iterator[Overrides]:
    """GPUs of their own for the engines: idle ones of the first host, or half of the trainer's."""
    config, machine = planner.config, planner.machine
    sizes, engines = config.parallel, config.rollout.engines
    if not machine.accelerator or config.rollout.devices is not None or config.rollout.nodes:
        return
    size = int(config.rollout.engine_args.get("tensor_parallel_size") or 1) * engines
    first, half = sizes.world_size, sizes.world_size // 2
    if first + size <= machine.gpus_per_node:
        yield {"rollout.devices": list(range(first, first + size))}
    if sizes.dp % 2 == 0 and first <= machine.gpus_per_node and size <= half:
        # As many engines as there is room for: each answers a share of the prompts.
        count = half // size
        yield {
            "parallel.dp": sizes.dp // 2,
            "rollout.devices": list(range(half, half + count * size)),
            "rollout.engines": engines * count,
        }


def _joined(changes: tuple[Overrides, ...]) -> Overrides | None:
    """All of them, unless two change the same setting."""
    joined: Overrides = {}
    for change in changes:
        if joined.keys() & change.keys():
            return None
        joined |= change
    return joined


def iter_layouts(planner: Planner, gpus: int) -> Iterator[Overrides]:
    """Sizes of all axes, and layers of unequal stages, with which the model is cut over so many
    ranks."""
    decoder, machine = planner.model.decoder, planner.machine
    heads = math.gcd(decoder.heads, decoder.kv_heads)
    experts = decoder.experts.count if decoder.experts else 1
    given = planner.config.parallel
    stages = {pp: _stage_layers(decoder.layers, pp) for pp in _pipelines(planner)}
    if given.stage_layers:
        stages = {given.pp: given.stage_layers}
    for tp, pp, cp in itertools.product(
        [n for n in divisors(heads) if n <= machine.gpus_per_node], stages, (1, 2, 4, 8)
    ):
        if gpus % (tp * pp * cp):
            continue
        dp = gpus // (tp * pp * cp)
        for ep in divisors(math.gcd(experts, tp * cp * dp)):
            yield {
                "parallel.tp": tp, "parallel.pp": pp, "parallel.cp": cp, "parallel.dp": dp,
                "parallel.ep": ep, "parallel.stage_layers": stages[pp],
            }  # fmt: skip


def _pipelines(planner: Planner) -> list[int]:
    """Stages: divisors of the layers, and powers of two, of which some stages have a layer less."""
    layers, even = planner.model.decoder.layers, planner.config.parallel.vpp > 1
    powers = [] if even else [2**k for k in range(layers.bit_length())]
    return sorted({*divisors(layers), *powers})


def _stage_layers(layers: int, stages: int) -> list[int] | None:
    """The last stages, of which one has the head, are the shorter ones; None: all are equal."""
    least, more = divmod(layers, stages)
    return [least + 1] * more + [least] * (stages - more) if more else None


def _engines(planner: Planner) -> Iterator[Overrides]:
    """The engine as it is, and cut over more GPUs of a node; each time also asleep in between, with
    as much of the memory as vLLM takes at most."""
    config = planner.config
    size = int(config.rollout.engine_args.get("tensor_parallel_size") or 1)
    engine: Overrides = {}
    while True:
        yield engine
        if planner.machine.accelerator:
            yield engine | TURNS
        size *= 2
        if not planner.machine.accelerator or size > planner.machine.gpus_per_node:
            return
        engine = {ENGINE_SIZE: size}


def _memory_settings(config: ExperimentConfig) -> Iterator[Overrides]:
    """From the fastest to the leanest."""
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    budget = config.batch.tokens_per_micro_batch
    budgets = [budget, *(budget // n for n in (2, 4, 8) if budget // n >= longest)]
    for recompute in ("none", "full"):
        for tokens in budgets:
            yield {"model.recompute": recompute, "batch.tokens_per_micro_batch": tokens}


def _engine_share(plan: Plan) -> float | None:
    """Share of the GPU that ranks leave to an engine, if it stays on theirs."""
    engine, machine = plan.workload.engine, plan.machine
    if not plan.machine.accelerator or engine.cache_bytes is not None:
        return None
    if engine.nodes:
        shared = [plan.engine.receiver]
    else:
        shared = [
            stage.idle if engine.sleeps else stage.total
            for stage in plan.stages
            if plan.engines_beside(stage.stage)
        ]
    room = machine.usable_memory - max(shared, default=0)
    together = max(engine.on_gpu(gpu) for gpu in range(machine.gpus_per_node))
    share = math.floor(100 * room / machine.memory / max(together, 1)) / 100
    return share if 0 < share < engine.utilization else None


def divisors(number: int) -> list[int]:
    """Ascending, 1 and the number included."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _cost(candidate: Candidate) -> tuple[int, float]:
    return candidate.plan.gpus, candidate.plan.seconds.total


def _seconds(candidate: Candidate) -> float:
    return candidate.plan.seconds.total


def _yaml(value: Any) -> str:
    """Without spaces, so that a shell takes it as one word."""
    return "null" if value is None else str(value).lower().replace(" ", "")
