"""Starts the trainer ranks of one machine and stops all of them when one fails.

Engine nodes too, if the run has any: there they are processes that take themselves for other hosts.

torchrun would do, and may be used in its place. On one machine these lines start faster
(torchrun imports torch for seconds before the first rank does), return the exit code of the rank
that failed, and show the end of its log.
"""

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_cpgd.errors import RUN_ERROR, STOPPED, USER_ERROR
from megatron_cpgd.stop_request import STOP_SIGNALS

FORWARD_GRACE_S = 60.0
"""Time for the ranks to end after a signal that was sent to the launcher."""
RANK_0_GRACE_S = 3.0
"""Time for rank 0 to end by itself after another rank has failed: it may give the reason."""
NODE_GRACE_S = 30.0
"""The same after an engine node has failed."""
_POLL_S = 0.05
_FIRST_PORT, _PORTS = 10000, 10000
_TAIL_LINES = 30
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    name: str
    process: subprocess.Popen[bytes]
    log_path: Path | None
    """None for rank 0, which writes to the terminal."""
    log_start: int
    """Where this run begins in a log that an earlier one has left."""
    trains: bool
    """False for an engine node."""


def launch_ranks(
    argv: list[str],
    world_size: int,
    log_dir: Path,
    *,
    stop_within_s: float = 0.0,
    engine_nodes: Sequence[list[str]] = (),
) -> int:
    """Run a command `world_size` times on this machine, once for each rank, and wait for all.

    Rank 0 inherits the terminal; rank N appends its output to `log_dir/rank_N.log`, whose end is
    shown if it fails, unless rank 0 has given the reason itself (USER_ERROR, RUN_ERROR). Every rank
    dies with this process. SIGINT and STOP_SIGNALS are forwarded. Call it from the main thread.

    Args:
        argv: the command, program first; it finds its place in RANK, LOCAL_RANK, WORLD_SIZE,
            LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
        stop_within_s: how much longer than FORWARD_GRACE_S ranks may take after STOP_SIGNALS.
        engine_nodes: the command of each; number N writes to `log_dir/engine_node_N.log`, gets no
            signals, and ends by itself when rank 0 does.

    Returns:
        0 if all ranks succeeded, else the exit code of the first that failed: 128 + n for a rank
        killed by signal n. After a signal n that was forwarded: STOPPED if a rank says so, else
        128 + n.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    environment = _environment(world_size)
    ranks: list[_Rank] = []
    with _forwarded_signals(ranks) as received, ExitStack() as stack:
        stack.callback(_stop, ranks)
        for rank in range(world_size):
            if not received:
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                log_path = log_dir / f"rank_{rank}.log" if rank else None
                ranks.append(_start(f"rank {rank}", argv, environment | place, log_path))
        for node, command in enumerate(engine_nodes if not received else ()):
            place = {"SLURMD_NODENAME": f"engine_node_{node}"}
            log_path = log_dir / f"engine_node_{node}.log"
            ranks.append(
                _start(f"engine node {node}", command, environment | place, log_path, trains=False)
            )
        return _wait(ranks, received, stop_within_s)


def _environment(world_size: int) -> dict[str, str]:
    environment = {
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONUNBUFFERED": "1",  # the end of the log is what matters after a crash
        **({} if Path("/dev/nvidiactl").exists() else {"OMP_NUM_THREADS": "1"}),
        **os.environ,
    }
    size = str(world_size)
    place = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return environment | place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def free_port() -> int:
    """Free now, and most likely in the seconds until rank 0 has imported torch and listens.

    It lies below the ports that Linux gives to whoever asks for any (32768), as Gloo does.
    """
    while True:
        port = _FIRST_PORT + secrets.randbelow(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def _start(
    name: str,
    argv: list[str],
    environment: Mapping[str, str],
    log_path: Path | None,
    *,
    trains: bool = True,
) -> _Rank:
    with ExitStack() as stack:
        log: BinaryIO | None = stack.enter_context(log_path.open("ab")) if log_path else None
        log_start = log.tell() if log else 0  # the process moves it with every line
        process = subprocess.Popen(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # Its own session: Ctrl-C reaches the launcher alone, which forwards it once.
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )
        return _Rank(
            name=name,
            process=process,
            log_path=log_path,
            log_start=log_start,
            trains=trains,
        )


def _die_with_parent() -> Callable[[], None]:
    # Loaded before the fork: between fork and exec as little as possible should run.
    libc, parent = ctypes.CDLL(None), os.getpid()

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return in_child


@contextmanager
def _forwarded_signals(ranks: list[_Rank]) -> Iterator[list[int]]:
    """Passes signals on to the ranks; yields the list of those that came."""
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        for rank in ranks:
            if rank.trains and rank.process.poll() is None:
                rank.process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, *STOP_SIGNALS)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: list[_Rank], received: list[int], stop_within_s: float) -> int:
    first_came = None
    while True:
        codes = [rank.process.poll() for rank in ranks]
        if received:
            first_came = first_came or time.monotonic()
            limit = FORWARD_GRACE_S + (0.0 if signal.SIGINT in received else stop_within_s)
            if None not in codes or time.monotonic() > first_came + limit:
                return STOPPED if STOPPED in codes else 128 + received[0]
        else:
            if any(codes):
                return _explain(ranks)
            if None not in codes:
                return 0
        time.sleep(_POLL_S)


def _explain(ranks: list[_Rank]) -> int:
    """Show why ranks have failed; returns the exit code of the one to blame."""
    failed = [rank for rank in ranks if rank.process.returncode]
    # A rank that was killed says nothing, and whatever its peers say is about the lost connection.
    blamed = [rank for rank in failed if rank.trains and rank.process.returncode < 0]
    if not blamed:
        with suppress(subprocess.TimeoutExpired):
            ranks[0].process.wait(
                RANK_0_GRACE_S if any(rank.trains for rank in failed) else NODE_GRACE_S
            )
        if ranks[0].process.returncode in (USER_ERROR, RUN_ERROR):
            return _exit_code(ranks[0])  # the terminal shows its message
        blamed = [rank for rank in ranks if rank.process.returncode]
    for rank in blamed:
        _report(rank)
    return _exit_code(blamed[0])


def _stop(ranks: list[_Rank]) -> None:
    """Kill the ranks that still run, with their children: one has failed, the others hang."""
    alive = [rank.process for rank in ranks if rank.process.poll() is None]
    for process in alive:
        os.killpg(process.pid, signal.SIGKILL)
    for process in alive:
        process.wait()


def _exit_code(rank: _Rank) -> int:
    code = rank.process.returncode
    return code if code >= 0 else 128 - code


def _report(rank: _Rank) -> None:
    code = rank.process.returncode
    reason = f"exited with code {code}"
    if code < 0:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        reason = f"was killed by {signal.Signals(-code).name}{hint}"
    message = f"{rank.name} {reason}"
    if rank.log_path is not None:
        message += f"\nthe end of {rank.log_path}:\n{_tail(rank.log_path, rank.log_start)}"
    sys.stderr.write(f"{message}\n")


def _tail(path: Path, start: int) -> str:
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - 32768))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(f"  | {line}" for line in lines[-_TAIL_LINES:])
