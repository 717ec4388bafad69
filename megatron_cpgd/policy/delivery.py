"""Weights of ranks on other hosts travel to ranks beside rank 0, whose memory the engine reads."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from megatron_cpgd.policy import device
from megatron_cpgd.policy.parallel import ParallelInfo
from megatron_cpgd.weights.buckets import Piece, iter_buckets


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
    for bucket in iter_buckets(pieces):
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
