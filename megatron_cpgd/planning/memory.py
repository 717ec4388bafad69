"""Memory of the ranks, of the engine and of the hosts."""

from dataclasses import dataclass, replace
from typing import Literal

from megatron_cpgd.planning.activations import (
    Passes,
    head_bytes,
    stage_activations,
    working_bytes,
)
from megatron_cpgd.planning.fp8 import weight_copies
from megatron_cpgd.planning.layout import Layout
from megatron_cpgd.planning.machine import GIB, Machine
from megatron_cpgd.planning.model import Model
from megatron_cpgd.planning.state import BYTES, read_elements, state_bytes
from megatron_cpgd.weights.buckets import BUCKET_BYTES

SENDERS_AT_A_TIME = 4
"""Of each receiver of an engine node, as weight_sync/receiver.py has it."""
REFERENCE_PIECE = 16 << 20
"""As PIECE_BYTES of policy/reference.py."""
HOST_PROCESS = 3 * GIB
"""Host memory of a Python process with torch and CUDA; of a rank or an engine worker."""
HEAP_LOSS = 6.0
"""How many times as much the heap of a CPU process loses where buffers of tensor parallelism come
and go between activations; measured with the settings of `policy/memory.py:tame_heap`."""
ROUTE_COPIES = 3
"""Of all routes on the first host: as sampled, as sent, and for its ranks together."""
TOKEN_RECORD = 64
"""Bytes of a token of the batch on the host: ids, log-probs, advantage, coefficients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes of a rank of one pipeline stage, at its fullest."""

    stage: int
    weights: int
    fp8_copies: int
    """Of the weights, where layers multiply in FP8."""
    gradients: int
    optimizer: int
    activations: int
    """Saved for the backward passes of all micro-batches in flight."""
    working: int
    """Of the layer, or of the log-probs, whose backward pass runs."""
    reference: int
    """The piece that is being exchanged with the host; on CPU the whole shard."""
    mapped: int
    """On CPU: pages of the arena and of the checkpoint that the rank has touched."""
    overhead: int
    """Context, communicators, workspaces, and what the allocator loses; on CPU with a distributed
    optimizer also a copy of the gradients."""
    leaves: int
    """Of all this, what is gone while engines that sleep otherwise are awake: what only passes
    need, and with `optim.offload` the state."""

    @property
    def total(self) -> int:
        return (
            self.weights + self.fp8_copies + self.gradients + self.optimizer + self.activations
            + self.working + self.reference + self.mapped + self.overhead
        )  # fmt: skip

    @property
    def idle(self) -> int:
        """Bytes while engines that sleep otherwise are awake."""
        return self.total - self.leaves


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """Bytes of one of the engine's GPUs."""

    ranks: int
    """GPUs of one engine."""
    weights: int
    cache: int
    """Of the KV cache."""
    cache_tokens: int
    """Tokens that fit into it."""
    claimed: int
    """What the engine takes, used or not."""
    receiver: int = 0
    """Of the process that receives weights beside it, on nodes of their own."""

    @property
    def total(self) -> int:
        return self.claimed + self.receiver


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Bytes of a host."""

    name: str
    arena: int
    """All weights in shared memory, between trainer and engine."""
    reference: int
    """The pinned shards of its ranks."""
    offload: int
    """Pinned too: their weights and optimizer state, kept while the trainer works."""
    checkpoint: int
    """What its ranks write of one, copied from the GPUs first."""
    batch: int
    """Tokens of a step on every rank, and routes."""
    processes: int

    @property
    def total(self) -> int:
        return (
            self.arena + self.reference + self.offload + self.checkpoint + self.batch
            + self.processes
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSettings:
    """What the trainer's memory depends on beside model and layout."""

    passes: Passes
    distributed_optimizer: bool
    micro_tokens: int
    """Of the largest micro-batch with gradient."""
    chunk_tokens: int
    reference: bool
    offloads: bool = False
    """Weights and optimizer state are on the host while the engines work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """The sampling engines."""

    tp: int
    precision: Literal["bf16", "fp32", "fp8_block"]
    utilization: float
    """Share of a GPU's memory that an engine claims."""
    max_sequences: int
    cache_bytes: int | None = None
    """Of the KV cache, if it is set instead."""
    engines: int = 1
    devices: tuple[int, ...] | None = None
    """GPUs of the first host that the engines take in equal shares; None: each takes the first."""
    nodes: int = 0
    """Nodes of their own, which they fill in equal shares; 0: they are on the trainer's first."""
    fp8_cache: bool = False
    sleeps: bool = False
    """Gives its memory back while the trainer works."""
    in_place: bool = False
    """Reads the weights in the trainer's memory: there is no arena."""

    @property
    def element(self) -> int:
        """Bytes of a number that is not in FP8."""
        return BYTES["fp32" if self.precision == "fp32" else "bf16"]

    @property
    def cache_element(self) -> int:
        """Bytes of a number of the KV cache."""
        return 1 if self.fp8_cache else self.element

    @property
    def per_host(self) -> int:
        """Engines on each host that has some."""
        return -(-self.engines // max(self.nodes, 1))

    def on_gpu(self, gpu: int) -> int:
        """How many engines have a part of theirs on this GPU of the trainer's first host."""
        if self.nodes:
            return 0
        if self.devices is None:
            return self.engines if gpu < self.tp else 0
        share = len(self.devices) // self.engines
        parts = [self.devices[i * share : (i + 1) * share][: self.tp] for i in range(self.engines)]
        return sum(gpu in part for part in parts)


def rank_memory(
    model: Model, layout: Layout, stage: int, settings: TrainerSettings, machine: Machine
) -> RankMemory:
    """Of a rank of one stage."""
    passes, tokens = settings.passes, settings.micro_tokens
    state = state_bytes(
        model, layout, stage,
        precision=passes.precision, distributed=settings.distributed_optimizer,
    )  # fmt: skip
    activations = stage_activations(model, layout, stage, tokens, passes)
    working = working_bytes(model, layout, stage, tokens, passes)
    if stage == layout.pp - 1:
        # The head's backward pass is over before that of the last layer begins.
        head = head_bytes(model, layout, tokens, settings.chunk_tokens, passes)
        working = max(working, head)
    reference = 0
    if settings.reference:
        reference = REFERENCE_PIECE if machine.accelerator else state.weights
    mapped, lost = 0, machine.efficiency.fragmentation * (activations + working)
    if not machine.accelerator:
        # It writes its part of the arena; checkpoints have the precision of the policy.
        touched = model.parameters // layout.world_size + read_elements(model, layout, stage)
        mapped = passes.element * touched
        if layout.tp > 1:
            lost *= HEAP_LOSS
        if settings.distributed_optimizer:
            lost += state.gradients  # gloo scatters the sums out of a copy
    away = state.total if settings.offloads else 0
    return RankMemory(
        stage=stage, weights=state.weights,
        fp8_copies=weight_copies(model, layout, stage, passes.fp8),
        gradients=state.gradients, optimizer=state.optimizer,
        activations=int(activations), working=int(working), reference=reference, mapped=mapped,
        overhead=int(machine.efficiency.rank_memory + lost),
        leaves=int(activations + working + lost) + away,
    )  # fmt: skip


def engine_memory(model: Model, settings: EngineSettings, machine: Machine) -> EngineMemory:
    """Of one GPU of an engine, cut by tensor parallelism alone."""
    weights = model.checkpoint_bytes[settings.precision] // settings.tp
    per_token = model.kv_bytes(settings.tp, settings.cache_element)
    if settings.cache_bytes is not None:
        cache, claimed = settings.cache_bytes, weights + settings.cache_bytes
    else:
        claimed = int(settings.utilization * machine.memory)
        # vLLM takes its own working memory off first.
        cache = max(claimed - weights - int(0.05 * machine.memory), 0)
    return EngineMemory(
        ranks=settings.tp, weights=weights, cache=cache, cache_tokens=int(cache / per_token),
        claimed=claimed, receiver=_receiver_bytes(machine) if settings.nodes else 0,
    )  # fmt: skip


def _receiver_bytes(machine: Machine) -> int:
    """Of one GPU of an engine node: each has a process of its own, if as many ranks send."""
    if not machine.accelerator:
        return 0  # its host's memory has room for buckets
    return machine.efficiency.receiver_memory + SENDERS_AT_A_TIME * BUCKET_BYTES


def host_memory(
    model: Model, layout: Layout, settings: TrainerSettings, engine: EngineSettings,
    machine: Machine, *, batch_tokens: int, routes: bool,
) -> tuple[HostMemory, ...]:  # fmt: skip
    """Of the host with rank 0; of another with engines, if they have nodes of their own.

    Args:
        batch_tokens: prompts and responses of a step.
        routes: the routes of every token are kept.
    """
    ranks = min(layout.world_size, machine.gpus_per_node)
    states = [
        state_bytes(
            model, layout, stage,
            precision=settings.passes.precision, distributed=settings.distributed_optimizer,
        )
        for stage in range(layout.pp)
    ]  # fmt: skip
    weights = max(state.weights for state in states)
    kept = max(state.weights + state.optimizer for state in states) if settings.offloads else 0
    route_bytes = 2 * len(model.decoder.moe_layers) * model.top_k if routes else 0
    held = machine.accelerator and settings.reference  # else it is counted with the rank
    process = HOST_PROCESS if machine.accelerator else 0
    arena = model.checkpoint_bytes[engine.precision]
    workers = process * min(engine.tp * engine.per_host, machine.gpus_per_node)
    trainer = HostMemory(
        name="the first node", arena=0 if engine.in_place else arena,
        reference=weights * ranks if held else 0, offload=kept * ranks,
        checkpoint=max(state.written for state in states) * ranks,
        batch=batch_tokens * (TOKEN_RECORD * ranks + ROUTE_COPIES * route_bytes),
        processes=process * ranks + workers,
    )  # fmt: skip
    if not engine.nodes:
        return (trainer,)
    trainer = replace(trainer, arena=0, processes=process * ranks)
    apart = HostMemory(
        name="a node of engines",
        arena=arena,
        reference=0,
        offload=0,
        checkpoint=0,
        batch=0,
        processes=process * machine.receivers + workers,
    )
    return trainer, apart
