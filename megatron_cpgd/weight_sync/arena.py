"""The shared-memory file through which the policy's weights reach the engine."""

import os
import re
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_cpgd.weights.table import WeightTable
from megatron_cpgd.weights.tensor_file import TensorFile

SHARED_MEMORY = Path("/dev/shm")
_NAME = "megatron_cpgd_{pid}.safetensors"


def open_arena(table: WeightTable, dtype: torch.dtype) -> TensorFile:
    """One file of full HF tensors, mapped by every rank of this host. Collective over the world.

    Rank 0 creates it and removes what killed runs have left.
    """
    path: list[str | None] = [None]
    arena = None
    if dist.get_rank() == 0:
        _remove_stale()
        target = SHARED_MEMORY / _NAME.format(pid=os.getpid())
        tensors = {name: (dtype, shape) for name, shape in table.hf_shapes.items()}
        arena = TensorFile.create(target, tensors, {"format": "pt"})
        path = [str(target)]
    dist.broadcast_object_list(path)
    assert path[0] is not None
    return arena or TensorFile.open(Path(path[0]), writable=True)


def remove_arena(arena: TensorFile) -> None:
    """Unmap the file, and delete it on the rank that created it."""
    owner = arena.path.name == _NAME.format(pid=os.getpid())
    arena.close()
    if owner:
        arena.path.unlink(missing_ok=True)


def _remove_stale() -> None:
    pattern = re.compile(_NAME.format(pid=r"(\d+)"))
    for file in SHARED_MEMORY.glob(_NAME.format(pid="*")):
        match = pattern.fullmatch(file.name)
        if match and not Path("/proc", match[1]).exists():
            file.unlink(missing_ok=True)
