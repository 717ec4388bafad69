"""A real process, its signals, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from megatron_cpgd.stop_request import StopRequest, StopRequested

CHILD = "import os, time; os.write(1, b'child\\n'); os.close(1); os.close(2); time.sleep(30)"
PROGRAM = (
    f"CHILD = {CHILD!r}"
    + """
import subprocess, sys, time
from megatron_cpgd.stop_request import StopRequested, stop_on_signals
with stop_on_signals({within_s}) as stop:
    child = subprocess.Popen([sys.executable, "-c", CHILD])
    stop.has_work = {has_work}
    try:
        {body}
    finally:
        survived = child.poll() is None
        child.kill()
{after}
print("left", survived, flush=True)
"""
)
UNTIL_ASKED = "while not stop.asked: time.sleep(0.01)"


@pytest.fixture
def process() -> Iterator:
    """Starts PROGRAM, sends a signal to it and its child, and returns its exit code and output."""
    started: list[subprocess.Popen[str]] = []

    def run(body: str, number: signal.Signals, *, within_s=30.0, has_work=True, after=""):
        text = PROGRAM.format(body=body, within_s=within_s, has_work=has_work, after=after)
        each = subprocess.Popen(
            [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        started.append(each)
        assert each.stdout.readline() == "child\n"
        os.killpg(each.pid, number)  # as Slurm does it: every process of the rank
        out, err = each.communicate(timeout=30)
        return each.returncode, out, err

    yield run
    for each in started:
        with suppress(ProcessLookupError):
            os.killpg(each.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_asks_and_the_children_do_not_notice(process, number):
    assert process(UNTIL_ASKED, number) == (0, "left True\n", "")


def test_a_process_that_is_about_to_end_is_not_killed_by_a_second_signal(process):
    """As when srun ends the ranks that are slower than the first one to leave."""
    # Ignored, not handled: handlers are gone when the interpreter ends, which takes torch seconds.
    after = (
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN"
    )
    assert process(UNTIL_ASKED, signal.SIGUSR1, after=after) == (0, "left True\n", "")


def test_a_signal_asks_although_multiprocessing_has_unblocked_it(process):
    body = f"""
        from multiprocessing import resource_tracker
        resource_tracker.ensure_running()
        {UNTIL_ASKED}"""
    assert process(body, signal.SIGTERM) == (0, "left True\n", "")


def test_what_is_interruptible_ends_at_once(process):
    body = """
        try:
            with stop.interruptible():
                time.sleep(20)
        except StopRequested: print("interrupted")"""
    start = time.monotonic()
    code, out, _ = process(body, signal.SIGUSR1)
    assert (code, out) == (0, "interrupted\nleft True\n")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("number", "advanced", "code"),
    [
        (signal.SIGUSR1, True, 200),
        (signal.SIGUSR1, False, 138),
        (signal.SIGTERM, True, 200),
        (signal.SIGTERM, False, 143),
    ],
)
def test_a_step_that_takes_too_long_is_given_up(process, number, advanced, code):
    # A lock is never released: no Python code of the main thread runs, as in a collective.
    hang = "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()"
    body = f"stop.advanced = {advanced}; {hang}"
    returned, out, err = process(body, number, within_s=0.3)
    assert (returned, out) == (code, "")
    assert "did not end within checkpoint.stop_within_s=0.3" in err


def test_a_run_gives_up_what_it_can_do_without_when_half_of_the_time_is_over(process):
    lines = (
        UNTIL_ASKED,
        "print(stop.late, 5 < stop.late_at - time.monotonic() <= 15, flush=True)",
        "stop.late_at -= 15",
        "print(stop.late, flush=True)",
    )
    code, out, err = process("\n        ".join(lines), signal.SIGUSR1, within_s=30.0)
    assert (code, out) == (0, "False True\nTrue\nleft True\n"), err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 138), (signal.SIGTERM, 143)])
def test_without_work_there_is_nothing_to_wait_for(process, number, code):
    returned, _, err = process("time.sleep(20)", number, has_work=False)
    assert returned == code
    assert err == "stopped before there was anything to save\n"


def test_a_request_that_came_before_ends_the_block_before_it_begins():
    stop, begun = StopRequest(), False
    stop.asked = True
    with pytest.raises(StopRequested), stop.interruptible():
        begun = True
    assert not begun
    stop.interrupt()  # outside of the block it raises nothing
