"""The whole prediction of one run: memory, seconds of a step, and whether it fits."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.planning.generation import GenerationSeconds, generation_seconds
from megatron_cpgd.planning.layout import Layout, layout_of
from megatron_cpgd.planning.machine import Machine
from megatron_cpgd.planning.memory import (
    SENDERS_AT_A_TIME,
    EngineMemory,
    EngineSettings,
    HostMemory,
    RankMemory,
    engine_memory,
    host_memory,
    rank_memory,
)
from megatron_cpgd.planning.model import Model
from megatron_cpgd.planning.passes import PassSeconds, pass_seconds, update_seconds
from megatron_cpgd.planning.workload import Lengths, Workload, workload_of

TIGHT = 0.9
"""Share of what may be filled from which on something fits only barely."""
TIGHT_CACHE = 1.1
"""How many times as long sampling takes for want of KV cache, from which on it is worth a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """Of one step; evaluations, checkpoints and exports come on top."""

    generate: float
    """What the trainer waits for sampling."""
    reload: float
    """With `optim.offload`: weights and optimizer state back to the GPU."""
    old_logprobs: float
    ref_logprobs: float
    train: float
    sync: float
    other: float

    @property
    def total(self) -> float:
        return (
            self.generate + self.reload + self.old_logprobs + self.ref_logprobs + self.train
            + self.sync + self.other
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Bytes of one GPU that trainer and engine fill at the same time."""

    phase: Literal["training", "sampling"]
    """Training stands for all that the trainer does, and for everything if no engine sleeps."""
    rank: RankMemory
    trainer: int
    engine: int

    @property
    def total(self) -> int:
        return self.trainer + self.engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The prediction."""

    layout: Layout
    machine: Machine
    workload: Workload
    nodes: int
    parameters: int
    active_parameters: int
    stages: tuple[RankMemory, ...]
    engine: EngineMemory
    host: HostMemory
    seconds: StepSeconds
    generation: GenerationSeconds
    unbounded: GenerationSeconds
    """The same if every sequence that an engine may take at a time had room in its KV cache."""
    training: PassSeconds
    problems: tuple[str, ...]
    """Why it does not fit; empty: it does."""
    tight: tuple[str, ...]
    """What fits only barely, and so decides what else fits or how fast it is."""
    warnings: tuple[str, ...]
    train_flops: float
    """Of the training passes of a step, nothing counted twice."""

    @property
    def worst(self) -> RankMemory:
        """The rank that needs most while it trains, beside what the engine has on its GPU."""
        return max(self.stages, key=lambda stage: stage.total + self.beside(stage.stage))

    @property
    def fullest(self) -> Share:
        """The GPU of a rank that is fullest, and when."""
        training = Share(
            phase="training", rank=self.worst, trainer=self.worst.total,
            engine=self.beside(self.worst.stage),
        )  # fmt: skip
        return max((training, self.sampling or training), key=lambda share: share.total)

    @property
    def sampling(self) -> Share | None:
        """The GPU that is fullest while engines sample that sleep otherwise; None: none does.

        A sync takes no more: they wake when the policy has left, and it writes while they sleep.
        """
        shares = [
            Share(
                phase="sampling", rank=rank, trainer=rank.idle, engine=count * self.engine.claimed
            )
            for rank in self.stages
            if self.workload.engine.sleeps and (count := self.engines_beside(rank.stage))
        ]
        return max(shares, key=lambda share: share.total, default=None)

    def beside(self, stage: int) -> int:
        """Bytes of the engine on the GPUs of a stage's ranks, while the trainer works."""
        asleep = self.workload.engine.sleeps
        claimed = self.machine.efficiency.sleeping_engine if asleep else self.engine.claimed
        return self.engines_beside(stage) * claimed

    def engines_beside(self, stage: int) -> int:
        """Engines on the GPU of a stage's rank that has most of them."""
        engine = self.workload.engine
        if not self.machine.accelerator:
            return 0
        per_stage = self.layout.world_size // self.layout.pp
        end = min((stage + 1) * per_stage, self.machine.gpus_per_node)
        return max((engine.on_gpu(gpu) for gpu in range(stage * per_stage, end)), default=0)

    @property
    def gpus(self) -> int:
        """Of trainer and engines."""
        return _gpus(self.layout, self.workload.engine, self.machine)

    @property
    def tokens_per_gpu_s(self) -> float:
        """Tokens of a step over its seconds, and over all GPUs of trainer and engines."""
        return self.workload.tokens / self.seconds.total / self.gpus

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def mfu(self) -> float:
        """Model FLOPs of the training passes over what the GPUs could do in their time."""
        peak = self.machine.flops[self.workload.trainer.passes.precision]
        return self.train_flops / (self.seconds.train * peak * self.layout.world_size)


def make_plan(
    model: Model, config: ExperimentConfig, machine: Machine, lengths: Lengths,
    *, nodes: int | None = None,
) -> Plan:  # fmt: skip
    """The prediction of a configuration whose own checks have passed."""
    layout = layout_of(config.parallel)
    return estimate(model, layout, machine, workload_of(config, machine, lengths), nodes=nodes)


def estimate(
    model: Model, layout: Layout, machine: Machine, workload: Workload, *, nodes: int | None = None
) -> Plan:
    """The prediction of a workload under a layout."""
    trainer, engine = workload.trainer, workload.engine
    engine_bytes = engine_memory(model, engine, machine)
    generation, unbounded = (
        generation_seconds(model, machine, engine, memory, workload.requests)
        for memory in (engine_bytes, replace(engine_bytes, cache_tokens=sys.maxsize))
    )
    training = _training(model, layout, machine, workload)
    stages = tuple(rank_memory(model, layout, s, trainer, machine) for s in range(layout.pp))
    plan = Plan(
        layout=layout,
        machine=machine,
        workload=workload,
        nodes=nodes or _nodes(layout, engine, machine),
        parameters=model.parameters,
        active_parameters=model.active_parameters,
        stages=stages,
        engine=engine_bytes,
        host=host_memory(
            model, layout, trainer, engine, machine,
            batch_tokens=workload.tokens, routes=workload.routes,
        ),
        seconds=_step_seconds(model, layout, machine, workload, stages, generation, training),
        generation=generation,
        unbounded=unbounded,
        training=training,
        problems=(),
        tight=(),
        warnings=(),
        train_flops=workload.epochs * model.train_flops(
            workload.batch.tokens, workload.batch.length
        ),
    )  # fmt: skip
    problems = tuple(_problems(plan))
    tight = () if problems else tuple(_tight(plan))
    return replace(plan, problems=problems, tight=tight, warnings=tuple(_warnings(plan)))


def _step_seconds(
    model: Model, layout: Layout, machine: Machine, workload: Workload,
    stages: tuple[RankMemory, ...], generation: GenerationSeconds, training: PassSeconds,
) -> StepSeconds:  # fmt: skip
    passes = workload.trainer.passes
    batch = replace(workload.batch, micro_tokens=workload.logprob_micro_tokens)
    forward = pass_seconds(model, layout, machine, passes, batch, backward=False).total
    reference = 0.0
    if workload.trainer.reference:
        shard = passes.element * model.parameters / (layout.tp * layout.pp * layout.ep)
        reference = forward + 4 * shard / machine.pcie
    old_logprobs = workload.forward_passes * forward
    train = training.total + workload.live_passes * forward
    # On the same GPUs each takes from the other what it gains.
    beside = workload.overlap and not _share_gpus(layout, workload.engine, machine)
    hidden = old_logprobs + reference + train if beside else 0.0
    moved = 0.0
    if workload.trainer.offloads:
        moved = max(stage.weights + stage.optimizer for stage in stages) / machine.pcie
    return StepSeconds(
        generate=max(generation.total - hidden, 0.0),
        reload=moved,
        old_logprobs=old_logprobs,
        ref_logprobs=reference,
        train=train,
        sync=_sync_seconds(model, layout, machine, workload.engine) + moved,
        other=machine.efficiency.other_s,
    )


def _training(model: Model, layout: Layout, machine: Machine, workload: Workload) -> PassSeconds:
    """All optimizer steps of a step."""
    passes, updates = workload.trainer.passes, workload.updates
    batch = replace(workload.batch, tokens=workload.batch.tokens * workload.epochs / updates)
    one = pass_seconds(model, layout, machine, passes, batch, backward=True)
    update = update_seconds(model, layout, machine, passes)
    return PassSeconds(
        **{
            name: updates * (getattr(one, name) + getattr(update, name))
            for name in PassSeconds.__dataclass_fields__
        }
    )


def _sync_seconds(model: Model, layout: Layout, machine: Machine, engine: EngineSettings) -> float:
    """Written to the arena by all ranks, read and summed by every engine of its host. What ranks
    quantise and sum on their own devices takes no time.

    A node of engines receives the model from one replica of the trainer, in equal shares, over as
    many links as it has receivers and the replica has senders. These send to all nodes of the
    replica at one time.
    """
    rates = machine.efficiency
    size = model.checkpoint_bytes[engine.precision]
    engines = min(engine.per_host, max(machine.gpus_per_node // engine.tp, 1))
    seconds = size * engines / rates.host_sum + size / machine.pcie
    if not engine.nodes:
        return rates.sync_factor * (seconds + size / rates.host_write)
    of_experts = size * model.expert_parameters / model.parameters
    for nbytes, replicas, senders in (
        (size - of_experts, layout.replicas, layout.tp * layout.pp),
        (of_experts, layout.expert_replicas, layout.ep * layout.etp * layout.pp),
    ):
        links = min(machine.receivers, senders)
        sending = min(SENDERS_AT_A_TIME * links, senders)
        served = -(-engine.nodes // replicas)
        slowest = max(1 / links, served / sending)
        seconds += nbytes * slowest / (machine.network * rates.link)
        seconds += nbytes / min(links * rates.host_write, rates.host_writes)
    return rates.sync_factor * seconds


def _problems(plan: Plan) -> list[str]:
    machine, layout, engine = plan.machine, plan.layout, plan.workload.engine
    problems = []
    if layout.tp > machine.gpus_per_node:
        problems.append(
            f"parallel.tp={layout.tp} crosses nodes of {machine.gpus_per_node} GPUs; keep it inside"
        )
    nodes = max(plan.nodes - engine.nodes, 0)
    available = nodes * machine.gpus_per_node
    if machine.accelerator and layout.world_size > available:
        problems.append(
            f"parallel.* needs {layout.world_size} GPUs, {nodes} nodes have {available}"
        )
    if machine.accelerator and max(engine.devices or (0,)) >= machine.gpus_per_node:
        problems.append(
            f"rollout.devices={list(engine.devices or ())}: a node has the GPUs 0 to "
            f"{machine.gpus_per_node - 1}"
        )
    fp8 = plan.workload.trainer.passes.fp8
    if fp8 is not None and fp8.format not in machine.flops:
        problems.append(
            f"precision.train with the recipe {fp8.recipe}: {machine.name} does not multiply in "
            f"{fp8.format.upper()}; use another recipe or bf16"
        )
    if not machine.accelerator:
        return problems + _cpu_problems(plan)
    problems += _engine_gpu_problems(plan)
    share = plan.fullest
    if share.total > machine.usable_memory:
        beside = f", {gib(share.engine)} of them the engine's" if share.engine else ""
        when = f" while {share.phase}" if engine.sleeps else ""
        problems.append(
            f"GPU memory{when}: a rank of stage {share.rank.stage} needs {gib(share.total)}{beside}"
            f"; of a GPU {gib(machine.usable_memory)} may be filled"
        )
    longest = plan.workload.requests.longest_sequence
    if plan.engine.cache_tokens < longest:
        problems.append(
            f"engine: with tensor_parallel_size={engine.tp} its GPU holds "
            f"{gib(plan.engine.weights)} of weights and {plan.engine.cache_tokens} tokens of KV "
            f"cache, a sequence may have {longest:.0f}"
        )
    if plan.host.total > machine.host_memory:
        problems.append(
            f"host memory: {gib(plan.host.total)} on {plan.host.name}, which has "
            f"{gib(machine.host_memory)}"
        )
    return problems


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


def _cpu_problems(plan: Plan) -> list[str]:
    needed, usable = _cpu_memory(plan), plan.machine.usable_memory
    if needed <= usable:
        return []
    return [f"memory: all processes need {gib(needed)}; of the host {gib(usable)} may be filled"]


def _cpu_memory(plan: Plan) -> int:
    """Bytes of all processes, which share the memory of the host."""
    per_stage = plan.layout.world_size // plan.layout.pp
    ranks = sum(stage.total * per_stage for stage in plan.stages)
    return ranks + plan.workload.engine.engines * plan.engine.claimed + plan.host.total


def _tight(plan: Plan) -> Iterator[str]:
    """The fullest first. Of a GPU that engines have alone they take what they are told to: there
    the KV cache is what may be too small."""
    machine, share, waits = plan.machine, plan.fullest, plan.unbounded.total
    if machine.accelerator:
        when = f" while {share.phase}" if plan.workload.engine.sleeps else ""
        of_rank = f"GPU memory of stage {share.rank.stage}{when}"
        filled = [
            (of_rank, share.total, machine.usable_memory),
            (f"host memory of {plan.host.name}", plan.host.total, machine.host_memory),
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


def _warnings(plan: Plan) -> list[str]:
    machine, layout = plan.machine, plan.layout
    warnings = []
    if layout.ep * layout.etp > machine.gpus_per_node:
        warnings.append(
            f"parallel.ep={layout.ep} * etp={layout.etp} is wider than NVLink reaches "
            f"({machine.gpus_per_node} GPUs): tokens travel to their experts over the network"
        )
    used = _gpus(layout, plan.workload.engine, machine)
    available = plan.nodes * machine.gpus_per_node
    if machine.accelerator and used < available:
        warnings.append(f"the run uses {used} of {available} GPUs on {plan.nodes} nodes")
    if machine.accelerator and plan.host.arena > machine.host_memory / 2:
        warnings.append(
            f"{gib(plan.host.arena)} of weights in /dev/shm of {plan.host.name}: more than half of "
            "its memory, which is what Linux allows unless /dev/shm is mounted with another size"
        )
    return warnings


def _share_gpus(layout: Layout, engine: EngineSettings, machine: Machine) -> bool:
    """A GPU has a rank and a part of an engine."""
    if not machine.accelerator:
        return False
    ranks = min(layout.world_size, machine.gpus_per_node)
    return any(engine.on_gpu(gpu) for gpu in range(ranks))


def _gpus(layout: Layout, engine: EngineSettings, machine: Machine) -> int:
    """GPUs up to the last one that trainer or engines use; the latter are on the first host, unless
    they have nodes."""
    if engine.nodes:
        return layout.world_size + engine.engines * engine.tp
    last = max(engine.devices or (0,)) + 1
    return max(layout.world_size, min(last, machine.gpus_per_node))


def _nodes(layout: Layout, engine: EngineSettings, machine: Machine) -> int:
    """As few as trainer and engines need."""
    gpus = layout.world_size if engine.nodes else _gpus(layout, engine, machine)
    return -(-gpus // machine.gpus_per_node) + engine.nodes


def gib(nbytes: float) -> str:
    """Bytes for people."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.1f} MiB"
