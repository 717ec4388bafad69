"""The shared-memory file through which the policy's weights reach the engine."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_cpgd.weight_sync.shared_memory import arena_path, remove_stale_arenas
from megatron_cpgd.weights.table import WeightTable
from megatron_cpgd.weights.tensor_file import TensorFile


def open_arena(
    table: WeightTable, dtype: torch.dtype, *, beside_rank_0: bool = True
) -> TensorFile | None:
    """One file of full HF tensors, mapped by every rank of rank 0's host; None on other hosts.

    Rank 0 creates it and removes what killed runs have left. Collective over the world.
    """
    path: list[str | None] = [None]
    arena = None
    if dist.get_rank() == 0:
        remove_stale_arenas()
        target = arena_path(os.getpid())
        arena = TensorFile.create(target, table.hf_tensors(dtype), {"format": "pt"})
        path = [str(target)]
    dist.broadcast_object_list(path)
    if not beside_rank_0:
        return None
    assert path[0] is not None
    return arena or TensorFile.open(Path(path[0]), writable=True)


def remove_arena(arena: TensorFile) -> None:
    """Unmap the file, and delete it on the rank that created it."""
    arena.close()
    if arena.path == arena_path(os.getpid()):
        arena.path.unlink(missing_ok=True)
