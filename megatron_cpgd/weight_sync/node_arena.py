"""The engine node's side of a weight sync: an arena that the trainer's ranks fill over the network.

As in an arena that ranks write themselves, the count of elements proves each tensor whole, and FP8
blocks are made when all parts are there.
"""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Literal

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_cpgd.errors import ConfigError
from megatron_cpgd.rollout.node_messages import OpenLinks, Received
from megatron_cpgd.weight_sync.arena import Arena, create_arena
from megatron_cpgd.weight_sync.links import Link
from megatron_cpgd.weights.table import WeightTable

SENDERS_AT_A_TIME = 4
"""Each needs memory for a bucket. All nodes begin with the lowest ranks, so none waits for another
in a circle."""


class NodeArena:
    """The arena of one engine node and its connections to the ranks that serve it."""

    def __init__(
        self, table: WeightTable, format: Literal["bf16", "fp32", "fp8_block"], node: int
    ) -> None:
        self.arena: Arena = create_arena(table, format)
        self._table, self._node = table, node
        self._links: list[Link] = []

    def open_links(self, message: OpenLinks) -> None:
        """Connect to the ranks, in the order of their numbers.

        Raises:
            ConfigError: they send from GPUs, and there is none here.
        """
        if message.backend == "nccl" and not torch.cuda.is_available():
            raise ConfigError(
                f"engine node {self._node}: the trainer sends from its GPUs by NCCL, and torch "
                "sees no GPU here; start the node with GPUs, or the trainer without"
            )
        timeout = timedelta(seconds=message.timeout_s)
        store = TCPStore(message.host, message.port, timeout=timeout)
        self._links = [
            Link(
                store,
                rank=rank,
                node=self._node,
                is_node=True,
                backend=message.backend,
                timeout=timeout,
            )
            for rank in message.ranks
        ]

    def receive(self, version: int) -> Received:
        """Fill the arena with what the ranks send now.

        Raises:
            ConversionError: a tensor was not received once and whole.
            RuntimeError: a rank is gone.
        """
        start = time.perf_counter()
        written: Counter[str] = Counter()
        network_bytes = 0
        adding = threading.Lock()

        def take(link: Link) -> None:
            nonlocal network_bytes
            for name, index, values in link.receive():
                self.arena.view(name)[index].copy_(values)
                with adding:
                    written[name] += values.numel()
                    network_bytes += values.nbytes

        with ThreadPoolExecutor(SENDERS_AT_A_TIME, "weights") as threads:
            for _ in threads.map(take, self._links):
                pass
        seconds = time.perf_counter() - start
        self._table.check_written(written)
        self.arena.complete()
        return Received(
            version=version,
            arena=str(self.arena.file.path),
            digest=self.arena.file.digest(),
            network_bytes=network_bytes,
            network_s=seconds,
        )
