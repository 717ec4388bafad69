"""Memory that the ranks of a host share, for what all of them would hold a copy of: routes."""

import mmap
import os
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

PIECE_BYTES = 64 * 2**20
"""That pass through the GPU at a time: the routes of a large batch are gigabytes."""


def fill_host_memory(size: int, hosts: Sequence[str], fill: Callable[[slice], Tensor]) -> Tensor:
    """[size] uint8, once on each host, not to be written to. Collective over the world.

    The memory has no name: it goes with the last rank that has it.

    Args:
        size: bytes, the same on all ranks.
        hosts: of every rank.
        fill: the bytes of a piece, the same on all ranks; a collective.
    """
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory, is_first = _open(size, hosts)
    for start in range(0, size, PIECE_BYTES):
        part = slice(start, min(start + PIECE_BYTES, size))
        values = fill(part)
        if is_first:
            memory[part].copy_(values)
    dist.barrier()
    return memory


def _open(size: int, hosts: Sequence[str]) -> tuple[Tensor, bool]:
    """The memory of this host, and whether this is the rank that may write to it."""
    rank = dist.get_rank()
    first = hosts.index(hosts[rank])
    file = -1
    if rank == first:
        file = os.memfd_create("megatron_cpgd_routes")
        os.ftruncate(file, size)
    paths = [""] * len(hosts)
    dist.all_gather_object(paths, f"/proc/{os.getpid()}/fd/{file}")
    access = mmap.ACCESS_WRITE if rank == first else mmap.ACCESS_READ
    with open(paths[first], "r+b" if rank == first else "rb") as opened:
        mapping = mmap.mmap(opened.fileno(), size, access=access)
    dist.barrier()  # all have opened it
    if rank == first:
        os.close(file)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8), rank == first
