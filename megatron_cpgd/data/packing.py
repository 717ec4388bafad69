"""Loss sequences to micro-batches and back. Torch only; knows no ranks and no process groups."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_cpgd.data.plan import BatchFormat, round_up
from megatron_cpgd.types import LossSequence, MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchShape:
    """Shape that several micro-batches share."""

    length: int
    """Tokens of a packed batch, or of each row of a padded one."""
    rows: int
    """1 for a packed batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placement:
    """Where sequences lie in a micro-batch, counted in its flattened tokens."""

    shape: tuple[int, int]
    starts: list[int]
    extents: list[int]
    """Tokens of each sequence, padding included; they cover the batch."""


def micro_batch_shape(
    plan: Sequence[Sequence[Sequence[int]]],
    lengths: Sequence[int],
    *,
    format: BatchFormat,
    align: int = 1,
    total_multiple: int = 1,
) -> MicroBatchShape:
    """The smallest shape that fits every micro-batch of a plan, as pipeline parallel needs it.

    Args:
        plan: as `plan_micro_batches` returns it; for the padded format, made with `common_shape`.
        lengths: tokens of each planned sequence.
        align, total_multiple: as for `build_micro_batch`.
    """
    placements = [
        _place([lengths[i] for i in indices], format, align, total_multiple, None, None)
        for rank in plan
        for indices in rank
    ]
    return MicroBatchShape(
        length=max(placement.shape[1] for placement in placements),
        rows=max(placement.shape[0] for placement in placements),
    )


def build_micro_batch(
    sequences: Sequence[LossSequence] | Mapping[int, LossSequence],
    indices: Sequence[int],
    *,
    format: BatchFormat,
    tensor_names: Sequence[str],
    align: int = 1,
    total_multiple: int = 1,
    length: int | None = None,
    rows: int | None = None,
) -> MicroBatch:
    """The micro-batch of `sequences[i] for i in indices`.

    Position p of a sequence predicts its token p + 1, so the T response tokens are the targets of
    positions prompt_length - 1 .. L - 2. Padding holds token 0, continues the positions of its
    sequence and is masked out. No indices give a batch of filling: one token, nothing masked in.

    Args:
        tensor_names: keys of `LossSequence.tensors` to place, each [T] float32.
        align: packed: each sequence is padded to a multiple of this; padded: each row.
        total_multiple: the packed length, or the row length, is also a multiple of this; the last
            packed sequence takes the rest.
        length: exact packed length, or row length; default: the smallest that fits.
        rows: exact number of rows of a padded batch; those too many are filling.
    """
    members = [sequences[i] for i in indices]
    place = _place([s.length for s in members], format, align, total_multiple, length, rows)
    size = place.shape[0] * place.shape[1]
    input_ids = torch.zeros(size, dtype=torch.int64)
    targets = torch.zeros(size, dtype=torch.int64)
    loss_mask = torch.zeros(size, dtype=torch.bool)
    tensors = {name: torch.zeros(size) for name in tensor_names}
    for sequence, start in zip(members, place.starts, strict=False):  # the rest is filling
        input_ids[start : start + sequence.length] = sequence.input_ids
        predicting = slice(start + sequence.prompt_length - 1, start + sequence.length - 1)
        targets[predicting] = sequence.input_ids[sequence.prompt_length :]
        loss_mask[predicting] = True
        for name, values in tensors.items():
            values[predicting] = sequence.tensors[name]
    filling = len(place.starts) - len(members)
    return MicroBatch(
        input_ids=input_ids.view(place.shape),
        targets=targets.view(place.shape),
        loss_mask=loss_mask.view(place.shape),
        position_ids=_restarting_positions(place).view(place.shape),
        tensors={name: values.view(place.shape) for name, values in tensors.items()},
        indices=[*indices, *[-1] * filling],
        lengths=[s.length for s in members] + [1] * filling,
        cu_seqlens=[0, *accumulate(place.extents)] if format == "packed" else None,
    )


def unpack_tokens(values: Tensor, micro_batch: MicroBatch) -> dict[int, Tensor]:
    """Response-token values of each sequence: the inverse of placing `tensors`.

    Args:
        values: [B, S], one value per position, such as the log-prob of its target.

    Returns:
        Index of the sequence in the batch that was packed -> [T]; filling is left out.
    """
    shape = micro_batch.input_ids.shape
    assert values.shape == shape, f"values {tuple(values.shape)} is not {tuple(shape)}"
    flat, mask = values.reshape(-1), micro_batch.loss_mask.reshape(-1).to(values.device)
    spans = zip(micro_batch.indices, _spans(micro_batch), strict=True)
    return {index: flat[own][mask[own]] for index, own in spans if index >= 0}


def input_sequence_index(micro_batch: MicroBatch) -> Tensor:
    """[B, S] int64: the number within the micro-batch of each real token's sequence, else -1."""
    index = torch.full(micro_batch.input_ids.shape, -1)
    spans = zip(micro_batch.indices, _spans(micro_batch), strict=True)
    for number, (i, own) in enumerate(spans):
        if i >= 0:
            index.view(-1)[own] = number
    return index


def sequence_index(micro_batch: MicroBatch) -> Tensor:
    """[B, S] int64: the number within the micro-batch of each response token's sequence, else -1.

    Placed like `loss_mask`, ascending in row-major order.
    """
    return input_sequence_index(micro_batch).masked_fill(~micro_batch.loss_mask, -1)


def token_index(micro_batch: MicroBatch, starts: Sequence[int] | Mapping[int, int]) -> Tensor:
    """[B, S] int64: `starts[i]` + t at token t of sequence i, prompt included; -1 at padding.

    Args:
        starts: by the index of a sequence in the batch that was packed.
    """
    index = torch.full(micro_batch.input_ids.shape, -1)
    for i, own in zip(micro_batch.indices, _spans(micro_batch), strict=True):
        if i >= 0:
            index.view(-1)[own] = torch.arange(starts[i], starts[i] + own.stop - own.start)
    return index


def _spans(micro_batch: MicroBatch) -> list[slice]:
    """The real tokens of each contained sequence in the flattened batch, filling included."""
    shape = micro_batch.input_ids.shape
    if micro_batch.cu_seqlens is None:
        starts = list(range(0, shape.numel(), shape[1]))
    else:
        starts = micro_batch.cu_seqlens[:-1]
    return [
        slice(start, start + length)
        for start, length in zip(starts, micro_batch.lengths, strict=True)
    ]


def _place(
    lengths: Sequence[int],
    format: BatchFormat,
    align: int,
    total_multiple: int,
    length: int | None,
    rows: int | None,
) -> _Placement:
    lengths = lengths or [1]
    unit = math.lcm(align, total_multiple)
    if format == "packed":
        assert rows in (None, 1), f"a packed batch has one row, not {rows}"
        extents = [round_up(tokens, align) for tokens in lengths]
        total = _fix(round_up(sum(extents), unit), length, unit)
        extents[-1] += total - sum(extents)
        return _Placement(shape=(1, total), starts=[0, *accumulate(extents[:-1])], extents=extents)
    width = _fix(round_up(max(lengths), unit), length, unit)
    height = _fix(len(lengths), rows, 1)
    return _Placement(
        shape=(height, width),
        starts=list(range(0, height * width, width)),
        extents=[width] * height,
    )


def _fix(needed: int, wanted: int | None, unit: int) -> int:
    if wanted is None:
        return needed
    assert wanted >= needed and wanted % unit == 0, f"{wanted=} {needed=} {unit=}"
    return wanted


def _restarting_positions(place: _Placement) -> Tensor:
    """[B * S] int64: 0, 1, 2 ... over the extent of each sequence."""
    extents = torch.tensor(place.extents)
    starts = torch.tensor(place.starts).repeat_interleave(extents)
    return torch.arange(len(starts)) - starts
