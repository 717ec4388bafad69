"""Buckets of weights from one process to others, each with its plan before its values."""

from collections.abc import Iterable, Iterator
from math import prod
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor

from megatron_cpgd.weights.buckets import Piece
from megatron_cpgd.weights.tensor_file import DTYPE_NAMES, DTYPES


class Channel(Protocol):
    """One end of a connection between two processes."""

    device: torch.device
    """Of the tensors that travel."""

    def send(self, values: Tensor) -> Any:
        """Begin to send; what is returned has `wait`."""

    def receive(self, values: Tensor) -> None:
        """Fill the tensor with what the other end sends."""


class _Slice(msgspec.Struct, array_like=True):
    start: int
    stop: int
    step: int | None


class _Place(msgspec.Struct, array_like=True):
    """Where the values of a piece belong."""

    name: str
    index: list[int | _Slice]
    shape: list[int]


class _Bucket(msgspec.Struct, array_like=True):
    """What one message of values holds."""

    dtype: str
    places: list[_Place]


def send_buckets(channels: list[Channel], buckets: Iterable[list[Piece]]) -> None:
    """Send buckets over all the channels; returns when they have arrived, or are on their way.

    Memory: one bucket at a time, however many channels there are.
    """
    for bucket in buckets:
        plan = msgspec.msgpack.encode(_describe(bucket))
        _send(channels, torch.tensor([len(plan)]))
        _send(channels, torch.frombuffer(bytearray(plan), dtype=torch.uint8))
        _send(channels, torch.cat([_as_bytes(values) for _, _, values in bucket]))


def end_buckets(channel: Channel) -> None:
    """Tell the other end that no bucket follows."""
    _send([channel], torch.tensor([0]))


def receive_pieces(channel: Channel) -> Iterator[Piece]:
    """What `send_buckets` sends, until the end; the values are good until the next piece is asked
    for."""
    while length := int(_receive(channel, 8).view(torch.int64).item()):
        plan = _receive(channel, length).cpu().numpy().tobytes()
        bucket = msgspec.msgpack.decode(plan, type=_Bucket)
        dtype = DTYPES[bucket.dtype]
        sizes = [prod(place.shape) * dtype.itemsize for place in bucket.places]
        values = _receive(channel, sum(sizes))
        for place, part in zip(bucket.places, values.split(sizes), strict=True):
            yield place.name, _as_index(place.index), part.view(dtype).view(place.shape)


def _send(channels: list[Channel], values: Tensor) -> None:
    values = _as_bytes(values).to(channels[0].device)
    for work in [channel.send(values) for channel in channels]:
        work.wait()
    if values.is_cuda:  # there `wait` only orders streams
        torch.cuda.current_stream().synchronize()


def _receive(channel: Channel, nbytes: int) -> Tensor:
    values = torch.empty(nbytes, dtype=torch.uint8, device=channel.device)
    channel.receive(values)
    return values


def _as_bytes(values: Tensor) -> Tensor:
    # All travels as bytes: not every backend knows every number format.
    return values.flatten().contiguous().view(torch.uint8)


def _describe(bucket: list[Piece]) -> _Bucket:
    places = [
        _Place(
            name,
            [each if isinstance(each, int) else _Slice(each.start, each.stop, each.step)
             for each in index],
            list(values.shape),
        )
        for name, index, values in bucket
    ]  # fmt: skip
    return _Bucket(DTYPE_NAMES[bucket[0][2].dtype], places)


def _as_index(index: list[int | _Slice]) -> tuple[int | slice, ...]:
    return tuple(
        each if isinstance(each, int) else slice(each.start, each.stop, each.step) for each in index
    )
