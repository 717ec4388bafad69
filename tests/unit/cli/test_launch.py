"""Real little processes: what a rank sees, and what happens when one of them ends badly."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_cpgd import launch
from megatron_cpgd.errors import STOPPED
from megatron_cpgd.launch import launch_ranks

LAUNCHER = """
import sys
from pathlib import Path
from megatron_cpgd.launch import launch_ranks
sys.exit(launch_ranks([sys.executable, sys.argv[1]], 2, Path(sys.argv[2])))
"""


@pytest.fixture
def rank_program(tmp_path: Path):
    """Writes the program of a rank; it finds `rank` and the `folder` to leave its marks in."""

    def write(body: str) -> list[str]:
        path = tmp_path / "rank.py"
        path.write_text(
            "import os, signal, sys, time\nfrom pathlib import Path\n"
            f"folder, rank = Path({str(tmp_path)!r}), int(os.environ['RANK'])\n{body}"
        )
        return [sys.executable, str(path)]

    return write


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)
    return path.read_text()


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and "Z" not in _state(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.02)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


MARK = "(folder / f'pid_{rank}').write_text(str(os.getpid()))\n"


def test_each_rank_is_told_its_place(tmp_path, rank_program):
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT GLOO_SOCKET_IFNAME"
    argv = rank_program(
        f"(folder / f'env_{{rank}}').write_text(' '.join(os.environ[n] for n in {names.split()}))"
    )
    assert launch_ranks(argv, 3, tmp_path / "logs") == 0
    places = [(tmp_path / f"env_{rank}").read_text().split() for rank in range(3)]
    port = places[0][5]
    assert 1023 < int(port) < 32768  # who asks Linux for any port gets a higher one
    for rank, place in enumerate(places):
        assert place == [str(rank), str(rank), "3", "3", "127.0.0.1", port, "lo"]


def test_rank_0_has_the_terminal_and_the_others_a_log(tmp_path, rank_program, capfd):
    argv = rank_program("print('out', rank)\nprint('err', rank, file=sys.stderr)")
    assert launch_ranks(argv, 2, tmp_path / "logs") == 0
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("out 0\n", "err 0\n")
    assert (tmp_path / "logs" / "rank_1.log").read_text() == "out 1\nerr 1\n"
    assert not (tmp_path / "logs" / "rank_0.log").exists()


def test_a_failing_rank_stops_the_others_and_gives_the_exit_code(tmp_path, rank_program, capfd):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_1.log").write_text("an earlier run\n")
    argv = rank_program(
        MARK + "if rank == 1:\n"
        "    while not (folder / 'pid_0').exists(): time.sleep(0.01)\n"
        "    print('the reason'); sys.exit(7)\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    assert launch_ranks(argv, 2, tmp_path / "logs") == 7
    assert time.monotonic() - start < 30  # rank 0 did not sleep on
    wait_until_gone(int((tmp_path / "pid_0").read_text()))
    message = capfd.readouterr().err
    assert "rank 1 exited with code 7" in message
    assert "| the reason" in message
    assert "an earlier run" not in message


def test_a_killed_rank_is_named_with_its_signal(tmp_path, rank_program, capfd):
    argv = rank_program("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(60)")
    assert launch_ranks(argv, 2, tmp_path / "logs") == 128 + 9
    assert "rank 1 was killed by SIGKILL (out of memory?)" in capfd.readouterr().err


@pytest.mark.parametrize("code", [2, 3])
def test_rank_0_alone_explains_what_ends_all_ranks(tmp_path, rank_program, capfd, code):
    """Rank 1 is the first to end, and its log says the same: the user reads it once."""
    argv = rank_program(
        f"time.sleep(0.3 * (rank == 0)); print('the reason', file=sys.stderr); sys.exit({code})"
    )
    assert launch_ranks(argv, 2, tmp_path / "logs") == code
    assert capfd.readouterr().err == "the reason\n"


def test_a_rank_that_fails_alone_is_shown_although_it_explains_itself(
    tmp_path, rank_program, capfd, monkeypatch
):
    monkeypatch.setattr(launch, "RANK_0_GRACE_S", 0.2)
    argv = rank_program("if rank == 1: print('the reason'); sys.exit(2)\ntime.sleep(60)")
    assert launch_ranks(argv, 2, tmp_path / "logs") == 2
    assert "| the reason" in capfd.readouterr().err


def test_a_rank_that_ignores_sigterm_does_not_outlive_another_that_failed(tmp_path, rank_program):
    argv = rank_program(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + MARK + "if rank == 1:\n"
        "    while not (folder / 'pid_0').exists(): time.sleep(0.01)\n"
        "    sys.exit(3)\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    assert launch_ranks(argv, 2, tmp_path / "logs") == 3
    assert time.monotonic() - start < 30
    wait_until_gone(int((tmp_path / "pid_0").read_text()))


def test_a_command_that_does_not_exist_leaves_no_process(tmp_path):
    with pytest.raises(FileNotFoundError):
        launch_ranks([str(tmp_path / "nothing")], 2, tmp_path / "logs")


@pytest.fixture
def launcher(tmp_path, rank_program):
    """A launcher process with two running ranks, and their process ids."""
    started: list[subprocess.Popen[str]] = []

    def start(body: str) -> tuple[subprocess.Popen[str], list[int]]:
        _, program = rank_program(body)
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, program, str(tmp_path / "logs")],
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process, [int(wait_for(tmp_path / f"pid_{rank}")) for rank in range(2)]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_a_signal_is_forwarded_so_that_ranks_can_clean_up(launcher, tmp_path, number, code):
    process, pids = launcher(
        "def stop(number, _):\n"
        "    (folder / f'clean_{rank}').write_text(str(number)); sys.exit(0)\n"
        f"signal.signal({int(number)}, stop)\n" + MARK + "time.sleep(60)"
    )
    process.send_signal(number)
    assert process.wait(30) == code
    for rank, pid in enumerate(pids):
        assert (tmp_path / f"clean_{rank}").read_text() == str(int(number))
        wait_until_gone(pid)


def test_the_exit_code_says_that_ranks_have_stopped_as_asked(launcher):
    process, _ = launcher(
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(200 * (rank == 1)))\n"
        + MARK
        + "time.sleep(60)"
    )
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == STOPPED == 200


def test_ranks_die_with_a_launcher_that_was_killed(launcher):
    process, pids = launcher(MARK + "time.sleep(60)")
    os.kill(process.pid, signal.SIGKILL)
    for pid in pids:
        wait_until_gone(pid)


def test_an_engine_node_believes_in_another_host_and_gets_no_signal(tmp_path, rank_program):
    """It ends when rank 0 does; here it looks for a mark."""
    node = tmp_path / "node.py"
    node.write_text(
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "signal.signal(signal.SIGUSR1, lambda *_: (folder / 'signalled').touch())\n"
        "(folder / 'host').write_text(os.environ['SLURMD_NODENAME'])\n"
        "while not (folder / 'done').exists(): time.sleep(0.01)\n"
    )
    argv = rank_program(
        "def stop(*_): (folder / 'done').touch(); sys.exit(200)\n"
        "signal.signal(signal.SIGUSR1, stop)\n"
        "while not (folder / 'host').exists(): time.sleep(0.01)\n"
        "os.kill(os.getppid(), signal.SIGUSR1); time.sleep(60)"
    )
    nodes = [[sys.executable, str(node)]]
    assert launch_ranks(argv, 1, tmp_path / "logs", engine_nodes=nodes) == STOPPED
    assert (tmp_path / "host").read_text() == "engine_node_0"
    assert not (tmp_path / "signalled").exists()
    assert (tmp_path / "logs" / "engine_node_0.log").exists()


def test_rank_0_gives_the_reason_when_an_engine_node_is_killed(tmp_path, rank_program, capfd):
    nodes = [[sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]]
    argv = rank_program("time.sleep(1); print('the reason', file=sys.stderr); sys.exit(3)")
    assert launch_ranks(argv, 1, tmp_path / "logs", engine_nodes=nodes) == 3
    assert capfd.readouterr().err == "the reason\n"


def test_an_engine_node_that_rank_0_never_met_is_named(tmp_path, rank_program, capfd, monkeypatch):
    monkeypatch.setattr(launch, "NODE_GRACE_S", 0.2)
    nodes = [[sys.executable, "-c", "import sys; print('the reason'); sys.exit(2)"]]
    argv = rank_program("time.sleep(60)")
    assert launch_ranks(argv, 1, tmp_path / "logs", engine_nodes=nodes) == 2
    message = capfd.readouterr().err
    assert "engine node 0 exited with code 2" in message
    assert "| the reason" in message
