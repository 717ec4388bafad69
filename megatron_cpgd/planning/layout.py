"""Which layers and how many ranks: the parallel axes, and what a pipeline stage holds."""

from dataclasses import dataclass

from megatron_cpgd.config.schema import ParallelConfig
from megatron_cpgd.weights.placement import layer_blocks


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
    stage_layers: tuple[int, ...] | None = None
    """Layers of each of the pp * vpp stages; None: equally many."""

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

        Megatron gives virtual stage v of pipeline stage p the block v * pp + p of the layers.
        """
        blocks = layer_blocks(self.pp * self.vpp, layers, self.stage_layers)[stage :: self.pp]
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


def layout_of(parallel: ParallelConfig) -> Layout:
    """The layout of a configuration."""
    return Layout(
        tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, cp=parallel.cp, dp=parallel.dp,
        ep=parallel.ep, etp=parallel.etp,
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        stage_layers=tuple(parallel.stage_layers) if parallel.stage_layers else None,
    )  # fmt: skip
