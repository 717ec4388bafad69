"""What srun tells a task becomes what torchrun would have told it."""

import socket
import subprocess

import pytest

from megatron_cpgd.errors import ConfigError
from megatron_cpgd.slurm import adopt_step, find_interface, first_host, is_free, job_port


def step(**changes: str) -> dict[str, str]:
    """The third task of `srun --nodes=2 --ntasks-per-node=2`, on the second node."""
    return {
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": "localhost,node7",
        "SLURM_PROCID": "2",
        "SLURM_NODEID": "1",
        "SLURM_LOCALID": "0",
    } | changes


def place(environment: dict[str, str]) -> str:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    return " ".join(environment[name] for name in names.split())


def test_a_task_of_srun_is_a_rank():
    environment = step()
    adopt_step(environment)
    assert place(environment) == "2 4 0 2 localhost 23456"  # 20000 + 123456 % 10000
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"


def test_tasks_of_one_node_meet_on_the_loopback_whatever_its_name_resolves_to():
    environment = step(
        SLURM_STEP_TASKS_PER_NODE="4", SLURM_STEP_NODELIST="no-such-host", SLURM_NODEID="0"
    )
    adopt_step(environment)
    assert place(environment) == "2 4 0 4 127.0.0.1 23456"
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert "NCCL_SOCKET_IFNAME" not in environment


@pytest.mark.parametrize(("node", "tasks"), [("0", "3"), ("1", "3"), ("2", "1")])
def test_nodes_may_have_unequal_numbers_of_tasks(node, tasks):
    environment = step(SLURM_STEP_TASKS_PER_NODE="3(x2),1", SLURM_NODEID=node)
    environment["SLURM_STEP_NUM_TASKS"] = "7"
    adopt_step(environment)
    assert environment["LOCAL_WORLD_SIZE"] == tasks


def test_what_the_user_has_set_stays():
    environment = step(MASTER_ADDR="127.0.0.1", MASTER_PORT="1234", GLOO_SOCKET_IFNAME="ib0")
    adopt_step(environment)
    assert place(environment) == "2 4 0 2 127.0.0.1 1234"
    assert environment["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # the batch script
        step(SLURM_STEP_NUM_TASKS="1"),  # a shell: our launcher starts the ranks
        step(RANK="0"),  # torchrun inside a job
    ],
)
def test_anything_else_is_left_alone(environment):
    before = dict(environment)
    adopt_step(environment)
    assert environment == before


def test_a_port_that_is_taken_is_reported_by_rank_0():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert not is_free(port)
        environment = step(SLURM_PROCID="0", MASTER_PORT=str(port))
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port} on .* is in use .*=123456"):
            adopt_step(environment)
        adopt_step(step(MASTER_PORT=str(port)))  # another rank only connects
    assert is_free(port)


def test_a_host_that_nobody_knows_is_named():
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=nowhere.invalid does not resolve on"):
        adopt_step(step(SLURM_STEP_NODELIST="nowhere.invalid,node7"))


# As `scontrol show hostnames` expands them.
@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[1-2]", "node1"),
        ("gpu[003-007,9],cpu1", "gpu003"),
        ("b-7,a[1-2]", "b-7"),
        ("rack[2-3]n[04,06]", "rack2n04"),
        ("c[8,1-2].example.org,d", "c8.example.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_ports_lie_below_those_of_clients():
    assert {job_port({"SLURM_JOB_ID": str(job)}) for job in (0, 9999, 10000, 10**9)} <= {
        20000,
        29999,
    }


def test_the_interface_is_the_one_with_the_address_of_the_route():
    """For every address that this machine has."""
    listed = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    names = {name for _, name in socket.if_nameindex()}
    assert find_interface("127.0.0.1", 9) == "lo"
    for address in (each for each in listed if "." in each):
        # A host reaches its own addresses from themselves.
        assert find_interface(address, 9) in names - {"lo"}


def test_a_rank_that_is_alone_on_its_node_is_one_if_it_is_told_where_to_meet():
    """Its engines are on other nodes: a launcher here would start them beside it."""
    one = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NODEID": "0"}
    alone = step(**one, SLURM_PROCID="0", MASTER_ADDR="localhost")
    adopt_step(alone)
    assert place(alone) == "0 1 0 1 localhost 23456"
    shell = step(**one)
    adopt_step(shell)
    assert "RANK" not in shell
