"""Which layers and how many ranks: the parallel axes, and what a pipeline stage holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_cpgd.config.schema import ParallelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What one virtual stage of a rank holds."""

    layers: range
    embedding: bool
    head: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the parallel axes."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = True
    first_layers: int | None = None
    """Layers of the first stage, where the stages are uneven."""
    last_layers: int | None = None
    """The same of the last stage."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters, experts aside."""
        return self.dp * self.cp

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.tp * self.cp * self.dp // (self.ep * self.etp)

    @property
    def sequence_shards(self) -> int:
        """Parts that norms and residuals are cut into over the tensor-parallel ranks."""
        return self.tp if self.sequence_parallel else 1

    def stage(self, stage: int, layers: int) -> list[Chunk]:
        """The chunks of one pipeline stage, in the order of its virtual stages.

        Megatron gives virtual stage v of pipeline stage p the block v * pp + p of equal blocks.
        """
        if self.first_layers is not None or self.last_layers is not None:
            blocks = [_uneven(stage, layers, self)]
        else:
            size = layers // (self.pp * self.vpp)
            starts = [(v * self.pp + stage) * size for v in range(self.vpp)]
            blocks = [range(start, start + size) for start in starts]
        last = self.pp - 1
        return [
            Chunk(
                layers=block,
                embedding=stage == 0 and v == 0,
                head=stage == last and v == len(blocks) - 1,
            )
            for v, block in enumerate(blocks)
        ]

    def in_flight(self, stage: int) -> float:
        """Micro-batches whose activations a stage keeps, in units of all its chunks.

        1F1B: pp - stage. Interleaved, warm-up of (vpp - 1) * pp + 2 * (pp - stage - 1) chunk passes
        and one more (arXiv:2104.04473, 2.2; megatron/core/pipeline_parallel/schedules.py).
        """
        if self.vpp == 1:
            return self.pp - stage
        passes = (self.vpp - 1) * self.pp + 2 * (self.pp - stage - 1) + 1
        return min(passes, self.vpp * self.pp) / self.vpp


def layout_of(parallel: ParallelConfig, megatron: Mapping[str, Any]) -> Layout:
    """The layout of a configuration; `megatron` is `model.megatron`."""
    return Layout(
        tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, cp=parallel.cp, dp=parallel.dp,
        ep=parallel.ep, etp=parallel.etp,
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        first_layers=megatron.get("num_layers_in_first_pipeline_stage"),
        last_layers=megatron.get("num_layers_in_last_pipeline_stage"),
    )  # fmt: skip


def _uneven(stage: int, layers: int, layout: Layout) -> range:
    """Stages of equal size between a first and a last one of their own sizes."""
    ends = (layout.first_layers is not None) + (layout.last_layers is not None)
    rest = layers - (layout.first_layers or 0) - (layout.last_layers or 0)
    middle = rest // max(layout.pp - ends, 1)
    first = middle if layout.first_layers is None else layout.first_layers
    starts = [0, *(first + i * middle for i in range(layout.pp - 1)), layers]
    return range(starts[stage], starts[stage + 1])
