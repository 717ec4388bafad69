"""Weights of ranks on other hosts travel to ranks beside rank 0, whose memory the engine reads."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_cpgd.policy import device
from megatron_cpgd.policy.parallel import ParallelInfo


def receiver_of(info: ParallelInfo) -> int:
    """The rank that takes what this rank sends: those beside rank 0 share the work."""
    near = [rank for rank in range(info.world_size) if info.hosts[rank] == info.hosts[0]]
    return near[_away(info).index(info.rank) % len(near)]


def senders_to(info: ParallelInfo) -> list[int]:
    """The ranks on other hosts whose pieces this rank takes, in the order to do it."""
    near = [rank for rank in range(info.world_size) if info.hosts[rank] == info.hosts[0]]
    return _away(info)[near.index(info.rank) :: len(near)]


class RankChannel:
    """A Channel to another rank, over the default group."""

    def __init__(self, peer: int) -> None:
        self.device = device.current()
        self._peer = peer

    def send(self, values: Tensor) -> Any:
        """See Channel.send."""
        return dist.isend(values, self._peer)

    def receive(self, values: Tensor) -> None:
        """See Channel.receive."""
        dist.recv(values, self._peer)


def _away(info: ParallelInfo) -> list[int]:
    return [rank for rank in range(info.world_size) if info.hosts[rank] != info.hosts[0]]
