"""Gloo ranks for tests: a pool of forked processes that have imported megatron already.

Importing torch and megatron costs several CPU seconds per process; a fork costs milliseconds. The
jobs are module-level functions that get plain data and return plain data.
"""

import atexit
import ctypes
import multiprocessing as mp
import os
import signal
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import megatron_cpgd.policy  # noqa: F401  installs the CPU device layer

import torch._dynamo  # noqa: E402, F401  every rank would import it at its first optimizer

PR_SET_PDEATHSIG = 1


def _serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    atexit._clear()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
    )  # fmt: skip
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
    )
    while True:
        function, args, kwargs = connection.recv()
        try:
            connection.send((True, function(*args, **kwargs)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class Ranks:
    """`world_size` processes in one gloo group."""

    def __init__(self, world_size: int) -> None:
        context = mp.get_context("fork")
        store = str(Path(tempfile.mkdtemp()) / "store")
        self.connections: list[Connection] = []
        self.processes = []
        atexit.register(self.kill)
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, store, theirs))
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

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

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


_pools: dict[int, Ranks] = {}


def run_distributed(world_size: int, function: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """Run `function` on `world_size` gloo ranks and return its results by rank."""
    pool = _pools.get(world_size)
    if pool is None or not pool.alive:
        pool = _pools[world_size] = Ranks(world_size)
    return pool.run(function, *args, **kwargs)
