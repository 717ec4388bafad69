"""Buckets of weights from one process to others: first a plan of all of them, then their values."""

from collections.abc import Iterator
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


def send_buckets(streams: list[tuple[list[Channel], list[list[Piece]]]]) -> None:
    """Send the buckets of each stream over all its channels; returns when they have arrived, or are
    on their way.

    Memory: one bucket at a time, however many channels there are.
    """
    for channel in dict.fromkeys(channel for channels, _ in streams for channel in channels):
        own = [bucket for channels, buckets in streams if channel in channels for bucket in buckets]
        plan = msgspec.msgpack.encode([_describe(bucket) for bucket in own])
        _send([channel], torch.tensor([len(plan)]))
        _send([channel], torch.frombuffer(bytearray(plan), dtype=torch.uint8))
    for channels, buckets in streams:
        for bucket in buckets:
            _send_bucket(channels, bucket)


def receive_pieces(channel: Channel) -> Iterator[Piece]:
    """What `send_buckets` sends; the values are good until the next piece is asked for."""
    length = _receive(channel, 1, torch.int64)
    plan = _receive(channel, int(length.item()), torch.uint8).cpu().numpy().tobytes()
    for bucket in msgspec.msgpack.decode(plan, type=list[_Bucket]):
        sizes = [prod(place.shape) for place in bucket.places]
        values = _receive(channel, sum(sizes), DTYPES[bucket.dtype])
        for place, part in zip(bucket.places, values.split(sizes), strict=True):
            yield place.name, _as_index(place.index), part.view(place.shape)


def _send_bucket(channels: list[Channel], bucket: list[Piece]) -> None:
    _send(channels, torch.cat([values.reshape(-1) for _, _, values in bucket]))


def _send(channels: list[Channel], values: Tensor) -> None:
    values = values.to(channels[0].device)
    for work in [channel.send(values) for channel in channels]:
        work.wait()
    if values.is_cuda:  # there `wait` only orders streams
        torch.cuda.current_stream().synchronize()


def _receive(channel: Channel, elements: int, dtype: torch.dtype) -> Tensor:
    values = torch.empty(elements, dtype=dtype, device=channel.device)
    channel.receive(values)
    return values


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
