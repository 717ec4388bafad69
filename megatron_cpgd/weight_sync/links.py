"""Connections between the trainer's ranks and the engine nodes.

Each rank has a connection of its own to each node that it serves: a torch.distributed process group
of two. torch's default group, whose size Megatron takes for its own, knows nothing of them.
"""

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore, Work  # type: ignore

_RANK, _NODE = 0, 1
"""Places in the group."""


class Link:
    """A Channel; the other end opens its own at the same time."""

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

    def send(self, values: Tensor) -> Work:
        """See Channel.send."""
        work: Work = self._group.send([values], self._peer, 0)
        return work

    def receive(self, values: Tensor) -> None:
        """See Channel.receive."""
        self._group.recv([values], self._peer, 0).wait()
