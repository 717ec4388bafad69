"""Memory of this process that others of the same user read where it lies.

On CPU the storage moves into shared memory without a name, which is gone with the last process that
has it; others open it through /proc. On CUDA they get an IPC handle. Both are private functions of
torch, see torch/multiprocessing/reductions.py; that module itself would send handles by pickle.
"""

import mmap
import os
import shutil
import warnings
from typing import Any

import msgspec
import torch

from megatron_cpgd.errors import WeightSyncError


class SharedStorage(msgspec.Struct, kw_only=True, frozen=True):
    """How to find a storage of another process."""

    pid: int
    nbytes: int
    descriptor: int = -1
    """On CPU: file descriptor of that process."""
    inode: int = -1
    """On CPU: number of the file, which tells a later process of this `pid` apart."""
    handle: tuple[bytes, int, int, bytes, int, bytes, bool] | None = None
    """On CUDA: what torch hands out besides the device."""


def share_storage(storage: torch.UntypedStorage) -> SharedStorage:
    """Let other processes read the storage. It keeps its bits, and all tensors on it see the same
    memory as before; on CPU their addresses change."""
    shared: Any = storage
    if storage.device.type == "cuda":
        _, *handle = shared._share_cuda_()
        return SharedStorage(pid=os.getpid(), nbytes=storage.nbytes(), handle=tuple(handle))
    descriptor, nbytes = shared._share_fd_cpu_()
    inode = os.fstat(descriptor).st_ino
    return SharedStorage(pid=os.getpid(), nbytes=nbytes, descriptor=descriptor, inode=inode)


def open_storage(shared: SharedStorage, device: torch.device) -> torch.UntypedStorage:
    """The memory of the other process, for reading only.

    Args:
        device: of this process, if the storage is on CUDA; from another GPU it is read directly.

    Raises:
        WeightSyncError: the process has ended or cannot be read.
    """
    try:
        if shared.handle is not None:
            torch.cuda.init()
            opened: torch.UntypedStorage = torch.UntypedStorage._new_shared_cuda(
                device.index, *shared.handle
            )
            return opened
        return _map(shared)
    except (OSError, RuntimeError) as error:
        raise WeightSyncError(
            f"cannot read the weights of trainer process {shared.pid} in place: {error}; use "
            "rollout.sync=arena, unless that process has ended"
        ) from error


def gpu_uuid() -> str | None:
    """Of the GPU that this process computes on."""
    if not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_properties().uuid)


def free_shared_bytes() -> int:
    """What `share_storage` can still take on CPU."""
    return shutil.disk_usage("/dev/shm").free


def _map(shared: SharedStorage) -> torch.UntypedStorage:
    descriptor = os.open(f"/proc/{shared.pid}/fd/{shared.descriptor}", os.O_RDONLY)
    try:
        status = os.fstat(descriptor)
        if (status.st_ino, status.st_size) != (shared.inode, shared.nbytes):
            raise OSError("the memory belongs to another process by now")
        mapping = mmap.mmap(descriptor, shared.nbytes, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8).untyped_storage()
