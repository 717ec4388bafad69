"""The whole prediction of one run: memory, seconds of a step, and whether it fits."""

import sys
from dataclasses import replace

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.planning.generation import GenerationSeconds, generation_seconds
from megatron_cpgd.planning.layout import Layout, layout_of
from megatron_cpgd.planning.machine import Machine
from megatron_cpgd.planning.memory import (
    SENDERS_AT_A_TIME,
    EngineSettings,
    RankMemory,
    engine_memory,
    host_memory,
    rank_memory,
)
from megatron_cpgd.planning.model import Model
from megatron_cpgd.planning.passes import PassSeconds, pass_seconds, update_seconds
from megatron_cpgd.planning.plan import Plan, StepSeconds, count_gpus
from megatron_cpgd.planning.problems import find_problems, find_tight, find_warnings
from megatron_cpgd.planning.workload import Lengths, Workload, workload_of


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
        hosts=host_memory(
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
    problems = tuple(find_problems(plan))
    tight = () if problems else tuple(find_tight(plan))
    return replace(plan, problems=problems, tight=tight, warnings=tuple(find_warnings(plan)))


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


def _share_gpus(layout: Layout, engine: EngineSettings, machine: Machine) -> bool:
    """A GPU has a rank and a part of an engine."""
    if not machine.accelerator:
        return False
    ranks = min(layout.world_size, machine.gpus_per_node)
    return any(engine.on_gpu(gpu) for gpu in range(ranks))


def _nodes(layout: Layout, engine: EngineSettings, machine: Machine) -> int:
    """As few as trainer and engines need."""
    gpus = layout.world_size if engine.nodes else count_gpus(layout, engine, machine)
    return -(-gpus // machine.gpus_per_node) + engine.nodes
