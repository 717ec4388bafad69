"""This rank's weights against the weight table: load from, and write to, full HF tensors."""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_cpgd.policy import device
from megatron_cpgd.policy.block_factors import block_factors, quantized_pieces
from megatron_cpgd.policy.delivery import RankChannel, receiver_of, senders_to
from megatron_cpgd.policy.parallel import ParallelInfo
from megatron_cpgd.weights.bucket_stream import end_buckets, receive_pieces, send_buckets
from megatron_cpgd.weights.buckets import Piece, iter_buckets
from megatron_cpgd.weights.engine_format import EngineFormat, engine_tensors
from megatron_cpgd.weights.fingerprint import Fingerprints
from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
from megatron_cpgd.weights.table import Entry, WeightTable, export_pieces, import_tensor
from megatron_cpgd.weights.tally import Tally
from megatron_cpgd.weights.tiling import Index

_EXPERT = re.compile(r"(\.local_experts\.|\.experts\.linear_fc[12]\.(?:weight|bias))(\d+)")
"""What comes before the index of an expert: one module per expert, or one grouped module."""


def iter_weights(chunks: list[Any], info: ParallelInfo) -> Iterator[tuple[str, Tensor]]:
    """(name with the global layer and expert index, parameter or persistent buffer) of this rank.

    Args:
        chunks: GPTModel chunks.
    """
    for chunk in chunks:
        layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        first_expert = (chunk.config.num_moe_experts or 0) // info.ep_size * info.ep_rank

        def global_expert(found: re.Match[str], first_expert: int = first_expert) -> str:
            return f"{found[1]}{int(found[2]) + first_expert}"

        for name, tensor in [*chunk.named_parameters(), *_persistent_buffers(chunk)]:
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(layers[int(parts[2])])
            yield _EXPERT.sub(global_expert, ".".join(parts)), tensor


@torch.no_grad()
def import_shard(
    entry: Entry, local: Tensor, read: Callable[[str, Index], Tensor], info: ParallelInfo
) -> None:
    """Fill this rank's shard of one tensor; `read` as for `import_tensor`."""
    import_tensor(entry, local, read, **_cut(entry, info))


def load_hf_weights(
    chunks: list[Any], table: WeightTable, checkpoint: HfCheckpoint, info: ParallelInfo
) -> None:
    """Fill every weight with its slices of the checkpoint. A rank reads what it holds."""
    for name, tensor in iter_weights(chunks, info):
        import_shard(table.entry(name), tensor, checkpoint.read, info)


class Shards:
    """This rank's shards as parts of full HF tensors."""

    def __init__(self, chunks: list[Any], table: WeightTable, info: ParallelInfo) -> None:
        """
        Args:
            chunks: GPTModel chunks.
        """
        self._chunks, self._table, self._info = chunks, table, info

    @torch.no_grad()
    def write(self, view: Callable[[str], Tensor] | None) -> None:
        """Write the model into the full HF tensors that `view` maps by name. Collective over the
        world.

        Ranks write disjoint parts; those that hold the same shard take turns. Ranks on other hosts
        than rank 0 write only what no rank beside it holds: they send it there. On return every
        rank has written, and the count of elements proves that each tensor was written once and
        whole.

        Args:
            view: None on ranks that do not share rank 0's host.

        Raises:
            ConversionError: on every rank, naming the tensors that were not.
        """
        tally = Tally(engine_tensors(self._table, "bf16"), device.current())
        self._write(self._own_pieces(), tally, view)

    @torch.no_grad()
    def write_for_engine(
        self, view: Callable[[str], Tensor] | None, format: EngineFormat
    ) -> Fingerprints:
        """The same into the tensors that an engine loads; returns the sums of what the ranks hold,
        in its format."""
        tally = Tally(engine_tensors(self._table, format), device.current())
        pieces = self._engine_cast(format)(self._own_pieces())
        self._write(tally.summed(pieces), tally, view)
        return tally.fingerprints

    def iter_pieces(self, *, experts: bool | None = None) -> Iterator[Piece]:
        """Every part of a full HF tensor that this rank holds, as a view of its weight.

        Other ranks may hold the same parts.

        Args:
            experts: only those of experts, or only the others.
        """
        for name, tensor in self._weights():
            entry = self._table.entry(name)
            if experts is None or entry.expert == experts:
                yield from self._pieces(entry, tensor.detach())

    def engine_pieces(self, format: EngineFormat) -> dict[bool, Iterable[Piece]]:
        """Every part of the tensors of experts (True), and of the others, that this rank holds, as
        an engine takes them. Collective over the ranks that share tensors."""
        cast = self._engine_cast(format)
        return {experts: cast(self.iter_pieces(experts=experts)) for experts in (False, True)}

    def count_elements(self) -> dict[bool, int]:
        """Of the parts that this rank holds of the tensors of experts (True), and of the others."""
        return {
            experts: sum(values.numel() for _, _, values in self.iter_pieces(experts=experts))
            for experts in (False, True)
        }

    def engine_nodes_served(self, nodes: int) -> dict[bool, range]:
        """The engine nodes to which this rank sends its weights: those of experts (True), the
        others.

        Of k replicas of the dense layers, number i serves the nodes i, i + k ...; of the experts,
        which have replicas of their own, likewise. So every node gets the whole model, and no rank
        sends another one's part.
        """
        held = {self._table.entry(name).expert for name, _ in self._weights()}
        replicas = {experts: _replicas(experts=experts) for experts in sorted(held)}
        return {
            experts: range(ranks.index(self._info.rank), nodes, len(ranks))
            for experts, ranks in replicas.items()
        }

    def _write(
        self, pieces: Iterable[Piece], tally: Tally, view: Callable[[str], Tensor] | None
    ) -> None:
        if view is None:
            channel = RankChannel(receiver_of(self._info))
            send_buckets([channel], iter_buckets(pieces))
            end_buckets(channel)
        else:
            senders = senders_to(self._info)
            received = (receive_pieces(RankChannel(sender)) for sender in senders)
            for name, place, values in chain(pieces, *received):
                view(name)[place].copy_(values)
                tally.wrote(name, values)
        dist.all_reduce(tally.counts)
        tally.check()

    def _engine_cast(self, format: EngineFormat) -> Callable[[Iterable[Piece]], Iterable[Piece]]:
        """What makes pieces of this rank those that an engine takes; collective as above."""
        weights = ((self._table.entry(name), tensor) for name, tensor in self._weights())
        held = ((entry, self._pieces(entry, tensor.detach())) for entry, tensor in weights)
        factors = block_factors(held, self._table) if format == "fp8_block" else {}
        tensors = engine_tensors(self._table, format)

        def cast(pieces: Iterable[Piece]) -> Iterator[Piece]:
            for name, place, values in quantized_pieces(pieces, factors):
                yield name, place, values.to(tensors[name][0])

        return cast

    def _own_pieces(self) -> Iterator[Piece]:
        """Those that it is this rank's turn to write, among the ranks that hold the same shard."""
        turns = {
            experts: _turn(_replicas(experts=experts), self._info) for experts in (False, True)
        }
        for i, (name, tensor) in enumerate(self._weights()):
            entry = self._table.entry(name)
            mine, writers = turns[entry.expert]
            if i % writers == mine:
                yield from self._pieces(entry, tensor)

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        return iter_weights(self._chunks, self._info)

    def _pieces(self, entry: Entry, tensor: Tensor) -> Iterator[Piece]:
        return export_pieces(entry, tensor, **_cut(entry, self._info))


def _replicas(*, experts: bool) -> list[int]:
    """The ranks that hold the same shards as this one, of experts or of all else."""
    if experts:
        group = parallel_state.get_expert_data_parallel_group()
    else:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return dist.get_process_group_ranks(group)


def _turn(ranks: list[int], info: ParallelInfo) -> tuple[int | None, int]:
    """This rank's place among those that write their common shard, and how many they are."""
    writers = [rank for rank in ranks if info.hosts[rank] == info.hosts[0]] or ranks
    return writers.index(info.rank) if info.rank in writers else None, len(writers)


def _persistent_buffers(chunk: Any) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to the model's state."""
    for prefix, module in chunk.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer


def _cut(entry: Entry, info: ParallelInfo) -> dict[str, int]:
    """This rank's place among those that share the tensor."""
    if entry.expert:
        return {"tp_rank": info.etp_rank, "tp_size": info.etp_size}
    return {"tp_rank": info.tp_rank, "tp_size": info.tp_size}
