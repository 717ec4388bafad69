"""Memory that other processes read where it lies, and that nobody has to remove."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.weights.shared_storage import SharedStorage, open_storage, share_storage

CPU = torch.device("cpu")


def test_a_shared_storage_keeps_its_bits_and_its_views():
    buffer = torch.arange(12.0)
    view = buffer[4:8].view(2, 2)
    shared = share_storage(buffer.untyped_storage())
    assert view.tolist() == [[4, 5], [6, 7]]
    reader = torch.empty(0).set_(open_storage(shared, CPU), 4, (2, 2), (2, 1))
    buffer[5] = -1
    assert reader.tolist() == view.tolist() == [[4, -1], [6, 7]]


def test_sharing_twice_gives_the_same_memory():
    storage = torch.zeros(4).untyped_storage()
    assert share_storage(storage) == share_storage(storage)


TRAINER = """
import time, msgspec, torch
from megatron_cpgd.weights.shared_storage import share_storage
weights = torch.full((1 << 20,), 2.5)
print(msgspec.json.encode(share_storage(weights.untyped_storage())).decode(), flush=True)
time.sleep(60)
"""


def test_a_killed_process_leaves_no_memory_behind_and_is_told_from_a_living_one():
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True)
    try:
        shared = msgspec.json.decode(trainer.stdout.readline(), type=SharedStorage)
        opened = torch.empty(0).set_(open_storage(shared, CPU), 0, (1 << 20,), (1,))
        assert opened.eq(2.5).all()
    finally:
        trainer.kill()
        trainer.wait()
    assert trainer.returncode == -signal.SIGKILL
    assert list(Path("/dev/shm").glob(f"*{trainer.pid}*")) == []
    with pytest.raises(WeightSyncError, match=f"of trainer process {trainer.pid} in place: .*No"):
        open_storage(shared, CPU)
    assert opened.eq(2.5).all()  # what is mapped stays


def test_another_file_under_the_same_number_is_refused():
    shared = share_storage(torch.zeros(4).untyped_storage())
    other = os.memfd_create("other")
    stale = SharedStorage(pid=os.getpid(), nbytes=16, descriptor=other, inode=shared.inode)
    with pytest.raises(WeightSyncError, match="belongs to another process by now"):
        open_storage(stale, CPU)
    os.close(other)
