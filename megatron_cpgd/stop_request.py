"""Requests to stop: the signals of this process, when they are acted on, and the latest end."""

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from megatron_cpgd.errors import STOPPED

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""Save and stop. Further ones change nothing: Slurm may send several."""
_POLL_S = 0.2
_INTERRUPT = signal.SIGUSR2
"""What the watching thread sends to the main thread, to end a wait there."""


class StopRequested(Exception):
    """Raised in what is interruptible when a request to stop has come."""


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self.asked = False
        """Set by the thread of `stop_on_signals`."""
        self.has_work = False
        """Whether there may be a step to end and to save."""
        self.advanced = False
        """Whether a checkpoint was written since this start: a further start gets further."""
        self.signal = signal.SIGUSR1
        """The one that came."""
        self.late_at = math.inf
        """When half of the time to stop is over, by `time.monotonic`."""
        self._interrupts = False

    @property
    def exit_code(self) -> int:
        """STOPPED if starting again makes sense, else as if the signal had killed the process."""
        return STOPPED if self.advanced else 128 + self.signal

    @property
    def late(self) -> bool:
        """Whether what the run can do without has to be given up, so that it ends in time."""
        return time.monotonic() > self.late_at

    def interrupt(self) -> None:
        """Inside `interruptible` raise StopRequested, once, if the process was asked to stop."""
        if self.asked and self._interrupts:
            self._interrupts = False
            raise StopRequested

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """StopRequested ends the block wherever it is; at once if the request came before."""
        self._interrupts = True
        try:
            if self.asked:
                raise StopRequested
            yield
        finally:
            self._interrupts = False


@contextmanager
def stop_on_signals(within_s: float) -> Iterator[StopRequest]:
    """STOP_SIGNALS ask to stop. A process that has not left the block `within_s` later ends there.

    Without work to save it ends at once.

    The signals are blocked here, and so in what is started inside: Slurm sends them to the engine
    and to the reward workers too. A thread of its own takes them, since the main thread runs no
    handler while it waits inside a collective. Call it from the main thread.
    """
    stop = StopRequest()
    left = threading.Event()
    receiver, sender = socket.socketpair()
    receiver.settimeout(_POLL_S)
    sender.setblocking(False)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # For STOP_SIGNALS too: multiprocessing unblocks SIGTERM in the thread that starts a process.
    handlers = {
        number: signal.signal(number, lambda *_: stop.interrupt())
        for number in (*STOP_SIGNALS, _INTERRUPT)
    }
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(receiver, stop, left, within_s), daemon=True)
    watch.start()
    try:
        yield stop
    finally:
        left.set()
        watch.join()
        signal.set_wakeup_fd(wakeup)
        sender.close()
        receiver.close()
        if stop.asked:  # it is about to end, while srun already signals the slower ranks
            handlers |= dict.fromkeys(STOP_SIGNALS, signal.SIG_IGN)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _watch(
    receiver: socket.socket, stop: StopRequest, left: threading.Event, within_s: float
) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    while not stop.asked:
        if left.is_set():
            return
        with suppress(TimeoutError):
            number = receiver.recv(1)[0]  # the interpreter writes the number of every signal
            if number in STOP_SIGNALS:
                stop.signal = signal.Signals(number)
                stop.late_at = time.monotonic() + within_s / 2
                stop.asked = True
    signal.pthread_kill(threading.main_thread().ident or 0, _INTERRUPT)
    if stop.has_work and left.wait(within_s):
        return
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(
            f"the step did not end within checkpoint.stop_within_s={within_s:g}: stopped without "
            "saving it; the same command goes on from the last checkpoint\n"
            if stop.has_work
            else "stopped before there was anything to save\n"
        )
        sys.stderr.flush()
    os._exit(stop.exit_code)
