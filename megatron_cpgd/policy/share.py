"""Rollouts from rank 0 to every rank, as three flat tensors."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpgd.policy import device, host_memory
from megatron_cpgd.policy.host_memory import fill_host_memory
from megatron_cpgd.types import TrainSequence


def share_sequences(
    sequences: Sequence[TrainSequence] | None, hosts: Sequence[str]
) -> list[TrainSequence]:
    """Rank 0's sequences, on every rank. Collective over the world.

    Routes, which outweigh all else, are in memory once on each host; they must not be written to.

    Args:
        sequences: as sampled, before old log-probs; read on rank 0 only.
        hosts: of every rank.
    """
    integers = floats = routes = None
    if dist.get_rank() == 0:
        assert sequences is not None
        integers, floats, routes = _flatten(sequences)
    return _unflatten(
        _broadcast(integers, torch.int64),
        _broadcast(floats, torch.float32),
        # As bytes: neither gloo nor NCCL has int16.
        _broadcast_to_hosts(routes, hosts).view(torch.int16),
    )


def share_integer(value: int) -> int:
    """Rank 0's value, on every rank. Collective over the world."""
    return int(_broadcast(torch.tensor([value]), torch.int64)[0])


def _flatten(sequences: Sequence[TrainSequence]) -> tuple[Tensor, Tensor, Tensor]:
    routes = [s.rollout_routes for s in sequences if s.rollout_routes is not None]
    assert len(routes) in (0, len(sequences)), "all sequences have routes, or none"
    layers, top_k = routes[0].shape[1:] if routes else (0, 0)
    header = [len(sequences), layers, top_k]
    for s in sequences:
        header += [s.group, len(s.prompt_ids), len(s.response_ids), s.truncated]
    tokens = [part for s in sequences for part in (s.prompt_ids, s.response_ids)]
    advantages = torch.tensor([s.advantage for s in sequences])
    return (
        torch.cat([torch.tensor(header), *tokens]),
        torch.cat([advantages, *(s.rollout_logprobs for s in sequences)]),
        torch.cat([torch.zeros(0, dtype=torch.int16), *(r.flatten() for r in routes)]).view(
            torch.uint8
        ),
    )


def _unflatten(integers: Tensor, floats: Tensor, routes: Tensor) -> list[TrainSequence]:
    count, layers, top_k = integers[:3].tolist()
    header, tokens = integers[3:].split([4 * count, len(integers) - 3 - 4 * count])
    rows = header.view(count, 4).tolist()
    token_parts = iter(tokens.split([size for row in rows for size in row[1:3]]))
    advantages, logprobs = floats.split([count, len(floats) - count])
    logprob_parts = logprobs.split([row[2] for row in rows])
    route_parts: Sequence[Tensor | None] = [None] * count
    if layers:
        lengths = [prompt + response for _, prompt, response, _ in rows]
        route_parts = routes.view(-1, layers, top_k).split(lengths)
    return [
        TrainSequence(
            group=group,
            prompt_ids=next(token_parts),
            response_ids=next(token_parts),
            rollout_logprobs=values,
            advantage=advantage,
            truncated=bool(truncated),
            rollout_routes=own,
        )
        for (group, _, _, truncated), advantage, values, own in zip(
            rows, advantages.tolist(), logprob_parts, route_parts, strict=True
        )
    ]


def _broadcast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor:
    size = _broadcast_size(tensor)
    if tensor is None:
        tensor = torch.empty(size, dtype=dtype)
    for part in tensor.split(host_memory.PIECE_BYTES // dtype.itemsize):
        moved = part.to(device.current())
        dist.broadcast(moved, src=0)
        part.copy_(moved)
    return tensor


def _broadcast_to_hosts(tensor: Tensor | None, hosts: Sequence[str]) -> Tensor:
    """[n] uint8 in memory that the ranks of a host share."""

    def receive(part: slice) -> Tensor:
        moved = torch.empty(part.stop - part.start, dtype=torch.uint8, device=device.current())
        if tensor is not None:
            moved.copy_(tensor[part])
        dist.broadcast(moved, src=0)
        return moved

    return fill_host_memory(_broadcast_size(tensor), hosts, receive)


def _broadcast_size(tensor: Tensor | None) -> int:
    size = torch.tensor([0 if tensor is None else len(tensor)], device=device.current())
    dist.broadcast(size, src=0)
    return int(size)
