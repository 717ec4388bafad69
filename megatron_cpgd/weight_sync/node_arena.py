"""The engine node's side of a weight sync: an arena that the trainer's ranks fill over the network.

As in an arena that ranks write themselves, the count of elements proves each tensor whole.
"""

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import msgspec
import torch

from megatron_cpgd.errors import ConfigError
from megatron_cpgd.rollout.node_messages import OpenLinks, Receive, Received
from megatron_cpgd.weight_sync.arena import create_arena, remove_arena
from megatron_cpgd.weight_sync.receiver import Done, Order, Receiver, ReceiverProcess
from megatron_cpgd.weights.engine_format import EngineFormat, engine_tensors
from megatron_cpgd.weights.table import WeightTable
from megatron_cpgd.weights.tally import check_written


def max_receivers(backend: str) -> int:
    """How many processes of this node take weights, if as many ranks send: one for each GPU with
    NCCL, since each GPU has a network card; else one for four cores, and no more than four."""
    if backend == "nccl":
        return torch.cuda.device_count()
    return max(1, min(4, len(os.sched_getaffinity(0)) // 4))


def spread(elements: Mapping[int, int], count: int) -> list[dict[int, int]]:
    """The ranks in `count` groups that send about as many elements each.

    By turns alone one receiver could get all dense layers: their senders are a fixed number of
    ranks apart.
    """
    groups: list[dict[int, int]] = [{} for _ in range(count)]
    for rank in sorted(elements, key=lambda rank: (-elements[rank], rank)):
        least = min(groups, key=lambda group: sum(group.values()))
        least[rank] = elements[rank]
    return groups


class NodeArena:
    """The arena of one engine node and the processes that fill it: this one, and with several
    ranks others. To be used by one thread, with which these others end."""

    def __init__(self, table: WeightTable, format: EngineFormat, node: int) -> None:
        self.arena = create_arena(engine_tensors(table, format))
        self._node = node
        self._processes: list[ReceiverProcess] = []
        self._receivers: list[Receiver | ReceiverProcess] = []

    def open_links(self, message: OpenLinks) -> None:
        """Connect to the ranks, each of which belongs to one receiver from now on.

        Raises:
            ConfigError: they send from GPUs, and there is none here.
            RolloutError: a receiver process has failed.
        """
        nccl = message.backend == "nccl"
        if nccl and not torch.cuda.is_available():
            raise ConfigError(
                f"engine node {self._node}: the trainer sends from its GPUs by NCCL, and torch "
                "sees no GPU here; start the node with GPUs, or the trainer without"
            )
        count = min(max_receivers(message.backend), len(message.elements))
        self._receivers = [Receiver(self.arena, self._node)]
        for i in range(1, count):
            gpu = i if nccl else None
            self._processes.append(ReceiverProcess(self.arena, self._node, number=i, gpu=gpu))
        self._receivers += self._processes
        shares = spread(message.elements, count)
        self._order([msgspec.structs.replace(message, elements=share) for share in shares])

    def receive(self, version: int) -> Received:
        """Fill the arena with what the ranks send now.

        Raises:
            ConversionError: a tensor was not received once and whole.
            RolloutError: a receiver process has failed.
            RuntimeError: a rank is gone.
        """
        start = time.perf_counter()
        count = len(self._receivers)
        taken = self._order([Receive(version=version)] * count)
        seconds = time.perf_counter() - start
        elements: Counter[str] = Counter()
        for each in taken:
            elements.update(each.elements)
        check_written(self.arena.tensors, elements)
        return Received(
            version=version,
            arena=str(self.arena.path),
            network_bytes=sum(each.nbytes for each in taken),
            network_s=seconds,
        )

    def close(self) -> None:
        """End the other processes, and free the memory. Any thread may call it."""
        for process in self._processes:
            process.close()
        remove_arena(self.arena)

    def _order(self, orders: Sequence[Order]) -> list[Done]:
        """The answer of each receiver to its order, which they carry out at one time; an error is
        raised while others may still be busy."""
        if len(self._receivers) == 1:
            return [self._receivers[0].obey(orders[0])]
        threads = ThreadPoolExecutor(len(orders), "receivers")
        futures = [
            threads.submit(receiver.obey, order)
            for receiver, order in zip(self._receivers, orders, strict=True)
        ]
        threads.shutdown(wait=False)
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]
