"""Weights of ranks on other hosts travel to ranks beside rank 0, whose memory the engine reads."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpgd.policy import device
from megatron_cpgd.policy.parallel import ParallelInfo
from megatron_cpgd.weights.tiling import Index, span

BUCKET_BYTES = 64 * 2**20
"""Of the buffer that sender and receiver need; a larger tensor is cut by rows."""

Piece = tuple[str, Index, Tensor]
"""Name of a full HF tensor, place in it, values."""


def receiver_of(info: ParallelInfo) -> int:
    """The rank that takes what this rank sends: those beside rank 0 share the work."""
    near = [rank for rank in range(info.world_size) if info.hosts[rank] == info.hosts[0]]
    return near[_away(info).index(info.rank) % len(near)]


def senders_to(info: ParallelInfo) -> list[int]:
    """The ranks on other hosts whose pieces this rank takes, in the order to do it."""
    near = [rank for rank in range(info.world_size) if info.hosts[rank] == info.hosts[0]]
    return _away(info)[near.index(info.rank) :: len(near)]


def send_pieces(pieces: Iterable[Piece], receiver: int) -> None:
    """Send all pieces; returns when the last one is on its way."""
    bucket: list[Piece] = []
    size = 0
    for piece in _cut_by_rows(pieces):
        values = piece[2]
        if bucket and (size + values.nbytes > BUCKET_BYTES or values.dtype != bucket[0][2].dtype):
            _send(bucket, receiver)
            bucket, size = [], 0
        bucket.append(piece)
        size += values.nbytes
    if bucket:
        _send(bucket, receiver)
    dist.send_object_list([None], receiver, device=device.current())


def receive_pieces(sender: int) -> Iterator[Piece]:
    """What `send_pieces` sends; the values are good until the next piece is asked for."""
    while True:
        received = [None]
        dist.recv_object_list(received, sender, device=device.current())
        if received[0] is None:
            return
        dtype, places = received[0]
        sizes = [shape.numel() for _, _, shape in places]
        payload = torch.empty(sum(sizes), dtype=dtype, device=device.current())
        dist.recv(payload, sender)
        for (name, index, shape), values in zip(places, payload.split(sizes), strict=True):
            yield name, index, values.view(shape)


def _away(info: ParallelInfo) -> list[int]:
    return [rank for rank in range(info.world_size) if info.hosts[rank] != info.hosts[0]]


def _send(bucket: list[Piece], receiver: int) -> None:
    places = [(name, index, values.shape) for name, index, values in bucket]
    header = [(bucket[0][2].dtype, places)]
    dist.send_object_list(header, receiver, device=device.current())
    dist.send(torch.cat([values.reshape(-1) for _, _, values in bucket]), receiver)


def _cut_by_rows(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same numbers in pieces of at most BUCKET_BYTES, or of one row."""
    for name, index, values in pieces:
        # The matrix of one expert in a packed tensor has its number before the rows.
        before = [each for each in index if isinstance(each, int)]
        whole, *columns = index[len(before) :]
        rows, step = span(whole), max(1, BUCKET_BYTES * len(values) // max(1, values.nbytes))
        for first, part in zip(range(0, len(values), step), values.split(step), strict=True):
            own = rows[first : first + len(part)]
            yield name, (*before, slice(own.start, own.stop, own.step), *columns), part
