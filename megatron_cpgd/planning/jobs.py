"""All layouts of a job: what the trainer has of its GPUs, and where the engines are."""

from collections.abc import Iterator

from megatron_cpgd.planning.search import (
    ENGINE_SIZE,
    TURNS,
    UTILIZATION,
    Candidate,
    Overrides,
    Planner,
    divisors,
    search_layouts,
    step_seconds,
)
from megatron_cpgd.planning.workload import VLLM_UTILIZATION


def search_jobs(planner: Planner, gpus: int) -> list[Candidate]:
    """Every layout of a job with so many GPUs, trainer and engines together, that fits, fastest
    first. Engines are on GPUs of the trainer's first node, on half of a node that is all there is,
    or on nodes of their own."""
    machine = planner.machine
    if not machine.accelerator:
        return search_layouts(planner, gpus)
    found = search_layouts(planner, gpus, list(_beside(planner, gpus)))
    if gpus <= machine.gpus_per_node and gpus % 2 == 0:
        half = gpus // 2
        found += search_layouts(planner, half, list(_engines(planner, half, gpus)))
    nodes, rest = divmod(gpus, machine.gpus_per_node)
    for count in _shares(nodes) if not rest else []:
        engines = _apart(planner, count)
        if engines is not None:
            trainer = gpus - count * machine.gpus_per_node
            found += search_layouts(planner, trainer, [engines])
    return sorted(found, key=step_seconds)


def _beside(planner: Planner, gpus: int) -> Iterator[Overrides]:
    """The engines as they are, if they have no nodes, or as many as the first node has room for;
    each time also asleep in between."""
    asleep = TURNS | {"rollout.overlap": False, "rollout.sync": "arena"}
    if not planner.config.rollout.nodes:
        yield {}
        yield asleep
    for engines in _engines(planner, 0, min(gpus, planner.machine.gpus_per_node)):
        yield engines
        yield engines | asleep


def _engines(planner: Planner, first: int, end: int) -> Iterator[Overrides]:
    """As many as there is room for on these GPUs of the first node, and awake."""
    devices = list(range(first, end))
    for size in _sizes(len(devices)):
        yield {
            "rollout.nodes": 0, "rollout.sleep": False, "optim.offload": False,
            "rollout.overlap": _overlaps(planner), ENGINE_SIZE: size,
            "rollout.engines": len(devices) // size, "rollout.devices": devices,
        }  # fmt: skip


def _apart(planner: Planner, nodes: int) -> Overrides | None:
    """As many engines as so many nodes have room for, of the size that samples fastest: no layout
    of the trainer changes that. None: they hold none."""
    gpus = planner.machine.gpus_per_node
    common: Overrides = {
        "rollout.nodes": nodes, "rollout.devices": None, "rollout.sleep": False,
        "optim.offload": False, "rollout.overlap": _overlaps(planner), "rollout.sync": "arena",
    }  # fmt: skip
    if planner.config.rollout.engine_args.get("gpu_memory_utilization"):
        common |= {UTILIZATION: VLLM_UTILIZATION}
    found: list[tuple[float, Overrides]] = []
    for size in _sizes(gpus):
        engines = common | {ENGINE_SIZE: size, "rollout.engines": nodes * (gpus // size)}
        plan = planner.plan(engines)
        if plan and plan.engine.cache_tokens >= plan.workload.requests.longest_sequence:
            found.append((plan.generation.total, engines))
    return min(found, key=lambda each: each[0])[1] if found else None


def _overlaps(planner: Planner) -> bool:
    """Batches that are sampled ahead are the same whether or not the trainer works meanwhile."""
    return planner.config.rollout.staleness > 0


def _shares(nodes: int) -> list[int]:
    """How many nodes engines may have, a sixteenth at least, as may the trainer: numbers that are,
    or leave, a power of two or three times one."""
    powers = [2**k for k in range(nodes.bit_length())]
    some = [n for power in powers for n in (power, 3 * power) if nodes <= 16 * n < 16 * nodes]
    return sorted({*some, *(nodes - n for n in some)})


def _sizes(gpus: int) -> list[int]:
    """GPUs of an engine, where there are so many."""
    return [size for size in divisors(gpus) if size & (size - 1) == 0]
