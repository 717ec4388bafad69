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
        engines = _fastest(planner, [_awake(planner) | each for each in _engines(half, gpus)])
        if engines is not None:
            found += search_layouts(planner, half, [engines])
    nodes, rest = divmod(gpus, machine.gpus_per_node)
    for count in _shares(nodes) if not rest else []:
        engines = _apart(planner, count)
        if engines is not None:
            trainer = gpus - count * machine.gpus_per_node
            found += search_layouts(planner, trainer, [engines])
    return sorted(found, key=_seconds)


def _beside(planner: Planner, gpus: int) -> Iterator[Overrides]:
    """The engines as they are, if they have no nodes, awake or asleep in between; and asleep as
    many as the first node has room for."""
    asleep = TURNS | {"rollout.overlap": False, "rollout.sync": "arena"}
    if not planner.config.rollout.nodes:
        yield {}
        yield asleep
    fastest = _fastest(
        planner,
        [engines | asleep for engines in _engines(0, min(gpus, planner.machine.gpus_per_node))],
    )
    if fastest is not None:
        yield fastest


def _engines(first: int, end: int) -> Iterator[Overrides]:
    """As many as there is room for on these GPUs of the first node."""
    devices = list(range(first, end))
    for size in _sizes(len(devices)):
        yield {
            "rollout.nodes": 0, ENGINE_SIZE: size, "rollout.engines": len(devices) // size,
            "rollout.devices": devices,
        }  # fmt: skip


def _apart(planner: Planner, nodes: int) -> Overrides | None:
    """As many engines as so many nodes have room for; None: they hold none."""
    gpus = planner.machine.gpus_per_node
    common = _awake(planner) | {
        "rollout.nodes": nodes, "rollout.devices": None, "rollout.sync": "arena"
    }  # fmt: skip
    sizes = [
        {ENGINE_SIZE: size, "rollout.engines": nodes * (gpus // size)} for size in _sizes(gpus)
    ]
    return _fastest(planner, [common | size for size in sizes])


def _awake(planner: Planner) -> Overrides:
    """Engines that share no GPU with the trainer. Batches that are sampled ahead are the same
    whether or not it works meanwhile."""
    awake: Overrides = {
        "rollout.sleep": False, "optim.offload": False,
        "rollout.overlap": planner.config.rollout.staleness > 0,
    }  # fmt: skip
    if planner.config.rollout.engine_args.get("gpu_memory_utilization"):
        awake[UTILIZATION] = VLLM_UTILIZATION
    return awake


def _fastest(planner: Planner, choices: list[Overrides]) -> Overrides | None:
    """The engines that sample fastest: no layout of the trainer changes that. None: no sequence
    fits into any of them."""
    found: list[tuple[float, Overrides]] = []
    for engines in choices:
        plan = planner.plan(engines)
        if plan and plan.engine.cache_tokens >= plan.workload.requests.longest_sequence:
            found.append((plan.generation.total, engines))
    return min(found, key=lambda each: each[0])[1] if found else None


def _shares(nodes: int) -> list[int]:
    """How many nodes engines may have, a sixteenth at least, as may the trainer: numbers that are,
    or leave, a power of two or three times one."""
    powers = [2**k for k in range(nodes.bit_length())]
    some = [n for power in powers for n in (power, 3 * power) if nodes <= 16 * n < 16 * nodes]
    return sorted({*some, *(nodes - n for n in some)})


def _sizes(gpus: int) -> list[int]:
    """GPUs of an engine, where there are so many."""
    return [size for size in divisors(gpus) if size & (size - 1) == 0]


def _seconds(candidate: Candidate) -> tuple[float, float]:
    """The step; of equal ones, which wait for sampling, the one that trains faster."""
    return candidate.plan.seconds.total, candidate.plan.seconds.train
