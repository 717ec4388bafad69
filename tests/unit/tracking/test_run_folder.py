import importlib.metadata
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpgd.errors import ConfigError
from megatron_cpgd.tracking import folder_lock
from megatron_cpgd.tracking.run_folder import RunFolder


def test_files_lie_where_the_documentation_says():
    folder = RunFolder(Path("RUN"))
    assert folder.config == Path("RUN/config.yaml")
    assert folder.metrics == Path("RUN/metrics.jsonl")
    assert folder.rollouts(12) == Path("RUN/rollouts/step_000012.jsonl")
    assert folder.checkpoint(120) == Path("RUN/checkpoints/step_000120")
    assert folder.hf(120) == Path("RUN/hf/step_000120")
    assert folder.log(3) == Path("RUN/logs/rank_3.log")


def test_checkpoints_are_listed_by_step_without_unfinished_ones(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.checkpoint_steps() == []
    for step in (1_000_000, 20, 3):
        folder.checkpoint(step).mkdir(parents=True)
    (folder.checkpoints / "step_000030.partial").mkdir()
    (folder.checkpoints / "latest").write_text("step_000020")
    for kept_aside in ("step_000020_best", "step_000100_2", "step_good"):
        (folder.checkpoints / kept_aside).mkdir()
    assert folder.checkpoint_steps() == [3, 20, 1_000_000]
    assert folder.done == 20


def test_versions_are_those_that_are_installed(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write_versions()
    versions = json.loads(folder.versions.read_text())
    assert versions["torch"] == f"torch {importlib.metadata.version('torch')}"
    assert versions["python"].startswith("3.12")
    for name in ("megatron_core", "vllm", "transformers", "transformer_engine", "apex"):
        assert versions[name], name
    assert all(isinstance(value, str) for value in versions.values())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["versions.json"]


HOLDER = """
import socket, sys
from pathlib import Path
from megatron_cpgd.tracking.run_folder import RunFolder
socket.gethostname = lambda: sys.argv[2]
with RunFolder(Path(sys.argv[1])).claim():
    print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Start another process that claims the folder, on a host of that name."""
    started: list[subprocess.Popen[str]] = []

    def start(host: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(tmp_path / "run"), host]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        assert started[-1].stdout.readline() == "claimed\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


# The lock of a host that has died stays for some time, that of a process on this one does not.
@pytest.mark.parametrize(("host", "grace"), [(socket.gethostname(), "END_S"), ("far", "LEASE_S")])
def test_a_second_run_is_refused_as_long_as_the_first_one_lives(
    tmp_path, holder, monkeypatch, host, grace
):
    for name in ("END_S", "LEASE_S"):
        monkeypatch.setattr(folder_lock, name, 0.3 if name == grace else 60.0)
    first = holder(host)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(
        ConfigError, match=rf"another process writes .*\({host}, process {first.pid}\)"
    ):
        folder.claim().__enter__()
    first.kill()
    monkeypatch.setattr(folder_lock, grace, 60.0)
    with folder.claim():
        pass
    with folder.claim():
        pass
