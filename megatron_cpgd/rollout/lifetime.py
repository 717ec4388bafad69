"""Ties a process to the one that started it. Imports nothing that takes time."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that the kernel sends when the parent ends."""


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, be it by SIGKILL.

    Args:
        parent_pid: as the parent knows itself; if it is gone already, this process ends here.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not parent_lives(parent_pid):
        sys.exit(f"process {parent_pid}, which started this one, is gone")


def parent_lives(parent_pid: int) -> bool:
    """Whether the process that started this one still runs."""
    return os.getppid() == parent_pid
