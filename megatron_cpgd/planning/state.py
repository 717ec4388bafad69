"""Weights, gradients and optimizer state of a rank: the buffers that Megatron allocates.

`policy/optimizer.py` builds Megatron's DDP with fp32 gradients and Adam. With the distributed
optimizer parameters and gradients of a chunk lie in one buffer each, in which every parameter
starts at a multiple of 64 elements and whose length is a multiple of 128 and of the replicas that
share it (megatron/core/optimizer/param_layout.py); each replica owns an equal part. Experts have
buffers of their own, shared by fewer replicas.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from megatron_cpgd.planning.layout import Chunk, Layout
from megatron_cpgd.planning.model import Model, Parameter
from megatron_cpgd.weights.placement import padded_vocab_size

PARAMETER_START, BUFFER_UNIT = 64, 128
BYTES = {"bf16": 2, "fp32": 4}

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBytes:
    """What a rank holds as long as it lives."""

    weights: int
    gradients: int
    optimizer: int
    written: int
    """Its part of a checkpoint, on the host while it is saved: replicas write equal parts."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@dataclass(slots=True)
class _Elements:
    """Of the tensors in one buffer."""

    exact: int = 0
    aligned: int = 0

    def add(self, elements: int, count: int = 1) -> None:
        self.exact += elements * count
        self.aligned += _round_up(elements, PARAMETER_START) * count


def state_bytes(
    model: Model, layout: Layout, stage: int, *, precision: Precision, distributed: bool
) -> StateBytes:
    """Of a rank of one pipeline stage.

    The optimizer state is that of the rank whose part has the most of it; exact if all parameters
    have multiples of 64 elements, as those of released models do, else an upper bound.
    """
    weights = gradients = optimizer = written = 0
    # fp32 weights are their own main copy; Adam has two moments.
    state = 8 + (4 if precision == "bf16" else 0)
    for chunk in layout.stage(stage, model.decoder.layers):
        dense, experts, fixed = _chunk_elements(model, layout, chunk)
        weights += 4 * fixed
        for elements, replicas in ((dense, layout.replicas), (experts, layout.expert_replicas)):
            size = elements.exact
            if distributed:
                size = _round_up(elements.aligned, math.lcm(BUFFER_UNIT, replicas))
            weights += BYTES[precision] * size
            gradients += 4 * size
            optimizer += state * min(size // replicas if distributed else size, elements.exact)
            # The weights, an fp32 copy even of fp32 weights, and two moments.
            written += (BYTES[precision] + 12) * (size // replicas)
    return StateBytes(weights=weights, gradients=gradients, optimizer=optimizer, written=written)


def stage_elements(model: Model, layout: Layout, stage: int) -> tuple[int, int]:
    """Trained elements of a rank of one stage: (dense, of experts)."""
    dense, experts = 0, 0
    for chunk in layout.stage(stage, model.decoder.layers):
        own, of_experts, _ = _chunk_elements(model, layout, chunk)
        dense, experts = dense + own.exact, experts + of_experts.exact
    return dense, experts


def read_elements(model: Model, layout: Layout, stage: int) -> int:
    """Elements in pages of a checkpoint that a rank of one stage reads: its own, and where columns
    are cut those of the whole matrix."""
    total = 0
    for chunk in layout.stage(stage, model.decoder.layers):
        dense, experts, _ = _chunk_elements(model, layout, chunk)
        total += dense.exact + experts.exact
        for layer in chunk.layers:
            for parameter, count in model.layers[layer].items():
                if parameter.split == "columns":
                    held = count // layout.ep if parameter.expert else count
                    total += held * (parameter.elements - local_elements(parameter, layout))
    return total


def _chunk_elements(model: Model, layout: Layout, chunk: Chunk) -> tuple[_Elements, _Elements, int]:
    """(dense, experts, elements of fp32 buffers) of one rank's chunk."""
    dense, experts, fixed = _Elements(), _Elements(), 0
    counts: Counter[int] = Counter(id(model.layers[i]) for i in chunk.layers)
    layers = {id(model.layers[i]): model.layers[i] for i in chunk.layers}
    for key, times in counts.items():
        for parameter, count in layers[key].items():
            local = local_elements(parameter, layout)
            if not parameter.trained:
                fixed += local * count * times
            elif parameter.expert:
                experts.add(local, count // layout.ep * times)
            else:
                dense.add(local, count * times)
    decoder = model.decoder
    matrix = padded_vocab_size(decoder.vocab, layout.tp) // layout.tp * decoder.hidden
    if chunk.embedding:
        dense.add(matrix)
    if chunk.head:
        dense.add(decoder.hidden)  # the final norm
        # A tied head shares the embedding's storage, unless that is on another rank.
        if not decoder.tied or not chunk.embedding:
            dense.add(matrix)
    return dense, experts, fixed


def local_elements(parameter: Parameter, layout: Layout) -> int:
    """Of one parameter on a rank that has it."""
    if parameter.split == "replicated":
        return parameter.elements
    return parameter.elements // (layout.etp if parameter.expert else layout.tp)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
