"""One process at a time writes to a folder."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_cpgd.errors import ConfigError

END_S = 15.0
"""For a killed process to be gone from this host."""
LEASE_S = 120.0
"""For a network file system to take back the lock of a host that is gone."""
_POLL_S = 0.2


@contextmanager
def lock_folder(folder: Path, name: str = "lock", *, waits: bool = False) -> Iterator[None]:
    """Keep others out of a folder; the kernel lets go of a dead process's lock.

    Args:
        name: of the lock file, which says who has it.
        waits: for one that may be ending: END_S on this host, LEASE_S on another.

    Raises:
        ConfigError: another process has the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    here, start = socket.gethostname(), time.monotonic()
    with (folder / name).open("a+") as file:
        while not _lock(file.fileno()):
            file.seek(0)
            owner = file.read().strip()
            grace_s = END_S if owner.startswith(f"{here},") else LEASE_S
            if time.monotonic() > start + (grace_s if waits else 0.0):
                raise ConfigError(
                    f"{folder}: another process writes to this folder ({owner}); wait for its end, "
                    "or use another folder"
                )
            time.sleep(_POLL_S)
        file.truncate(0)
        file.write(f"{here}, process {os.getpid()}\n")
        file.flush()
        yield


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
