"""Rollouts from rank 0 to every rank, as two flat tensors."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpgd.policy import device
from megatron_cpgd.types import TrainSequence


def share_sequences(sequences: Sequence[TrainSequence] | None) -> list[TrainSequence]:
    """Rank 0's sequences, on every rank. Collective over the world.

    Args:
        sequences: as sampled, before old log-probs; read on rank 0 only.
    """
    integers = floats = None
    if dist.get_rank() == 0:
        assert sequences is not None
        integers, floats = _flatten(sequences)
    return _unflatten(_broadcast(integers, torch.int64), _broadcast(floats, torch.float32))


def share_integer(value: int) -> int:
    """Rank 0's value, on every rank. Collective over the world."""
    return int(_broadcast(torch.tensor([value]), torch.int64)[0])


def _flatten(sequences: Sequence[TrainSequence]) -> tuple[Tensor, Tensor]:
    header = [len(sequences)]
    for s in sequences:
        header += [s.group, len(s.prompt_ids), len(s.response_ids), s.truncated]
    tokens = [part for s in sequences for part in (s.prompt_ids, s.response_ids)]
    advantages = torch.tensor([s.advantage for s in sequences])
    return (
        torch.cat([torch.tensor(header), *tokens]),
        torch.cat([advantages, *(s.rollout_logprobs for s in sequences)]),
    )


def _unflatten(integers: Tensor, floats: Tensor) -> list[TrainSequence]:
    count = int(integers[0])
    header, tokens = integers[1:].split([4 * count, len(integers) - 1 - 4 * count])
    rows = header.view(count, 4).tolist()
    token_parts = iter(tokens.split([size for row in rows for size in row[1:3]]))
    advantages, logprobs = floats.split([count, len(floats) - count])
    logprob_parts = logprobs.split([row[2] for row in rows])
    return [
        TrainSequence(
            group=group,
            prompt_ids=next(token_parts),
            response_ids=next(token_parts),
            rollout_logprobs=values,
            advantage=advantage,
            truncated=bool(truncated),
        )
        for (group, _, _, truncated), advantage, values in zip(
            rows, advantages.tolist(), logprob_parts, strict=True
        )
    ]


def _broadcast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor:
    size = torch.tensor([0 if tensor is None else len(tensor)], device=device.current())
    dist.broadcast(size, src=0)
    if tensor is None:
        tensor = torch.empty(int(size), dtype=dtype)
    moved = tensor.to(device.current())
    dist.broadcast(moved, src=0)
    return moved.cpu()
