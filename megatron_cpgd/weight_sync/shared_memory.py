"""Where the arenas of this host's runs lie, and the removal of those that nobody uses."""

import os
import re
from contextlib import suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_NAME = "megatron_cpgd_{pid}.safetensors"


def arena_path(pid: int) -> Path:
    """The arena of the run whose rank 0 is process `pid`."""
    return SHARED_MEMORY / _NAME.format(pid=pid)


def remove_stale_arenas() -> None:
    """Delete the arenas of processes that have ended: a killed one leaves as much as the model.

    Called before this process makes its own: a file with its number is from an earlier process.
    """
    pattern = re.compile(_NAME.format(pid=r"(\d+)"))
    for file in SHARED_MEMORY.glob(_NAME.format(pid="*")):
        match = pattern.fullmatch(file.name)
        if match and (int(match[1]) == os.getpid() or not Path("/proc", match[1]).exists()):
            with suppress(PermissionError):  # another user's
                file.unlink(missing_ok=True)
