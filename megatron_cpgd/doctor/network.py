"""Interfaces and ports. As a task of `srun`, one on every node: do the nodes reach each other, and
agree on the time?"""

import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_cpgd.doctor.host import Finding, Host
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.slurm import LOOPBACK, find_interface, is_free

MEETING_S = 60.0
"""Longest wait of the nodes for each other."""
MAX_SKEW_S = 2.0


def check_network(host: Host) -> Iterator[Finding]:
    """Interfaces, the port, and whether the nodes reach each other."""
    interfaces = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        name = host.environment.get(variable, "")
        # NCCL takes prefixes, lists, and ^ or = in front.
        known = [
            i for i in interfaces for part in name.strip("^=").split(",") if i.startswith(part)
        ]
        if name and not known:
            advice = f"unset it, or choose from {', '.join(interfaces)}"
            yield Finding(check=variable, status="FAIL", found=f"no {name} here", advice=advice)
    if host.nodes == 1 and "SLURM_JOB_ID" not in host.environment:
        return
    address, port = host.master
    try:
        interface = find_interface(address, port)
    except ConfigError as error:
        yield Finding(check="network", status="FAIL", found=str(error), advice="see above")
        return
    if host.node == 0 and not is_free(port):
        advice = "export another MASTER_PORT"
        found = f"port {port} is in use on this node"
        yield Finding(check="port", status="FAIL", found=found, advice=advice)
    elif host.nodes == 1:
        yield Finding(check="port", status="PASS", found=f"{port} is free")
    else:
        yield _meet(host, address, port)
        yield _interface_finding(interface, address)


def _interface_finding(interface: str | None, address: str) -> Finding:
    devices = [p.name for p in Path("/sys/class/infiniband").glob("*")]
    found = f"{interface} leads to {address}; InfiniBand: {', '.join(devices) or 'none'}"
    if interface in (None, LOOPBACK) and not _is_local(address):
        advice = "export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        return Finding(check="interface", status="WARN", found=found, advice=advice)
    return Finding(check="interface", status="PASS", found=found)


def _is_local(address: str) -> bool:
    return socket.gethostbyname(address).startswith("127.")


def _meet(host: Host, address: str, port: int) -> Finding:
    """Node 0 tells the others its time, at the place where the ranks will meet."""
    try:
        if host.node == 0:
            with socket.create_server(("", port), backlog=host.nodes) as server:
                deadline = time.monotonic() + MEETING_S
                for _ in range(host.nodes - 1):
                    server.settimeout(max(0.1, deadline - time.monotonic()))
                    with server.accept()[0] as connection:
                        connection.sendall(struct.pack("d", time.time()))
            return Finding(
                check="nodes", status="PASS", found=f"{host.nodes} reach {address}:{port}"
            )
        skew = _ask_time(address, port)
    except OSError as error:
        found = f"no connection over {address}:{port} within {MEETING_S:g} s ({error})"
        advice = "a firewall, or a name that resolves to the wrong address: export MASTER_ADDR"
        return Finding(check="nodes", status="FAIL", found=found, advice=advice)
    found = f"{address}:{port} answers, clocks differ by {abs(skew):.2f} s"
    if abs(skew) > MAX_SKEW_S:
        advice = "synchronise the clocks (chrony): logs and file times would be out of order"
        return Finding(check="nodes", status="WARN", found=found, advice=advice)
    return Finding(check="nodes", status="PASS", found=found)


def _ask_time(address: str, port: int) -> float:
    """Seconds by which node 0's clock is ahead."""
    deadline = time.monotonic() + MEETING_S
    while True:
        try:
            with socket.create_connection((address, port), timeout=5) as connection:
                start = time.time()
                answer = connection.recv(8, socket.MSG_WAITALL)
                if len(answer) == 8:
                    theirs: float = struct.unpack("d", answer)[0]
                    return theirs - (start + time.time()) / 2
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)
