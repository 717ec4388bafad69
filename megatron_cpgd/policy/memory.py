"""Memory of a rank: the most that it has had at any time of the run, and the C library's heap."""

import ctypes
import os
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_cpgd.policy import device

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Of this process since this object was made.

    On CUDA what torch has allocated. On CPU the growth of the resident set, which includes the
    pages of the arena and of a checkpoint that this rank has touched.
    """

    def __init__(self) -> None:
        """Begin to measure."""
        self._start = 0 if torch.cuda.is_available() else _status_bytes("VmRSS")

    def gib(self) -> float:
        """Of the rank that has had most. Collective over the world."""
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = _status_bytes("VmHWM") - self._start
        worst = torch.tensor(float(peak), dtype=torch.float64, device=device.current())
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return float(worst) / 2**30


def _status_bytes(name: str) -> int:
    """A size that the kernel keeps of this process."""
    [line] = [line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def tame_heap() -> None:
    """Where tensors are in host memory, keep glibc from losing much of it between them.

    By default each thread of a collective has a heap of its own, and what is freed of sizes up to
    32 MiB stays in the process: a policy with experts grew with every step. Does nothing where the
    C library is another one, or where its own settings say otherwise.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or torch.cuda.is_available():
        return
    for variable, option, value in (
        ("MALLOC_ARENA_MAX", _M_ARENA_MAX, 1),
        ("MALLOC_MMAP_THRESHOLD_", _M_MMAP_THRESHOLD, 4 << 20),
    ):
        if variable not in os.environ:
            mallopt(option, value)
