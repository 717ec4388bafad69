"""Seconds of one pass of the trainer over a batch: forward, or forward and backward.

Compute is FLOPs over the share of the peak that `Efficiency` assumes; a collective is its bytes
over the share of the link. Nothing overlaps: our settings overlap nothing either, but the key-value
exchange of context parallelism.
"""

import math
from dataclasses import dataclass, replace

from megatron_cpgd.planning.activations import Passes, expert_imbalance, layer_bytes
from megatron_cpgd.planning.layout import Layout
from megatron_cpgd.planning.machine import Machine
from megatron_cpgd.planning.model import Model
from megatron_cpgd.planning.state import stage_elements

EXPERT_LAUNCH = 3.0
"""Launching a layer with experts (routing, sorting, exchanges) over launching a dense one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Tokens that one pass sees."""

    tokens: float
    """Of all data-parallel ranks."""
    length: float
    """Mean of a sequence."""
    micro_tokens: int
    """Bound of a micro-batch of one data-parallel rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSeconds:
    """Of one pass, on the slowest pipeline stage."""

    compute: float = 0.0
    """Matrix products and attention."""
    elementwise: float = 0.0
    """Everything else that touches activations: norms, rotations, softmax."""
    launch: float = 0.0
    """Of kernels, where there is little to compute."""
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0
    expert_parallel: float = 0.0
    pipeline: float = 0.0
    """Sending activations to the next stage."""
    bubble: float = 0.0
    """Waiting for the other stages."""
    data_parallel: float = 0.0
    """Gradients and updated weights over the replicas."""
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        return (
            self.compute + self.elementwise + self.launch + self.tensor_parallel
            + self.context_parallel + self.expert_parallel + self.pipeline + self.bubble
            + self.data_parallel + self.optimizer
        )  # fmt: skip


def micro_batches(layout: Layout, batch: Batch) -> int:
    """Micro-batches of a data-parallel rank, as `data/plan.py` would make them."""
    count = max(math.ceil(batch.tokens / layout.dp / batch.micro_tokens), 1)
    unit = layout.pp if layout.vpp > 1 else 1
    return -(-count // unit) * unit


def pass_seconds(
    model: Model, layout: Layout, machine: Machine, passes: Passes, batch: Batch, *, backward: bool
) -> PassSeconds:
    """One pass over a batch, without the optimizer's work; that is `update_seconds`."""
    count = micro_batches(layout, batch)
    tokens = batch.tokens / layout.dp / count
    stages = [
        _micro_batch(model, layout, stage, machine, passes, tokens, batch.length, backward=backward)
        for stage in range(layout.pp)
    ]
    slowest = max(stages, key=lambda parts: sum(parts.values()))
    factor = machine.efficiency.train_factor
    total = sum(slowest.values()) * factor
    # Filling and draining: pp - 1 micro-batches, of which vpp chunks hide a part
    # (arXiv:2104.04473, 2.2).
    bubble = (layout.pp - 1) / layout.vpp * total
    return PassSeconds(
        **{name: seconds * count * factor for name, seconds in slowest.items()}, bubble=bubble
    )


def update_seconds(model: Model, layout: Layout, machine: Machine, passes: Passes) -> PassSeconds:
    """One optimizer step: gradients are summed over the replicas in fp32, each replica updates its
    share and sends the new weights; of the stage with most parameters."""
    factor = machine.efficiency.train_factor
    stages = [stage_elements(model, layout, stage) for stage in range(layout.pp)]
    dense, experts = max(stages, key=sum)
    exchange = 0.0
    for elements, replicas, span in (
        (dense, layout.replicas, layout.tp * layout.replicas),
        (experts, layout.expert_replicas, layout.tp * layout.replicas),
    ):
        if elements:
            payload = elements * (4 + passes.element) * (replicas - 1) / replicas
            exchange += machine.transfer_s(payload, span if replicas > 1 else 1)
    owned = dense / layout.replicas + experts / layout.expert_replicas
    # Adam reads gradient, main weight and two moments, and writes three of them and the weight.
    step = owned * (7 * 4 + passes.element) / (machine.bandwidth * machine.efficiency.bandwidth)
    return PassSeconds(data_parallel=exchange * factor, optimizer=step * factor)


def _micro_batch(
    model: Model, layout: Layout, stage: int, machine: Machine, passes: Passes, tokens: float,
    length: float, *, backward: bool,
) -> dict[str, float]:  # fmt: skip
    """Seconds of one micro-batch on one stage, by the fields of `PassSeconds`."""
    chunks = layout.stage(stage, model.decoder.layers)
    layers = [i for chunk in chunks for i in chunk.layers]
    has_experts = [bool(model.layer_matmuls[i][1]) for i in layers]
    full = backward and passes.recompute == "full"
    # Forward once, backward twice that, and once more what is recomputed.
    work = 1 + (2 + full if backward else 0)
    head = any(chunk.head for chunk in chunks)
    efficiency = machine.efficiency
    launch = efficiency.layer_s * (len(layers) + (EXPERT_LAUNCH - 1) * sum(has_experts))
    return {
        "compute": _compute_s(
            model, layout, layers, machine, passes, tokens, length,
            work=work, attention=work + (backward and passes.recompute == "selective"),
            head=(3 if backward else 1) if head else 0,
        ),
        "elementwise": _elementwise_s(model, layout, layers, machine, passes, tokens, head=head)
        * work / 3,
        "launch": launch * work / 3,
        "tensor_parallel": _tensor_parallel_s(
            model, layout, machine, passes, tokens, has_experts, backward=backward, full=full
        ),
        "context_parallel": _context_parallel_s(
            model, layout, machine, passes, tokens, len(layers), work
        ),
        "expert_parallel": _expert_parallel_s(
            model, layout, machine, passes, tokens, sum(has_experts), exchanges=2 * (
                1 + backward + full
            ),
        ),
        "pipeline": _pipeline_s(model, layout, machine, passes, tokens, sends=1 + backward),
    }  # fmt: skip


def _compute_s(
    model: Model, layout: Layout, layers: list[int], machine: Machine, passes: Passes,
    tokens: float, length: float, *, work: float, attention: float, head: float,
) -> float:  # fmt: skip
    """2 FLOPs per token and matrix element, attention as in `Model.forward_flops`, all cut over the
    tensor- and context-parallel ranks. Attention and head are never in FP8; a router, which is not
    either, counts as if it were."""
    ranks, efficiency = layout.tp * layout.cp, machine.efficiency
    plain = machine.product_rate(passes.precision)
    low = machine.product_rate(passes.precision, passes.fp8.format) if passes.fp8 else plain
    seconds = attention * len(layers) * model.attention_width * length / efficiency.dense / plain
    seconds += 2 * head * model.vocab_matrix / efficiency.dense / plain
    for layer in layers:
        dense, experts = model.layer_matmuls[layer]
        covered = passes.fp8 is not None and passes.fp8.covers(layer, model.decoder.layers)
        rate = low if covered else plain
        seconds += 2 * work * dense / efficiency.dense / rate
        seconds += 2 * work * experts * expert_imbalance(layout) / efficiency.experts / rate
    return tokens / ranks * seconds


def _elementwise_s(
    model: Model, layout: Layout, layers: list[int], machine: Machine, passes: Passes,
    tokens: float, *, head: bool,
) -> float:  # fmt: skip
    """Forward and backward, bound by memory: what is saved stands for what is moved, and fp32
    logits for the steps of the log-probs. FP8 saves less but moves as much; its casts count with
    the products."""
    passes = replace(passes, fp8=None)
    saved = sum(layer_bytes(model, layout, layer, passes) for layer in layers)
    if head:
        saved += 4 * model.decoder.vocab / layout.tp
    rate = machine.bandwidth * machine.efficiency.bandwidth / machine.efficiency.moves
    return tokens / layout.cp * saved / rate


def _tensor_parallel_s(
    model: Model, layout: Layout, machine: Machine, passes: Passes, tokens: float,
    has_experts: list[bool], *, backward: bool, full: bool,
) -> float:  # fmt: skip
    """Gathers and scatters of hidden states: 2 around attention and 2 around a dense MLP; the
    backward pass makes them again and gathers the inputs of both products once more. Without
    sequence parallelism an all-reduce has the bytes of a gather and a scatter."""
    blocks = sum(1 if experts else 2 for experts in has_experts)
    exchanges = blocks * (2 * (1 + full) + (3 if backward else 0))
    hidden = tokens / layout.cp * model.decoder.hidden * passes.element
    payload = hidden * (layout.tp - 1) / layout.tp
    return exchanges * machine.transfer_s(payload, layout.tp)


def _context_parallel_s(
    model: Model, layout: Layout, machine: Machine, passes: Passes, tokens: float, layers: int,
    work: float,
) -> float:  # fmt: skip
    """Every rank sees the keys and values of the others, in each pass over the attention."""
    if layout.cp == 1:
        return 0.0
    decoder = model.decoder
    width = 2 * decoder.kv_heads * decoder.head_dim
    if decoder.latent is not None:
        width = model.attention_width
    payload = tokens / layout.cp * (layout.cp - 1) * width / layout.tp * passes.element
    return layers * work * machine.transfer_s(payload, layout.tp * layout.cp)


def _expert_parallel_s(
    model: Model, layout: Layout, machine: Machine, passes: Passes, tokens: float, layers: int, *,
    exchanges: int,
) -> float:  # fmt: skip
    """All-to-all to the experts and back: a copy of the token for each of its experts."""
    group = layout.ep * layout.etp
    copies = tokens / layout.cp / layout.sequence_shards * model.top_k * expert_imbalance(layout)
    payload = copies * model.decoder.hidden * passes.element * (group - 1) / group
    return layers * exchanges * machine.transfer_s(payload, group)


def _pipeline_s(
    model: Model, layout: Layout, machine: Machine, passes: Passes, tokens: float, *, sends: int
) -> float:
    if layout.pp == 1:
        return 0.0
    payload = tokens / layout.cp / layout.sequence_shards * model.decoder.hidden * passes.element
    # Stages are world / pp ranks apart.
    span = min(layout.tp * layout.cp * layout.dp + 1, layout.world_size)
    return layout.vpp * sends * machine.transfer_s(payload, span)
