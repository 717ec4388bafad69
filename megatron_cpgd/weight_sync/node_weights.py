"""The trainer's side of a weight sync with engine nodes: every rank sends what is its own."""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.rollout.engine_nodes import EngineNodes
from megatron_cpgd.rollout.node_messages import OpenLinks, Receive, Received
from megatron_cpgd.weight_sync.links import Link
from megatron_cpgd.weight_sync.sync import Sent
from megatron_cpgd.weights.bucket_stream import end_buckets, send_buckets
from megatron_cpgd.weights.buckets import Piece, iter_buckets
from megatron_cpgd.weights.engine_format import EngineFormat, engine_tensors
from megatron_cpgd.weights.table import WeightTable
from megatron_cpgd.weights.tally import Tally

_LOOK_S = 0.5
_REASON_S = 5.0
"""After a connection broke: for rank 0 to notice that the node is lost, and to say so."""


class NodePieces(Protocol):
    """The part of a rank's shards that this needs."""

    def engine_nodes_served(self, nodes: int) -> dict[bool, range]:
        """The nodes to which this rank sends the weights of experts (True), and the others."""

    def count_elements(self) -> dict[bool, int]:
        """Of these weights, all that this rank has."""

    def engine_pieces(self, format: EngineFormat) -> dict[bool, Iterable[Piece]]:
        """These weights as an engine takes them. Collective over the ranks that share tensors."""


class NodeWeights:
    """A WeightRoute: this rank's connections to the engine nodes that it serves."""

    def __init__(
        self,
        shards: NodePieces,
        table: WeightTable,
        format: EngineFormat,
        nodes: EngineNodes | None,
        *,
        count: int,
        start_timeout_s: float,
        step_timeout_s: float,
    ) -> None:
        """Collective over the world.

        Args:
            nodes: rank 0's.
            count: number of nodes.
        """
        self._shards, self._nodes, self._count = shards, nodes, count
        self._tensors, self._format = engine_tensors(table, format), format
        self._served = shards.engine_nodes_served(count)
        self._step_timeout_s = step_timeout_s
        rank, timeout = dist.get_rank(), timedelta(seconds=start_timeout_s + step_timeout_s)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        elements = shards.count_elements()
        mine: Counter[int] = Counter()
        for experts, served in self._served.items():
            mine.update(dict.fromkeys(served, elements[experts]))
        sent: list[dict[int, int]] = [{}] * dist.get_world_size()
        dist.all_gather_object(sent, dict(mine))
        place: list[Any] = [None]
        if nodes:
            host = os.environ["MASTER_ADDR"]
            self._store = TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
            place = [(host, self._store.port)]
            for node in range(count):
                to_node = {
                    sender: theirs[node] for sender, theirs in enumerate(sent) if node in theirs
                }
                message = OpenLinks(
                    host=host,
                    port=self._store.port,
                    backend=backend,
                    elements=to_node,
                    timeout_s=timeout.total_seconds(),
                )
                nodes.send(node, message)
        dist.broadcast_object_list(place)
        if not nodes:
            host, port = place[0]
            self._store = TCPStore(host, port, timeout=timeout)
        self._links: dict[int, Link] = {}

        def open_links() -> None:
            # In the order of the nodes, whose receivers take the ranks in theirs: nobody waits in
            # a circle.
            for node in sorted(mine):
                self._links[node] = Link(
                    self._store,
                    rank=rank,
                    node=node,
                    is_node=False,
                    backend=backend,
                    timeout=timeout,
                )

        self._watched(open_links)

    def send(self, version: int, *, report: bool) -> Sent | None:
        """See WeightRoute.send; `deliver` has the errors."""
        tally, reports = self.deliver(version)
        if not report:
            return None
        metrics = {
            "weights/network_bytes": sum(each.network_bytes for each in reports),
            "weights/network_s": max(each.network_s for each in reports),
        }
        return Sent(Path(reports[0].arena), self._tensors, tally.fingerprints, metrics)

    def deliver(self, version: int) -> tuple[Tally, list[Received]]:
        """Bring the policy's weights to the arenas of all nodes. Collective over the world.

        Returns:
            The sums of the weights, as node 0 gets them; on rank 0 a report of each node.

        Raises:
            WeightSyncError: on rank 0, a node has not received every element once.
            RolloutError: on rank 0, a node was lost.
        """
        if self._nodes:
            for node in range(self._count):
                self._nodes.send(node, Receive(version=version))
        on_gpu = torch.cuda.is_available()
        tally = Tally(self._tensors, torch.device("cuda" if on_gpu else "cpu"))

        @torch.no_grad()
        def send_all() -> None:
            pieces = self._shards.engine_pieces(self._format)
            for experts, served in self._served.items():
                if served:
                    own = tally.summed(pieces[experts]) if 0 in served else pieces[experts]
                    send_buckets([self._links[node] for node in served], iter_buckets(own))
            for link in self._links.values():
                end_buckets(link)

        self._watched(send_all)
        reports = []
        if self._nodes:
            reports = [self._nodes.received(i, self._step_timeout_s) for i in range(self._count)]
        dist.all_reduce(tally.counts)  # not before rank 0 knows that no node was lost
        for i, report in enumerate(reports):
            if report.version != version:
                raise WeightSyncError(
                    f"weight sync, version {version}: engine node {i} has received version "
                    f"{report.version}"
                )
        return tally, reports

    def close(self) -> None:
        """Let the connections go."""
        self._links.clear()

    def _watched(self, work: Callable[[], None]) -> None:
        """Do `work`; on rank 0 in a thread, so that a lost node ends the wait for it."""
        if not self._nodes:
            try:
                work()
            except Exception:
                time.sleep(_REASON_S)  # rank 0 may know why
                raise
            return
        errors: list[Exception] = []
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def run() -> None:
            if device is not None:
                torch.cuda.set_device(device)
            try:
                work()
            except Exception as error:
                errors.append(error)

        # A daemon: if a node is lost, this thread may hang forever.
        thread = threading.Thread(target=run, name="node-weights", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_LOOK_S)
            self._nodes.check()
        if errors:
            self._nodes.check(_REASON_S)
            raise errors[0]
