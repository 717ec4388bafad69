"""A Slurm cluster of this machine's own programs: munged, slurmctld, and slurmd once per node.

Everything lives in one temporary folder and on free ports; nothing of the system's Slurm, if it
has one, is used or changed. As root every node has a /dev/shm of its own, like another machine, and
/etc/hosts names all nodes, so that a job of two nodes really is one of two hosts.
"""

import ctypes
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from tests.helpers.full_run import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_PR_SET_PDEATHSIG = 1

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
# A requeued job waits for the end of its old credential.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
# What a busy slurmd does not confirm in time is sent again a minute later. If that is srun's signal
# to end a step, and the job was requeued with so short a cred_expire, then the same step of the
# next start gets it.
MessageTimeout=60
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
MinJobAge=3600
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """What this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class SlurmCluster:
    """The cluster, as long as it is entered."""

    def __init__(self, nodes: int) -> None:
        """
        Args:
            nodes: node1, node2 ..., each with two processors.
        """
        # Short: a socket's path has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.names = [f"node{i}" for i in range(1, nodes + 1)]
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            "PATH": PATH,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "MEGATRON_CPGD_ROOT": str(ROOT),
            "PYTHON": sys.executable,
        }
        for name in ("GLOO_SOCKET_IFNAME", "PYTHONPATH"):  # the scripts have to find them
            self.environment.pop(name, None)

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(subprocess.SubprocessError):
            self.run("scancel", "--user", getpass.getuser())
            self._wait_until(lambda: not self.run("squeue", "--noheader").strip(), "empty queue")
        self._stop()

    def run(self, *command: object, folder: Path | None = None) -> str:
        """Output of a Slurm command, or of a script."""
        result = subprocess.run(
            list(map(str, command)),
            env=self.environment, cwd=folder, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        if result.returncode:
            raise subprocess.SubprocessError(f"{command}: {result.stdout}{result.stderr}")
        return result.stdout

    def submit(self, *arguments: object, folder: Path) -> "Job":
        """`sbatch ...` in a folder."""
        number = self.run("sbatch", "--parsable", "--time=60", *arguments, folder=folder)
        return Job(self, int(number), folder)

    def _start(self) -> None:
        user = getpass.getuser()
        ports = _free_ports(len(self.names) + 1)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} "
            "CPUs=2 RealMemory=1000"
            for name, port in zip(self.names, ports[1:], strict=True)
        )
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname(), port=ports[0], folder=self.folder, user=user, nodes=nodes
            )
        )
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munged.seed",
        )  # fmt: skip
        self._wait_until((self.folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D", "-c", "-f", self.environment["SLURM_CONF"])
        for name in self.names:
            (self.folder / f"spool-{name}").mkdir()
            self._daemon(*self._own_memory(), "slurmd", "-D", "-N", name)
        self._wait_until(self._all_idle, "idle nodes")

    def _own_memory(self) -> list[str]:
        """What makes of a command one of a machine with its own /dev/shm, if this is root."""
        if os.getuid() != 0:
            return []
        hosts = self.folder / "hosts"
        lines = [Path("/etc/hosts").read_text(), *(f"127.0.0.1 {name}" for name in self.names)]
        hosts.write_text("\n".join(lines) + "\n")
        script = 'mount -t tmpfs tmpfs /dev/shm && mount --bind "$0" /etc/hosts && exec "$@"'
        return ["unshare", "--mount", "--propagation", "private", "bash", "-c", script, str(hosts)]

    def _daemon(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=lambda: ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
                )
            )

    def _all_idle(self) -> bool:
        with suppress(subprocess.SubprocessError):
            states = self.run("sinfo", "--noheader", "--Node", "--format=%T").split()
            return set(states) == {"idle"}
        return False

    def _wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"no {what}:\n{self._logs()}"
            time.sleep(0.2)

    def _logs(self) -> str:
        return "\n".join(
            f"{file.name}:\n{file.read_text(errors='replace')[-2000:]}"
            for file in self.folder.glob("*.log")
        )

    def _stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Job:
    """A job that was submitted."""

    def __init__(self, cluster: SlurmCluster, number: int, folder: Path) -> None:
        """Use `SlurmCluster.submit`."""
        self._cluster = cluster
        self.number = number
        self._folder = folder

    @property
    def log(self) -> str:
        """What it has written so far."""
        return "".join(log.read_text() for log in self._folder.glob(f"*-{self.number}.log"))

    def details(self) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self._cluster.run("scontrol", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait_for_log(self, text: str, timeout_s: float = 240) -> None:
        """Until the log has this text."""
        self.wait_until(lambda: text in self.log, text, timeout_s)

    def wait(self, timeout_s: float = 300) -> dict[str, str]:
        """Until the job has ended for good; returns its details."""
        self.wait_until(self._has_ended, "end", timeout_s)
        return self.details()

    def _has_ended(self) -> bool:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.details()["JobState"] in ended

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 240) -> None:
        """Until the condition holds; the job must not end before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if what != "end" and self._has_ended():
                assert condition(), f"job {self.number} ended before {what!r}:\n{self.log}"
            assert time.monotonic() < deadline, f"job {self.number}: no {what!r}:\n{self.log}"
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
