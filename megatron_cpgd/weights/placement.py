"""Which tensors, cut how, each rank of a layout holds: from the weight table alone."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_cpgd.config.schema import ParallelConfig
from megatron_cpgd.errors import ConversionError
from megatron_cpgd.weights.decoder import Decoder
from megatron_cpgd.weights.decoder_table import decoder_table
from megatron_cpgd.weights.table import Entry, boxes, raise_problems
from megatron_cpgd.weights.tiling import Index, fills

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this, the same for every TP size that divides it, so
that a checkpoint loads under any layout."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rank on the axes that cut weights.

    Two grids lie over the ranks of a stage: tp, cp, dp for most tensors, etp, ep, replicas for the
    experts, the first axis the fastest in both. Stages are the slowest axis.
    """

    stage: int
    tp: int
    replica: int
    """Index among the ranks that hold the same tensors, experts aside."""
    ep: int
    etp: int
    expert_replica: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a tensor."""

    entry: Entry
    shape: tuple[int, ...]
    rank: int
    """Among the `size` ranks that share the tensor."""
    size: int
    replica: int
    """Index among the ranks that hold this very part."""


class Placement:
    """A model under a layout."""

    def __init__(self, model: Decoder, sizes: ParallelConfig, *, padded_vocab: int) -> None:
        """
        Args:
            padded_vocab: rows of Megatron's embedding over all tensor-parallel ranks.
        """
        self.table = decoder_table(model)
        blocks = layer_blocks(sizes.pp * sizes.vpp, model.layers, sizes.stage_layers)
        self._stage_of_layer = [i % sizes.pp for i, block in enumerate(blocks) for _ in block]
        self._sizes = sizes
        self._padded_vocab = padded_vocab
        self._shared: dict[int, list[Entry]] = defaultdict(list)
        self._experts: dict[tuple[int, int], list[Entry]] = defaultdict(list)
        """By stage, and expert-parallel rank."""
        local_experts = model.experts.count // sizes.ep if model.experts else 0
        for entry in self.table.entries:
            stage = self._stage(entry)
            if expert := _EXPERT.search(entry.name):
                self._experts[stage, int(expert[1]) // local_experts].append(entry)
            elif not entry.alias or sizes.pp > 1:  # on one stage the head is the embedding itself
                self._shared[stage].append(entry)

    def place(self, rank: int) -> Place:
        """Where a rank stands."""
        sizes = self._sizes
        stage, within = divmod(rank, sizes.tp * sizes.cp * sizes.dp)
        replica, tp = divmod(within, sizes.tp)
        group, etp = divmod(within, sizes.etp)
        expert_replica, ep = divmod(group, sizes.ep)
        return Place(
            stage=stage, tp=tp, replica=replica, ep=ep, etp=etp, expert_replica=expert_replica
        )

    def distinct_ranks(self) -> list[int]:
        """Those that together hold all there is, and no two of them the same."""
        places = ((rank, self.place(rank)) for rank in range(self._sizes.world_size))
        return [rank for rank, at in places if at.replica == 0 or at.expert_replica == 0]

    def shards(self, rank: int) -> Iterator[Shard]:
        """What a rank holds.

        Raises:
            ConversionError: a tensor cannot be cut into so many equal parts.
        """
        at, sizes = self.place(rank), self._sizes
        for entry in self._shared[at.stage]:
            yield Shard(entry, self._cut(entry, sizes.tp), at.tp, sizes.tp, at.replica)
        for entry in self._experts[at.stage, at.ep]:
            shape = self._cut(entry, sizes.etp)
            yield Shard(entry, shape, at.etp, sizes.etp, at.expert_replica)

    def check(self) -> None:
        """Prove that each element of each Hugging Face tensor is on one rank, replicas aside.

        Raises:
            ConversionError: names the tensors that are not.
        """
        parts: dict[str, list[Index]] = {name: [] for name in self.table.hf_shapes}
        for rank in self.distinct_ranks():
            for shard in self.shards(rank):
                entry = shard.entry
                repeated = entry.split == "replicated" and shard.rank > 0
                if entry.alias or shard.replica or repeated:
                    continue
                cut = boxes(entry, tp_rank=shard.rank, tp_size=shard.size, local_shape=shard.shape)
                for box in cut:
                    parts[box.hf].append(box.hf_index)
        wrong = [
            f"{name}: {len(parts[name])} parts do not make up {list(shape)}"
            for name, shape in self.table.hf_shapes.items()
            if not fills(parts[name], shape)
        ]
        raise_problems("the ranks do not hold every element once", wrong)

    def _stage(self, entry: Entry) -> int:
        if layer := _LAYER.match(entry.name):
            return self._stage_of_layer[int(layer[1])]
        return 0 if entry.name.startswith("embedding.") else self._sizes.pp - 1

    def _cut(self, entry: Entry, size: int) -> tuple[int, ...]:
        shape = list(entry.shape)
        if entry.padded:
            shape[0] = self._padded_vocab
        if entry.split != "replicated":
            axis = ("rows", "columns").index(entry.split)
            if shape[axis] % (size * entry.stride):
                raise ConversionError(
                    f"{entry.name}: {size} ranks cannot share the {entry.split} of {shape} "
                    "equally; change parallel.tp, or etp for an expert"
                )
            shape[axis] //= size
        return tuple(shape)


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of Megatron's embedding over all TP ranks."""
    multiple = math.lcm(VOCAB_MULTIPLE, tp_size)
    return -(-vocab_size // multiple) * multiple


def layer_blocks(stages: int, layers: int, counts: Sequence[int] | None = None) -> list[range]:
    """The layers of each of the pp * vpp stages; stage v * pp + p is virtual stage v of rank p.

    Args:
        counts: layers of each stage; None: equally many.
    """
    counts = counts or [layers // stages] * stages
    assert sum(counts) == layers and len(counts) == stages, f"{counts=} {layers=} {stages=}"
    return [range(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True)]
