"""The map between Megatron tensors and Hugging Face tensors, as data that is read both ways.

A global (unsharded) Megatron tensor is a list of row ranges of HF tensors. The shard of one
tensor-parallel rank cuts these ranges into boxes; loading copies each box from the HF tensor to the
shard, export copies the same box back, so the two directions are inverse by construction.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from megatron_cpgd.errors import ConversionError
from megatron_cpgd.weights.buckets import Piece
from megatron_cpgd.weights.tiling import Index, tiles

Split = Literal["rows", "columns", "replicated"]


@dataclass(frozen=True, slots=True)
class Segment:
    """`rows` full rows of an HF tensor that are rows of the global Megatron tensor."""

    hf: str
    hf_row: int
    rows: int
    megatron_row: int
    step: int = 1
    """From one row to the next in the HF tensor."""
    expert: int | None = None
    """The HF tensor holds the matrices of all experts, transposed: [experts, columns, rows]."""


@dataclass(frozen=True, slots=True)
class Box:
    """Numbers that an HF tensor and the local shard share: [rows] or [rows, columns] of each."""

    hf: str
    hf_index: Index
    local_index: Index
    transposed: bool = False
    """The HF tensor has [columns, rows]."""

    def oriented(self, part: Tensor) -> Tensor:
        """A view of what `hf_index` selects, as Megatron has it."""
        return part.t() if self.transposed else part


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One Megatron parameter or persistent buffer."""

    names: tuple[str, ...]
    """Its spellings with global layer and expert index: local layer spec, then Transformer Engine
    spec."""
    shape: tuple[int, ...]
    """Global shape, without vocabulary padding."""
    split: Split
    """What tensor parallelism cuts: of an expert, expert tensor parallelism."""
    segments: tuple[Segment, ...]
    """Tile the rows of the global tensor."""
    stride: int = 1
    """Row blocks that are cut one by one: 2 for a gated MLP, whose rank r holds [gate_r; up_r]."""
    padded: bool = False
    """Megatron may append rows (vocabulary padding) that no HF tensor has."""
    alias: bool = False
    """A second Megatron copy of an HF tensor (tied embeddings): loaded, never exported."""
    fp32: bool = False
    """Float32 whatever the number format of the model."""
    expert: bool = False
    """One of the experts: it exists on the ranks of one expert-parallel share only."""

    @property
    def name(self) -> str:
        """The spelling of the local layer spec."""
        return self.names[0]


@dataclass(frozen=True, slots=True)
class Ignored:
    """Tensors of a checkpoint that the model does not need."""

    pattern: str
    """Regular expression that matches the whole HF name."""
    reason: str
    carried: bool = False
    """A new checkpoint takes them over from its source."""
    copy_of: str | None = None
    """The trained HF tensor that a carried one equals, if it is a copy."""


@dataclass(frozen=True)
class WeightTable:
    """Every parameter of one model, in layer order."""

    entries: tuple[Entry, ...]
    ignored: tuple[Ignored, ...] = ()

    @cached_property
    def _entry_by_name(self) -> dict[str, Entry]:
        return {name: entry for entry in self.entries for name in entry.names}

    @cached_property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every HF tensor by name: embedding, layers, final norm, head unless tied."""
        shapes: dict[str, tuple[int, ...]] = {}
        for entry in self.entries:
            for segment in entry.segments:
                rows = segment.hf_row + (segment.rows - 1) * segment.step + 1
                shape = (rows, *entry.shape[1:])
                if segment.expert is not None:
                    shape = (segment.expert + 1, *reversed(shape))
                seen = shapes.get(segment.hf, shape)
                shapes[segment.hf] = tuple(map(max, shape, seen))
        return shapes

    def hf_tensors(self, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Number format and shape of every HF tensor by name, of a model in `dtype`."""
        fp32 = {entry.segments[0].hf for entry in self.entries if entry.fp32}
        return {
            name: (torch.float32 if name in fp32 else dtype, shape)
            for name, shape in self.hf_shapes.items()
        }

    def entry(self, megatron_name: str) -> Entry:
        """The entry of a parameter, under either spelling.

        Raises:
            ConversionError: the architecture has no such parameter.
        """
        try:
            return self._entry_by_name[megatron_name]
        except KeyError:
            raise ConversionError(
                f"Megatron parameter {megatron_name} has no Hugging Face counterpart in the weight "
                f"table; the table has e.g. {self.entries[0].name}; check model.megatron"
            ) from None

    @property
    def carries(self) -> bool:
        """Whether checkpoints may hold tensors that are taken over from their source."""
        return any(ignored.carried for ignored in self.ignored)

    def find_ignored(self, hf_name: str) -> Ignored | None:
        """Why a tensor of the checkpoint may be left out, or None if it may not."""
        for ignored in self.ignored:
            if re.fullmatch(ignored.pattern, hf_name):
                return ignored
        return None

    def check_tiling(self) -> None:
        """Assert that segments cover each Megatron and each HF tensor once, without gaps."""
        hf_ranges: dict[str, list[range]] = {}
        hf_rows: dict[str, int] = {}
        for entry in self.entries:
            ranges = [range(s.megatron_row, s.megatron_row + s.rows) for s in entry.segments]
            assert tiles(ranges, entry.shape[0]), f"{entry.name}: {ranges} of {entry.shape}"
            for s in () if entry.alias else entry.segments:
                shape = self.hf_shapes[s.hf]
                packed = s.expert is not None
                columns = shape[1:-1][::-1] if packed else shape[1:]
                assert columns == entry.shape[1:], f"{s} of {entry.name}"
                first = s.hf_row + (s.expert or 0) * shape[-1]
                rows = range(first, first + s.rows * s.step, s.step)
                hf_ranges.setdefault(s.hf, []).append(rows)
                hf_rows[s.hf] = shape[0] * shape[-1] if packed else shape[0]
        for name, length in hf_rows.items():
            assert tiles(hf_ranges[name], length), f"{name}: {hf_ranges[name]} of {length}"


def rename(
    names: tuple[str, ...],
    hf: str,
    shape: tuple[int, ...],
    split: Split = "replicated",
    *,
    expert: bool = False,
    fp32: bool = False,
    packed: int | None = None,
) -> Entry:
    """A parameter that equals one HF tensor, or the matrix of expert `packed` in it."""
    segments = (Segment(hf, 0, shape[0], 0, expert=packed),)
    return Entry(names=names, shape=shape, split=split, segments=segments, expert=expert, fp32=fp32)


def vocab(name: str, hf: str, shape: tuple[int, int], *, alias: bool = False) -> Entry:
    """An embedding or output matrix, [vocabulary, hidden], cut and padded along the vocabulary."""
    segments = (Segment(hf, 0, shape[0], 0),)
    return Entry(
        names=(name,), shape=shape, split="rows", segments=segments, padded=True, alias=alias
    )


def qkv(
    name: str,
    hf: str,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    columns: tuple[int, ...],
) -> Entry:
    """Query, key and value projections, interleaved by KV group: [q .. q, k, v] for each group.

    Args:
        hf: name of the HF tensors, with `{}` in place of q, k and v.
        columns: (hidden,) for weights, () for biases.
    """
    # A query group has heads / kv_heads query heads, then one key and one value head.
    sizes = (heads // kv_heads * head_dim, head_dim, head_dim)
    segments = []
    row = 0
    for group in range(kv_heads):
        for tensor, size in zip("qkv", sizes, strict=True):
            segments.append(Segment(hf.format(tensor), group * size, size, row))
            row += size
    return Entry(names=(name,), shape=(row, *columns), split="rows", segments=tuple(segments))


def gated_mlp(
    names: tuple[str, ...],
    gate: str,
    up: str,
    shape: tuple[int, ...],
    *,
    expert: bool = False,
    packed: int | None = None,
) -> Entry:
    """Gate and up projections, [gate; up], cut so that every rank has rows of both.

    Args:
        shape: of each of the two, [intermediate] or [intermediate, hidden].
        packed: `gate` and `up` name one tensor, which has the two of this expert row by row in
            turns.
    """
    rows = shape[0]
    segments = (Segment(gate, 0, rows, 0), Segment(up, 0, rows, rows))
    if packed is not None:
        segments = (
            Segment(gate, 0, rows, 0, step=2, expert=packed),
            Segment(up, 1, rows, rows, step=2, expert=packed),
        )
    return Entry(
        names=names,
        shape=(2 * rows, *shape[1:]),
        split="rows",
        segments=segments,
        stride=2,
        expert=expert,
    )


def boxes(entry: Entry, *, tp_rank: int, tp_size: int, local_shape: tuple[int, ...]) -> list[Box]:
    """What the shard of one tensor-parallel rank shares with the HF tensors.

    Args:
        local_shape: of the shard, including vocabulary padding; padding rows are in no box.

    Raises:
        ConversionError: the shard is not an even cut of the entry's global shape.
    """
    assert 0 <= tp_rank < tp_size, f"{tp_rank=} {tp_size=}"
    _check_local_shape(entry, tp_size, local_shape)
    local_columns = tuple(slice(0, size) for size in local_shape[1:])
    hf_columns: Index = local_columns
    if entry.split == "columns":
        hf_columns = (slice(tp_rank * local_shape[1], (tp_rank + 1) * local_shape[1]),)
    result = []
    for global_row, local_row, rows in _row_blocks(entry, tp_rank, tp_size, local_shape[0]):
        for segment in entry.segments:
            low = max(segment.megatron_row, global_row)
            high = min(segment.megatron_row + segment.rows, global_row + rows)
            if low >= high:
                continue
            hf_row = segment.hf_row + (low - segment.megatron_row) * segment.step
            row = local_row + low - global_row
            hf_rows = slice(hf_row, hf_row + (high - low) * segment.step, segment.step)
            local_index = (slice(row, row + high - low), *local_columns)
            if segment.expert is None:
                result.append(Box(segment.hf, (hf_rows, *hf_columns), local_index))
            else:
                hf_index = (segment.expert, *hf_columns, hf_rows)
                result.append(Box(segment.hf, hf_index, local_index, transposed=True))
    return result


def import_tensor(
    entry: Entry,
    local: Tensor,
    read: Callable[[str, Index], Tensor],
    *,
    tp_rank: int,
    tp_size: int,
) -> None:
    """Fill the shard of one rank in place; vocabulary padding becomes zero.

    Args:
        local: the parameter's data; dtype and device may differ from the checkpoint's.
        read: `HfCheckpoint.read`, or anything that gives a slice of an HF tensor.
    """
    if entry.padded:
        local.zero_()
    for box in boxes(entry, tp_rank=tp_rank, tp_size=tp_size, local_shape=tuple(local.shape)):
        local[box.local_index].copy_(box.oriented(read(box.hf, box.hf_index)))


def export_pieces(entry: Entry, local: Tensor, *, tp_rank: int, tp_size: int) -> Iterator[Piece]:
    """What one rank contributes to the full HF tensors, as views of its shard.

    Over all tensor-parallel ranks of one replica of the parameter every element comes once: aliases
    are skipped, and replicated parameters come from rank 0.
    """
    if entry.alias or (entry.split == "replicated" and tp_rank != 0):
        return
    for box in boxes(entry, tp_rank=tp_rank, tp_size=tp_size, local_shape=tuple(local.shape)):
        yield box.hf, box.hf_index, box.oriented(local[box.local_index])


def raise_problems(where: str, problems: list[str], limit: int = 20) -> None:
    """One ConversionError that lists the problems, if there are any."""
    if not problems:
        return
    lines = problems[:limit]
    if len(problems) > limit:
        lines.append(f"and {len(problems) - limit} more")
    raise ConversionError("\n  ".join([f"{where}: {len(problems)} problem(s)", *lines]))


def _check_local_shape(entry: Entry, tp_size: int, local_shape: tuple[int, ...]) -> None:
    factors = {"rows": (tp_size, 1), "columns": (1, tp_size), "replicated": (1, 1)}[entry.split]
    # A bias has no second dimension, hence no strict zip.
    whole = [size * factor for size, factor in zip(local_shape, factors, strict=False)]
    if entry.padded:
        whole[0] = min(whole[0], entry.shape[0])
    if tuple(whole) != entry.shape or local_shape[0] % entry.stride:
        raise ConversionError(
            f"{entry.name}: a shard {list(local_shape)} of tp={tp_size} cut by {entry.split} does "
            f"not fit the checkpoint's {list(entry.shape)}; check config.json and parallel.tp"
        )


def _row_blocks(
    entry: Entry, tp_rank: int, tp_size: int, local_rows: int
) -> Iterator[tuple[int, int, int]]:
    """(first global row, first local row, rows) of each contiguous block of the shard."""
    if entry.split != "rows":
        yield 0, 0, local_rows
        return
    rows = local_rows // entry.stride
    for block in range(entry.stride):
        yield (block * tp_size + tp_rank) * rows, block * rows, rows
