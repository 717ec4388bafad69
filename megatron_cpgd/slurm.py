"""A rank's place in the world, read from what `srun` tells each of its tasks. No torch.

https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
"""

import fcntl
import os
import re
import socket
import struct
from collections.abc import Mapping, MutableMapping

from megatron_cpgd.errors import ConfigError

FIRST_PORT, PORTS = 20000, 10000
"""MASTER_PORT lies in this range: below the ports that Linux hands out to clients (32768)."""
LOOPBACK = "lo"
_SIOCGIFADDR = 0x8915


def adopt_step(environment: MutableMapping[str, str]) -> None:
    """Under `srun` with several tasks: set RANK, WORLD_SIZE ... as torchrun would. Else nothing.

    A step of one task is no distributed run, unless MASTER_ADDR is set: it may be a shell, in which
    our launcher starts the ranks. What the user has set (RANK, MASTER_ADDR, MASTER_PORT,
    *_SOCKET_IFNAME) stays.

    Raises:
        ConfigError: the ranks could not meet: the port is taken, or the host is unknown.
    """
    tasks = read_number(environment, "SLURM_STEP_NUM_TASKS", "0")
    if "RANK" in environment or not tasks or (tasks == 1 and "MASTER_ADDR" not in environment):
        return
    place = rank_place(environment)
    for name, value in place.items():
        environment.setdefault(name, value)
    address, port = environment["MASTER_ADDR"], read_number(environment, "MASTER_PORT")
    interface = find_interface(address, port)
    if interface is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        if place["LOCAL_WORLD_SIZE"] != place["WORLD_SIZE"] or interface != LOOPBACK:
            environment.setdefault("NCCL_SOCKET_IFNAME", interface)
    if environment["RANK"] == "0" and not is_free(port):
        raise ConfigError(
            f"MASTER_PORT={port} on {socket.gethostname()} is in use (it follows from "
            f"SLURM_JOB_ID={environment.get('SLURM_JOB_ID')}); export another MASTER_PORT"
        )


def read_number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    """A variable that srun, torchrun or the user sets.

    Raises:
        ConfigError: it is not set, or is no number.
    """
    value = environment.get(name, default)
    if not value.isdecimal():
        found = f"got {value!r}" if name in environment else "it is not set"
        raise ConfigError(f"environment variable {name}: expected a number, {found}; export it")
    return int(value)


def check_rank(environment: Mapping[str, str]) -> None:
    """
    Raises:
        ConfigError: what a launcher sets for a rank is missing, or contradicts itself.
    """
    rank, world = (read_number(environment, name) for name in ("RANK", "WORLD_SIZE"))
    if rank >= world:
        raise ConfigError(
            f"RANK={rank} is not below WORLD_SIZE={world}: ranks are numbered from 0; unset RANK "
            "to let `megatron-cpgd train` start them itself"
        )
    read_number(environment, "MASTER_PORT")
    if not environment.get("MASTER_ADDR"):
        raise ConfigError("RANK is set, but MASTER_ADDR is not: export the host of rank 0")


def rank_place(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of torchrun for one task of a step."""
    world, here = environment["SLURM_STEP_NUM_TASKS"], _tasks_on_this_node(environment)
    one_host = str(here) == world
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": world,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": "127.0.0.1" if one_host else first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(job_port(environment)),
    }


def job_port(environment: Mapping[str, str]) -> int:
    """The same port for all ranks of a job, most likely another one for another job."""
    return FIRST_PORT + int(environment["SLURM_JOB_ID"]) % PORTS


def first_host(nodes: str) -> str:
    """The first name of a node list: `gpu[003-007,9],cpu1` gives `gpu003`."""
    [first] = re.findall(r"^(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def host_name() -> str:
    """The host of this process. Ranks with the same one share its memory."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def find_interface(address: str, port: int) -> str | None:
    """The network interface through which `address` is reached; None if it cannot be told.

    By default gloo takes the interface that this host's own name resolves to, which often is a
    loopback address that no other host can reach.

    Raises:
        ConfigError: the address does not resolve.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))  # sends nothing, but chooses the route
        except socket.gaierror as error:
            raise ConfigError(
                f"MASTER_ADDR={address} does not resolve on {socket.gethostname()} "
                f"({error.strerror}); export MASTER_ADDR with an address of the first node"
            ) from error
        except OSError:
            return None
        mine = probe.getsockname()[0]
        if mine.startswith("127."):
            return LOOPBACK
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == mine:
                return name
    return None


def is_free(port: int) -> bool:
    """Whether a server could listen on the port of this host."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closing connections may stay
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _tasks_on_this_node(environment: Mapping[str, str]) -> int:
    """Of `2(x3),1`: three nodes with two tasks, then one with one."""
    nodes: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, _, repeated = part.rstrip(")").partition("(x")
        nodes += [int(tasks)] * int(repeated or 1)
    return nodes[int(environment["SLURM_NODEID"])]
