"""Why a plan does not fit, what fits only barely, and what else to know of it."""

from collections.abc import Iterator

from megatron_cpgd.planning.plan import Plan, count_gpus

TIGHT = 0.9
"""Share of what may be filled from which on something fits only barely."""
TIGHT_CACHE = 1.1
"""How many times as long sampling takes for want of KV cache, from which on it is worth a line."""


def find_problems(plan: Plan) -> Iterator[str]:
    """Why it does not fit; none: it does."""
    yield from _place_problems(plan)
    if plan.machine.accelerator:
        yield from _engine_gpu_problems(plan)
        yield from _memory_problems(plan)
    else:
        yield from _cpu_problems(plan)


def _place_problems(plan: Plan) -> Iterator[str]:
    """Of the GPUs: how many there are, and what they can compute."""
    machine, layout, engine = plan.machine, plan.layout, plan.workload.engine
    if layout.tp > machine.gpus_per_node:
        yield (
            f"parallel.tp={layout.tp} crosses nodes of {machine.gpus_per_node} GPUs; keep it inside"
        )
    nodes = max(plan.nodes - engine.nodes, 0)
    available = nodes * machine.gpus_per_node
    if machine.accelerator and layout.world_size > available:
        yield f"parallel.* needs {layout.world_size} GPUs, {nodes} nodes have {available}"
    if machine.accelerator and max(engine.devices or (0,)) >= machine.gpus_per_node:
        yield (
            f"rollout.devices={list(engine.devices or ())}: a node has the GPUs 0 to "
            f"{machine.gpus_per_node - 1}"
        )
    fp8 = plan.workload.trainer.passes.fp8
    if fp8 is not None and fp8.format not in machine.flops:
        yield (
            f"precision.train with the recipe {fp8.recipe}: {machine.name} does not multiply in "
            f"{fp8.format.upper()}; use another recipe or bf16"
        )


def _memory_problems(plan: Plan) -> Iterator[str]:
    """Of the ranks' GPUs, of the KV cache and of the hosts."""
    machine, engine, share = plan.machine, plan.workload.engine, plan.fullest
    if share.total > machine.usable_memory:
        beside = f", {gib(share.engine)} of them the engine's" if share.engine else ""
        when = f" while {share.phase}" if engine.sleeps else ""
        yield (
            f"GPU memory{when}: a rank of stage {share.rank.stage} needs {gib(share.total)}{beside}"
            f"; of a GPU {gib(machine.usable_memory)} may be filled"
        )
    longest = plan.workload.requests.longest_sequence
    if plan.engine.cache_tokens < longest:
        yield (
            f"engine: with tensor_parallel_size={engine.tp} its GPU holds "
            f"{gib(plan.engine.weights)} of weights and {plan.engine.cache_tokens} tokens of KV "
            f"cache, a sequence may have {longest:.0f}"
        )
    for host in plan.hosts:
        if host.total > machine.host_memory:
            yield (
                f"host memory: {gib(host.total)} on {host.name}, which has "
                f"{gib(machine.host_memory)}"
            )


def _engine_gpu_problems(plan: Plan) -> Iterator[str]:
    """Of GPUs that no rank has."""
    engine, gpus = plan.workload.engine, plan.machine.gpus_per_node
    own = engine.nodes or max(engine.devices or (0,)) >= plan.layout.world_size
    if own and plan.engine.total > plan.machine.usable_memory:
        beside = f", {gib(plan.engine.receiver)} the process that receives weights"
        yield (
            f"GPU memory of an engine: it claims {gib(plan.engine.claimed)}"
            f"{beside if engine.nodes else ''}; of a GPU {gib(plan.machine.usable_memory)} may be "
            "filled"
        )
    share = len(engine.devices) // engine.per_host if engine.devices else gpus // engine.per_host
    if engine.nodes and engine.tp > share:
        yield (
            f"rollout.nodes={engine.nodes}: tensor_parallel_size={engine.tp} for each of "
            f"{engine.per_host} engines on a node, which has {share} GPUs for each"
        )


def _cpu_problems(plan: Plan) -> Iterator[str]:
    needed, usable = _cpu_memory(plan), plan.machine.usable_memory
    if needed > usable:
        yield f"memory: all processes need {gib(needed)}; of the host {gib(usable)} may be filled"


def _cpu_memory(plan: Plan) -> int:
    """Bytes of all processes, which share the memory of the host."""
    per_stage = plan.layout.world_size // plan.layout.pp
    ranks = sum(stage.total * per_stage for stage in plan.stages)
    return ranks + plan.workload.engine.engines * plan.engine.claimed + plan.host.total


def find_tight(plan: Plan) -> Iterator[str]:
    """What fits only barely, the fullest first.

    Of a GPU that engines have alone they take what they are told to: there the KV cache is what may
    be too small.
    """
    machine, share, waits = plan.machine, plan.fullest, plan.unbounded.total
    if machine.accelerator:
        when = f" while {share.phase}" if plan.workload.engine.sleeps else ""
        of_rank = f"GPU memory of stage {share.rank.stage}{when}"
        filled = [
            (of_rank, share.total, machine.usable_memory),
            *(
                (f"host memory of {host.name}", host.total, machine.host_memory)
                for host in plan.hosts
            ),
        ]
    else:
        filled = [("memory of the host", _cpu_memory(plan), machine.usable_memory)]
    for name, used, limit in sorted(filled, key=lambda each: each[1] / each[2], reverse=True):
        if used > TIGHT * limit:
            yield f"{name}: {gib(used)} of the {gib(limit)} that may be filled"
    if plan.generation.total > TIGHT_CACHE * waits:
        yield (
            f"KV cache: an engine samples {plan.generation.concurrent:.0f} sequences together in "
            f"{plan.generation.total:.1f} s, with room for {plan.unbounded.concurrent:.0f} in "
            f"{waits:.1f} s"
        )


def find_warnings(plan: Plan) -> Iterator[str]:
    """What works, but perhaps not as it is meant."""
    machine, layout = plan.machine, plan.layout
    if layout.ep * layout.etp > machine.gpus_per_node:
        yield (
            f"parallel.ep={layout.ep} * etp={layout.etp} is wider than NVLink reaches "
            f"({machine.gpus_per_node} GPUs): tokens travel to their experts over the network"
        )
    used = count_gpus(layout, plan.workload.engine, machine)
    available = plan.nodes * machine.gpus_per_node
    if machine.accelerator and used < available:
        yield f"the run uses {used} of {available} GPUs on {plan.nodes} nodes"
    for host in plan.hosts:
        if machine.accelerator and host.arena > machine.host_memory / 2:
            yield (
                f"{gib(host.arena)} of weights in /dev/shm of {host.name}: more than half of its "
                "memory, which is what Linux allows unless /dev/shm is mounted with another size"
            )


def gib(nbytes: float) -> str:
    """Bytes for people."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.1f} MiB"
