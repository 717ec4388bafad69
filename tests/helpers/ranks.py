"""Gloo ranks for tests: pools of forked processes that have imported megatron already.

Importing torch and megatron costs several CPU seconds per process; a fork costs milliseconds. All
ranks are forked from one process that never computes: a fork of the test process would inherit
the locks of whatever thread pools it has used. Jobs are module-level functions that get plain data
and return plain data.
"""

import atexit
import ctypes
import multiprocessing as mp
import os
import signal
import tempfile
import time
import traceback
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # every rank would import it at its first optimizer

import megatron_cpgd.policy  # noqa: F401  installs the CPU device layer before megatron

PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    atexit._clear()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _fork_ranks(requests: Connection) -> None:
    """The process that all ranks are forked from: one fork per (rank, size, store, address)."""
    _die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reap children without waiting for them
    while True:
        place = requests.recv()
        pid = os.fork()
        if pid == 0:
            try:
                _serve(*place)
            finally:
                os._exit(1)
        requests.send(pid)


def _serve(rank: int, world_size: int, store: str, address: str) -> None:
    _die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    torch.set_num_threads(1)
    size, me = str(world_size), str(rank)
    os.environ |= {"RANK": me, "LOCAL_RANK": me, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    connection = Client(address)
    connection.send(rank)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
    )
    while True:
        function, args, kwargs = connection.recv()
        try:
            connection.send((True, function(*args, **kwargs)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


_requests, _theirs = mp.get_context("fork").Pipe()
_forker = mp.get_context("fork").Process(target=_fork_ranks, args=(_theirs,), daemon=True)
_forker.start()


class Ranks:
    """`world_size` processes in one gloo group."""

    def __init__(self, world_size: int) -> None:
        folder = Path(tempfile.mkdtemp())
        address = str(folder / "socket")
        self.pids = []
        with Listener(address) as listener:
            for rank in range(world_size):
                _requests.send((rank, world_size, str(folder / "store"), address))
                self.pids.append(_requests.recv())
            connections = {}
            for _ in range(world_size):
                connection = listener.accept()
                connections[connection.recv()] = connection
        self.connections = [connections[rank] for rank in range(world_size)]

    def run(self, function: Any, *args: Any, timeout_s: float = 180, **kwargs: Any) -> list[Any]:
        """Results of `function` by rank. A rank that fails or hangs ends the whole pool."""
        for connection in self.connections:
            connection.send((function, args, kwargs))
        deadline = time.monotonic() + timeout_s
        results, failures = [], []
        for rank, connection in enumerate(self.connections):
            patience = 3.0 if failures else max(0.1, deadline - time.monotonic())
            if not connection.poll(patience):
                failures.append(f"rank {rank}: no answer")
                continue
            succeeded, value = connection.recv()
            results.append(value)
            if not succeeded:
                failures.insert(0, f"rank {rank}: {value}")
        if failures:
            self.kill()
            raise RuntimeError("\n".join(failures))
        return results

    def kill(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)


_pools: dict[int, Ranks] = {}


def run_distributed(world_size: int, function: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """Run `function` on `world_size` gloo ranks and return its results by rank."""
    pool = _pools.pop(world_size, None) or Ranks(world_size)
    results = pool.run(function, *args, **kwargs)
    _pools[world_size] = pool  # only a pool without failures is used again
    return results
