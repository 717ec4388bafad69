"""`megatron-cpgd serve` before it meets rank 0; the rest is tested with whole runs."""

import subprocess
import sys
import time

import pytest

from megatron_cpgd import serve
from megatron_cpgd.cli import main
from megatron_cpgd.config.load import load_config
from megatron_cpgd.errors import ConfigError, RolloutError
from megatron_cpgd.rollout import start
from megatron_cpgd.rollout.node_messages import Hello, Pulse
from megatron_cpgd.tracking.run_folder import RunFolder
from tests.helpers.valid_run import write_run


@pytest.fixture
def run_yaml(tmp_path):
    return write_run(tmp_path)


@pytest.mark.parametrize("which", [["--node=2"], []])
def test_a_node_that_the_run_does_not_have_is_refused(run_yaml, capsys, monkeypatch, which):
    monkeypatch.setenv("SLURM_PROCID", "2")
    code = main(["serve", *which, str(run_yaml), "rollout.nodes=2", "rollout.engines=2"])
    assert code == 2
    assert "this is engine node 2, and rollout.nodes=2: expected" in capsys.readouterr().err


def test_a_node_that_rank_0_does_not_let_in_says_what_it_waited_for(run_yaml):
    command = [sys.executable, "-m", "megatron_cpgd.cli", "serve", "--node=0", str(run_yaml)]
    settings = ["rollout.nodes=1", "rollout.start_timeout_s=0.1"]
    result = subprocess.run([*command, *settings], capture_output=True, text=True)
    assert result.returncode == 3
    assert "rank 0 has not let it in within 0.1 s (rollout.start_timeout_s)" in result.stderr
    assert "engine_nodes.key, on a file system that all nodes share" in result.stderr


def test_a_node_leaves_when_rank_0_is_silent_and_not_before(run_yaml, tmp_path, monkeypatch):
    class Channel:
        """Rank 0 sends 20 pulses and no more."""

        pulses = 0

        def exchange(self, wait_s: float) -> list[Pulse]:
            time.sleep(wait_s)
            self.pulses += 1
            return [Pulse()] if self.pulses <= 20 else []

        def send(self, message: Pulse) -> None:
            pass

    monkeypatch.setattr(serve, "PULSE_S", 0.01)
    monkeypatch.setattr(serve, "SILENCE_S", 0.05)
    monkeypatch.setattr(serve, "_start_thread", lambda *_: None)
    config, channel = load_config(run_yaml, ["rollout.nodes=1"]), Channel()
    node = serve._Server(config, RunFolder(tmp_path), Hello(node=0, host="here"), channel)
    with pytest.raises(RolloutError, match=r"rank 0 has been silent for 0\.05 s"):
        node.run()
    assert channel.pulses > 20


def test_an_engine_elsewhere_is_refused_where_engines_start_on_this_machine(run_yaml, tmp_path):
    config = load_config(run_yaml, ["rollout.nodes=1"])
    with pytest.raises(ConfigError, match=r"rollout\.nodes=1: this command starts its engines"):
        start.start_engine(config, tmp_path / "engine.log")


@pytest.mark.parametrize(
    ("settings", "gpus", "expected"),
    [
        (["rollout.engines=4"], 4, [("engine.log", [0, 1]), ("engine_1.log", [2, 3])]),
        (["rollout.engines=2"], 4, [("engine.log", None)]),  # all that are there
        (
            ["rollout.engines=4", "rollout.devices=[1,3]"],
            4,
            [("engine.log", [1]), ("engine_1.log", [3])],
        ),
    ],
)
def test_engines_of_a_node_share_its_gpus(
    run_yaml, tmp_path, monkeypatch, settings, gpus, expected
):
    started = []
    monkeypatch.setattr("megatron_cpgd.rollout.vllm_engine.has_cpu_build", lambda: False)
    monkeypatch.setattr(
        start,
        "VllmEngine",
        lambda *_, devices, log_path, **__: started.append((log_path.name, devices)),
    )
    config = load_config(run_yaml, ["rollout.nodes=2", *settings])
    for engine in range(config.rollout.engines_per_node):
        start.start_engine_of_node(config, tmp_path / "engine.log", 0, engine, gpus)
    assert started == expected


def test_gpus_that_cannot_be_shared_evenly_are_refused(run_yaml, tmp_path):
    config = load_config(run_yaml, ["rollout.nodes=1", "rollout.engines=3"])
    with pytest.raises(ConfigError, match="3 engines cannot share the 8 GPUs of engine node 0"):
        start.start_engine_of_node(config, tmp_path / "engine.log", 0, 0, 8)
