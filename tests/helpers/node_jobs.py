"""Jobs for `run_distributed` about engine nodes, which are processes beside the ranks."""

import os
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import ConversionError, RolloutError
from megatron_cpgd.policy import shards
from megatron_cpgd.rollout.engine_nodes import EngineNodes
from megatron_cpgd.rollout.lifetime import end_with_parent
from megatron_cpgd.rollout.messages import Failed, as_message
from megatron_cpgd.rollout.node_channel import connect
from megatron_cpgd.rollout.node_messages import Hello, Leave, Left, OpenLinks, Receive, Received
from megatron_cpgd.weight_sync import node_arena, node_weights, shared_memory
from megatron_cpgd.weight_sync.node_arena import NodeArena
from megatron_cpgd.weight_sync.node_weights import NodeWeights
from megatron_cpgd.weights import buckets
from megatron_cpgd.weights.engine_format import EngineFormat, engine_tensors
from megatron_cpgd.weights.fingerprint import Fingerprints
from megatron_cpgd.weights.hf_checkpoint import read_config
from megatron_cpgd.weights.registry import weight_table
from megatron_cpgd.weights.tally import Tally
from megatron_cpgd.weights.tensor_file import TensorFile
from tests.helpers.policy_jobs import build_policy

CPU = torch.device("cpu")


@dataclass
class NodeSync:
    """What a sync with engine nodes was on a rank; on rank 0 also what each node has read."""

    sent: dict[int, int] = field(default_factory=dict)
    """Bytes by node."""
    sums: Fingerprints = field(default_factory=dict)
    """As all engines are to read them."""
    reports: list[Received] = field(default_factory=list)
    tensors: list[dict[str, Tensor]] = field(default_factory=list)
    read: list[Fingerprints] = field(default_factory=list)
    error: str = ""


def node_weights_job(
    config: ExperimentConfig,
    folder: Path,
    nodes: int,
    bucket_bytes: int,
    *,
    format: EngineFormat = "fp32",
    lost: str | None = None,
    receivers: int = 1,
    killed: bool = False,
) -> NodeSync:
    """Sync twice; the weights are those of `config.model.path`.

    Args:
        folder: where the nodes have their memory and the keys lie.
        lost: Megatron parameter that no rank sends.
        receivers: processes that take weights on each node.
        killed: the last of them is, between the two syncs.
    """
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    key_file, servers, hub = folder / "key", [], None
    if dist.get_rank() == 0:
        folder.mkdir(exist_ok=True)
        for node in range(nodes):
            rank_0 = os.getpid()
            servers.append(os.fork())
            if servers[-1] == 0:
                try:
                    end_with_parent(rank_0)
                    _serve(config.model.path, folder, key_file, node, format, receivers, killed)
                finally:
                    os._exit(0)
        hub = EngineNodes(
            nodes, host="127.0.0.1", key_file=key_file, log_path=lambda _: folder / "no.log"
        )
    policy = build_policy(config)
    complete = shards.iter_weights
    result = NodeSync()

    def without_lost(*args: Any) -> list[tuple[str, Tensor]]:
        return [(name, tensor) for name, tensor in complete(*args) if name != lost]

    with (
        patch.object(buckets, "BUCKET_BYTES", bucket_bytes),
        patch.object(shards, "iter_weights", without_lost),
        patch.object(node_weights, "_REASON_S", 5.0 if hub else 0.0),
    ):
        weights = NodeWeights(
            policy.shards,
            policy._table,
            format,
            hub,
            count=nodes,
            start_timeout_s=30,
            step_timeout_s=30,
        )
        try:
            for version in (1,) if lost else (1, 2):
                tally, result.reports = weights.deliver(version)
                result.sums = tally.fingerprints
        except RuntimeError as error:  # a rank that has lost a node, or rank 0, which knows why
            result.error = f"{type(error).__name__}: {error}"
            if hub and lost:  # a run would end here; the other ranks wait to add up their sums
                dist.all_reduce(Tally(engine_tensors(policy._table, format), CPU).counts)
        dist.barrier()
        sent: Counter[int] = Counter()
        for experts, pieces in policy.shards.engine_pieces(format).items():
            nbytes = sum(values.nbytes for _, _, values in pieces)
            for node in policy.shards.engine_nodes_served(nodes).get(experts, ()):
                sent[node] += nbytes
        result.sent = dict(sent)
    for report in result.reports:
        with TensorFile.open(Path(report.arena)) as file:
            result.tensors.append({name: file.view(name).clone() for name in file.names})
            result.read.append(file.fingerprints())
    if hub:
        hub.close()
        for server in servers:
            os.waitpid(server, 0)
    return result


def _serve(
    model: Path, folder: Path, key_file: Path, node: int, format: Any, receivers: int, killed: bool
) -> None:
    """An engine node without engines."""
    channel, _ = connect(key_file, Hello(node=node, host=f"host{node}"), 30)
    with (
        patch.object(shared_memory, "SHARED_MEMORY", folder),
        patch.object(node_arena, "max_receivers", lambda _: receivers),
    ):
        arena = NodeArena(weight_table(read_config(model)), format, node)
        while True:
            for message in channel.exchange(1.0):
                match message:
                    case OpenLinks():
                        arena.open_links(message)
                    case Receive():
                        if killed and message.version == 2:
                            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
                            os.kill(int(children.split()[-1]), signal.SIGKILL)
                        try:
                            channel.send(arena.receive(message.version))
                        except ConversionError as error:
                            channel.send(Failed(kind="weights", message=f"{error}"))
                        except RolloutError as error:
                            channel.send(as_message(error))
                    case Leave():
                        channel.send(Left())
                        channel.close()
                        arena.close()
                        return
