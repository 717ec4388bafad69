"""Gloo ranks for tests: forks of a process that has imported megatron already.

Importing torch and megatron costs several CPU seconds per process; a fork costs milliseconds. All
ranks are forked from one process that never computes: a fork of the test process would inherit
the locks of whatever thread pools it has used. Every job has ranks of its own: upstream never ends
its process groups, and their threads, dozens for each model, would slow the jobs that follow.
Jobs are module-level functions that get plain data and return plain data.
"""

import atexit
import ctypes
import gc
import multiprocessing as mp
import os
import signal
import tempfile
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

import torch
import torch._dynamo  # every rank would import it at its first optimizer

import megatron_cpgd.policy.policy  # noqa: F401  so that no rank imports it; megatron comes along

PR_SET_PDEATHSIG = 1
GRACE_S = 0.5
"""How long a failure waits for those of other ranks."""


def _die_with_parent() -> None:
    atexit._clear()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _fork_ranks(requests: Connection) -> None:
    """The process that all ranks are forked from: one fork per (rank, size, store, address)."""
    _die_with_parent()
    gc.freeze()  # else the first full collection of each rank copies the memory of all modules
    gc.enable()
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
    """One job, then wait for the end: a rank that left would break its peers' collectives."""
    _die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    torch.set_num_threads(1)
    size, me = str(world_size), str(rank)
    os.environ |= {"RANK": me, "LOCAL_RANK": me, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    with Client(address) as connection:
        connection.send(rank)
        try:
            function, args, kwargs = connection.recv()
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
            )
            connection.send((True, function(*args, **kwargs)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        connection.poll(None)


_requests, _theirs = mp.get_context("fork").Pipe()
_forker = mp.get_context("fork").Process(target=_fork_ranks, args=(_theirs,), daemon=True)
_forker.start()


def run_distributed(
    world_size: int, function: Any, *args: Any, timeout_s: float = 180, **kwargs: Any
) -> list[Any]:
    """Run `function` on `world_size` gloo ranks of its own and return its results by rank."""
    pids: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            connections = _start(world_size, folder, pids)
            for connection in connections:
                connection.send((function, args, kwargs))
            return _results(connections, time.monotonic() + timeout_s)
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _start(world_size: int, folder: str, pids: list[int]) -> list[Connection]:
    """Fork the ranks, adding to `pids`; returns a connection to each."""
    address = f"{folder}/socket"
    with Listener(address) as listener:
        for rank in range(world_size):
            _requests.send((rank, world_size, f"{folder}/store", address))
            pids.append(_requests.recv())
        connections = {}
        for _ in range(world_size):
            connection = listener.accept()
            connections[connection.recv()] = connection
    return [connections[rank] for rank in range(world_size)]


def _results(connections: list[Connection], deadline: float) -> list[Any]:
    """By rank.

    Raises:
        RuntimeError: a rank failed, with its traceback, or did not answer.
    """
    results: dict[int, Any] = {}
    failures = []
    waiting = {connection: rank for rank, connection in enumerate(connections)}
    while waiting:
        ready = wait([*waiting], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = waiting.pop(connection)
            try:
                succeeded, results[rank] = connection.recv()
            except EOFError:
                succeeded, results[rank] = False, "died"
            if not succeeded:
                failures.append(f"rank {rank}: {results[rank]}")
                # The others may have failed as well, or wait for this one in a collective.
                deadline = min(deadline, time.monotonic() + GRACE_S)
    failures += [f"rank {rank}: no answer" for rank in waiting.values()]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [results[rank] for rank in range(len(connections))]
