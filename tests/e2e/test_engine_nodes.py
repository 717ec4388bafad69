"""Runs whose engines are on nodes of their own, which here are processes with another host name."""

import os
import signal

import pytest

from megatron_cpgd.weight_sync.shared_memory import SHARED_MEMORY
from tests.helpers.full_run import (
    Command,
    read_rows,
    run_cli,
    settings,
    write_assets,
    write_yaml,
)

WEIGHTS = "hf/step_000006/model.safetensors"
ELSEWHERE = ("time/", "perf/", "weights/network_")


def assert_same_run(expected, actual) -> None:
    assert (expected / WEIGHTS).read_bytes() == (actual / WEIGHTS).read_bytes()
    for left, right in zip(
        read_rows(expected / "metrics.jsonl"), read_rows(actual / "metrics.jsonl"), strict=True
    ):
        same = {name for name in left | right if not name.startswith(ELSEWHERE)}
        assert {name: left[name] for name in same} == {name: right[name] for name in same}
    for step in (1, 6):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (expected / name).read_bytes() == (actual / name).read_bytes()


def node(command: Command, number: int) -> int:
    """Process id of an engine node."""
    mark = f"megatron_cpgd.cli serve --node={number} "
    [pid] = [pid for pid, line in command.processes().items() if mark in line]
    return pid


def test_a_run_whose_engine_node_is_killed_ends_like_an_undisturbed_one(complete_run, tmp_path):
    """In one run, for the time it takes: killed, resumed, compared with an engine beside rank 0."""
    run_dir = tmp_path / "run"
    arguments = ("train", complete_run.yaml, f"run.dir={run_dir}", "rollout.nodes=1")
    with Command(*arguments, folder=tmp_path) as command:
        command.wait_for_output("exported step 2")
        killed = node(command, 0)
        os.kill(killed, signal.SIGKILL)
        finished = command.wait()
        command.wait_until_nothing_runs(60)
    assert finished.code == 3, finished.err
    assert "engine node 0 on engine_node_0 is lost: its process has ended" in finished.err
    assert f"last lines of {run_dir}/logs/engine_node_0.log" in finished.err
    assert "Traceback" not in finished.err
    assert not list(SHARED_MEMORY.glob(f"megatron_cpgd_{killed}*"))

    finished = run_cli(*arguments, folder=tmp_path)
    assert finished.code == 0, finished.err
    assert_same_run(complete_run.dir, run_dir)
    row = read_rows(run_dir / "metrics.jsonl")[-1]
    assert row["weights/network_bytes"] == row["weights/bytes"]
    assert row["weights/network_s"] > 0
    assert not (run_dir / "engine_nodes.key").exists()


@pytest.mark.slow
def test_a_killed_engine_of_a_node_ends_the_run(assets, tmp_path):
    content = settings(assets) | {"run": {"dir": str(tmp_path / "run"), "steps": 50}}
    content["rollout"] |= {"engines": 2, "nodes": 1}
    with Command("train", write_yaml(tmp_path / "a.yaml", content), folder=tmp_path) as command:
        command.wait_for_output("exported step 2")
        engine, _ = (pid for pid, line in command.processes().items() if "vllm_server" in line)
        os.kill(engine, signal.SIGKILL)
        finished = command.wait()
        command.wait_until_nothing_runs(60)
    assert finished.code == 3, finished.err
    assert "engine node 0 on engine_node_0: " in finished.err
    assert "the engine was killed by SIGKILL (out of memory?)" in finished.err


# The last one has R3 and experts, whose weights and routes travel.
@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "overlap", "pieces", "experts"])
def test_two_nodes_do_what_two_engines_beside_rank_0_do(assets, tmp_path, case):
    content = settings(assets) | {"parallel": {"dp": 2}}
    content["rollout"] |= {"engines": 2}
    match case:
        case "overlap":
            content["rollout"] |= {"staleness": 1, "overlap": True}
        case "pieces":
            content["rollout"] |= {"staleness": 1, "piece_tokens": 4}
        case "experts":
            content["model"]["path"] = str(write_assets(tmp_path / "moe", experts=4) / "model")
            content["parallel"] |= {"ep": 2}
            content["algorithm"]["routing_replay"] = "rollout"
    for nodes in (0, 2):
        content["run"]["dir"] = str(tmp_path / f"run_{nodes}")
        content["rollout"]["nodes"] = nodes
        yaml = write_yaml(tmp_path / f"{nodes}.yaml", content)
        finished = run_cli("train", yaml, folder=tmp_path)
        assert finished.code == 0, finished.err
    assert_same_run(tmp_path / "run_0", tmp_path / "run_2")
    row = read_rows(tmp_path / "run_2" / "metrics.jsonl")[-1]
    assert row["weights/network_bytes"] == 2 * row["weights/bytes"]


@pytest.mark.slow
def test_a_wrong_setting_of_the_engines_is_one_message(complete_run, tmp_path):
    finished = run_cli(
        "train", complete_run.yaml, f"run.dir={tmp_path / 'run'}", "rollout.nodes=1",
        "rollout.engine_args.dtype=half", folder=tmp_path,
    )  # fmt: skip
    assert finished.code == 2, finished.err
    assert "engine node 0 on engine_node_0: rollout.engine_args.dtype is set" in finished.err
