"""Weights on their way between the trainer's ranks and the engine nodes.

Each rank has a connection of its own to each node that it serves: a torch.distributed process group
of two. torch's default group, whose size Megatron takes for its own, knows nothing of them.
"""

from collections.abc import Iterator
from datetime import timedelta
from math import prod
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore, Work  # type: ignore

from megatron_cpgd.weights.buckets import Piece
from megatron_cpgd.weights.tensor_file import DTYPE_NAMES, DTYPES

_RANK, _NODE = 0, 1
"""Places in the group."""


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


class Link:
    """One end of a connection; the other one opens its own at the same time."""

    def __init__(
        self,
        store: TCPStore,
        *,
        rank: int,
        node: int,
        is_node: bool,
        backend: str,
        timeout: timedelta,
    ) -> None:
        """
        Args:
            timeout: longest wait for the other end.
        """
        place, self._peer = (_NODE, _RANK) if is_node else (_RANK, _NODE)
        self.device = torch.device("cpu")
        own = PrefixStore(f"rank_{rank}_node_{node}", store)
        if backend == "nccl":
            from torch.distributed import ProcessGroupNCCL

            self.device = torch.device("cuda", torch.cuda.current_device())
            options = ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group: Any = ProcessGroupNCCL(own, place, 2, options)
        else:
            self._group = ProcessGroupGloo(own, place, 2, timeout)

    def receive(self) -> Iterator[Piece]:
        """What `send_buckets` sends; the values are good until the next piece is asked for."""
        length = self._receive(1, torch.int64)
        plan = self._receive(int(length.item()), torch.uint8).cpu().numpy().tobytes()
        for bucket in msgspec.msgpack.decode(plan, type=list[_Bucket]):
            sizes = [prod(place.shape) for place in bucket.places]
            values = self._receive(sum(sizes), DTYPES[bucket.dtype])
            for place, part in zip(bucket.places, values.split(sizes), strict=True):
                yield place.name, _as_index(place.index), part.view(place.shape)

    def _receive(self, elements: int, dtype: torch.dtype) -> Tensor:
        values = torch.empty(elements, dtype=dtype, device=self.device)
        self._group.recv([values], self._peer, 0).wait()
        return values

    def _send(self, values: Tensor) -> Work:
        work: Work = self._group.send([values], self._peer, 0)
        return work


def send_buckets(streams: list[tuple[list[Link], list[list[Piece]]]]) -> None:
    """Send the buckets of each stream over all its links; returns when they have arrived, or are
    on their way.

    Memory: one bucket at a time, however many links there are.
    """
    for link in dict.fromkeys(link for links, _ in streams for link in links):
        own = [bucket for links, buckets in streams if link in links for bucket in buckets]
        plan = msgspec.msgpack.encode([_describe(bucket) for bucket in own])
        _send_everywhere([link], torch.tensor([len(plan)]))
        _send_everywhere([link], torch.frombuffer(bytearray(plan), dtype=torch.uint8))
    for links, buckets in streams:
        for bucket in buckets:
            _send_everywhere(links, torch.cat([values.reshape(-1) for _, _, values in bucket]))


def _send_everywhere(links: list[Link], values: Tensor) -> None:
    values = values.to(links[0].device)
    for work in [link._send(values) for link in links]:
        work.wait()
    if values.is_cuda:  # there `wait` only orders streams
        torch.cuda.current_stream().synchronize()


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
