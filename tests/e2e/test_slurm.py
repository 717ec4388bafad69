"""slurm/train_cpgd.sh on a real Slurm of this machine: ranks by srun, preemption, two hosts."""

import csv
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import full_run
from tests.helpers.full_run import ROOT, read_rows, settings, write_yaml
from tests.helpers.slurm_cluster import Job, SlurmCluster, missing_programs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"no Slurm: {', '.join(missing_programs())} not found; `make test-slurm` says more",
    ),
]
SCRIPT = ROOT / "slurm" / "train_cpgd.sh"
WEIGHTS = "hf/step_000006/model.safetensors"


@pytest.fixture(scope="module")
def cluster():
    with SlurmCluster(nodes=2) as cluster:
        yield cluster


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that has ended, and the run it was about."""

    details: dict[str, str]
    log: str
    dir: Path


@pytest.fixture(scope="module")
def submit(cluster, assets, tmp_path_factory):
    """Submits a run of two pipeline stages; its paths have spaces."""

    def start(name: str, *options: str, settings: Sequence[str] = ()) -> tuple[Job, Path]:
        folder = tmp_path_factory.mktemp(f"{name} ")
        content = full_run.settings(assets) | {"parallel": {"pp": 2}}
        content["run"]["dir"] = str(folder / "the run")
        yaml = write_yaml(folder / "a run.yaml", content)
        job = cluster.submit(*options, SCRIPT, yaml, *settings, folder=folder)
        return job, folder / "the run"

    return start


@pytest.fixture(scope="module")
def undisturbed(submit) -> Ended:
    job, folder = submit("undisturbed")
    return Ended(job.wait(), job.log, folder)


@pytest.fixture(scope="module")
def preempted(cluster, submit) -> Ended:
    job, folder = submit("preempted")
    job.wait_for_log("0 FAIL")  # the preflight; the ranks start
    job.wait_until(lambda: find_rank(job.number, 0) is not None, "rank 0")
    urgent = ("--partition=urgent", "--nodelist=node1", "--exclusive", "--wrap=true")
    cluster.submit(*urgent, folder=folder.parent)
    job.wait_for_log("step 3/6")
    cluster.run("scancel", "--signal=USR1", job.number)
    return Ended(job.wait(), job.log, folder)


@pytest.fixture(scope="module")
def on_two_nodes(submit) -> Ended:
    if os.getuid() != 0:
        pytest.skip("only root can give each node a /dev/shm of its own")
    job, folder = submit("on_two_nodes", "--nodes=2")
    return Ended(job.wait(), job.log, folder)


@pytest.fixture(scope="module")
def with_engine_node(submit) -> Ended:
    if os.getuid() != 0:
        pytest.skip("only root can give each node a /dev/shm of its own")
    job, folder = submit("with_engine_node", "--nodes=2", settings=["rollout.nodes=1"])
    return Ended(job.wait(), job.log, folder)


def assert_same_run(expected: Path, actual: Path) -> None:
    assert (expected / WEIGHTS).read_bytes() == (actual / WEIGHTS).read_bytes()
    for left, right in zip(
        read_rows(expected / "metrics.jsonl"), read_rows(actual / "metrics.jsonl"), strict=True
    ):
        same = {name for name in left if not name.startswith(("time/", "perf/"))}
        assert {name: left[name] for name in same} == {name: right[name] for name in same}


def test_a_submitted_run_finishes(undisturbed):
    assert undisturbed.details["JobState"] == "COMPLETED", undisturbed.log
    assert "0 FAIL" in undisturbed.log  # the preflight
    assert "0: step 6/6" in undisturbed.log
    assert (undisturbed.dir / "logs" / "rank_1.log").is_file()


def test_a_preempted_job_is_requeued_and_ends_with_the_same_weights(undisturbed, preempted):
    assert preempted.details["JobState"] == "COMPLETED", preempted.log
    assert preempted.details["Restarts"] == "2"  # before the first step, and in the middle
    [stopped] = re.findall(r"stopped behind step (\d) as asked", preempted.log)
    assert int(stopped) in (3, 4)
    assert preempted.log.count("goes back into the queue") == 2
    assert f"resumed from {preempted.dir}/checkpoints/step_00000{stopped}" in preempted.log
    before, _, after = preempted.log.partition(f"stopped behind step {stopped} as asked")
    assert f"0: step {stopped}/6" in before and f"0: step {stopped}/6" not in after
    assert_same_run(undisturbed.dir, preempted.dir)


def test_two_hosts_without_common_memory_train_the_same_run(undisturbed, on_two_nodes):
    assert on_two_nodes.details["JobState"] == "COMPLETED", on_two_nodes.log
    assert on_two_nodes.details["NumNodes"] == "2"
    assert "nodes: 2 reach node1:" in on_two_nodes.log
    assert re.search(r"answers, clocks differ by [01]\.", on_two_nodes.log)
    assert_same_run(undisturbed.dir, on_two_nodes.dir)


def test_a_node_with_the_engine_alone_trains_the_same_run(undisturbed, with_engine_node):
    ended = with_engine_node
    assert ended.details["JobState"] == "COMPLETED", ended.log
    assert "engine node 0 on node2 is connected" in ended.log
    assert_same_run(undisturbed.dir, ended.dir)


def test_a_killed_rank_ends_the_job_which_is_not_requeued(submit):
    job, _ = submit("killed")
    job.wait_for_log("step 1/6")
    rank_1 = find_rank(job.number, 1)
    assert rank_1 is not None
    os.kill(rank_1, signal.SIGKILL)
    start = time.monotonic()
    details = job.wait()
    assert time.monotonic() - start < 60
    assert (details["JobState"], details["Restarts"]) == ("FAILED", "0")
    assert re.search(r"srun: error: node1: task 1: Killed", job.log)
    assert "queue" not in job.log.partition("task 1: Killed")[2]


def test_a_wrong_setting_fails_before_anything_starts(cluster, tmp_path, assets):
    content = settings(assets) | {"run": {"dir": str(tmp_path / "run"), "steps": 0}}
    job = cluster.submit(SCRIPT, write_yaml(tmp_path / "run.yaml", content), folder=tmp_path)
    details = job.wait()
    assert (details["JobState"], details["ExitCode"]) == ("FAILED", "2:0")
    assert "run.steps: must be > 0, got 0" in job.log
    assert not (tmp_path / "run").exists()


def test_a_conversion_is_a_job(cluster, tmp_path, assets):
    script = ROOT / "slurm" / "convert.sh"
    job = cluster.submit(script, "hf-to-megatron", assets / "model", "a folder", folder=tmp_path)
    assert job.wait()["JobState"] == "COMPLETED", job.log
    assert (tmp_path / "a folder" / "MANIFEST.json").is_file()


def test_a_dry_run_asks_slurm_and_submits_nothing(cluster, tmp_path, assets):
    content = settings(assets) | {"run": {"dir": str(tmp_path / "run"), "steps": 6}}
    yaml = write_yaml(tmp_path / "run.yaml", content)
    before = cluster.run("squeue", "--noheader", "--states=all")
    shown = cluster.run(
        SCRIPT, "--dry-run", "--nodes=2", yaml, "tracking.machine=cpu", folder=tmp_path
    )
    assert "ranks: 2 on 2 node(s), 1 on each" in shown
    assert "  FITS: " in shown
    assert re.search(r"Job \d+ to start at .* using 4 processors on nodes node\[1-2\]", shown)
    assert cluster.run("squeue", "--noheader", "--states=all") == before
    assert not (tmp_path / "run").exists()


def test_the_end_of_the_time_limit_is_a_checkpoint_and_a_place_in_the_queue(
    cluster, tmp_path, assets
):
    content = settings(assets) | {"run": {"dir": str(tmp_path / "run"), "steps": 6}}
    # 16 s for each step: those behind the first one take 80 s.
    reward = {"type": "python", "path": "tests.helpers.slow_reward.slow_reward"}
    content["rewards"] = {"workers": 1, "functions": [reward]}
    content["checkpoint"] = {"every": 100, "stop_within_s": 200}
    content["eval"] = {"every": 100}
    yaml = write_yaml(tmp_path / "run.yaml", content)
    job = cluster.submit("--signal=USR1@240", SCRIPT, yaml, folder=tmp_path)
    job.wait_for_log("step 1/6")
    # So it does not matter how long the start took. Slurm looks at the limits every 30 s.
    cluster.run("scontrol", "update", f"JobId={job.number}", "EndTime=now+4minutes")
    job.wait_for_log("stopped behind step")
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")  # of the next start
    details = job.wait(timeout_s=600)
    assert (details["JobState"], details["Restarts"]) == ("COMPLETED", "1"), job.log
    [stopped] = re.findall(r"stopped behind step (\d) as asked", job.log)
    assert 1 <= int(stopped) < 6
    assert f"resumed from {tmp_path}/run/checkpoints/step_00000{stopped}" in job.log
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(7))


def test_a_scaling_study_is_an_array_for_each_number_of_nodes_and_a_report(
    cluster, tmp_path, assets
):
    content = settings(assets) | {"run": {"dir": "unused", "steps": 1}, "parallel": {}}
    study = {
        "name": "tiny",
        "title": "A tiny study",
        "models": {"tiny": {"base": str(write_yaml(tmp_path / "base.yaml", content))}},
        "machine": "cpu",
        "gpus_per_node": 1,
        "nodes": [1, 2] if os.getuid() == 0 else [1],  # see on_two_nodes
        "layouts": [{}, {"tp": 2}],
        "batch": {"strong": [8]},
        "steps": 3,
        "warmup_steps": 1,
    }
    spec, out = write_yaml(tmp_path / "a study.yaml", study), tmp_path / "the out"
    script = ROOT / "slurm" / "scaling_study.sh"
    shown = cluster.run(script, spec, "--out", out, folder=tmp_path)
    number = int(re.findall(r"^job (\d+)$", shown, re.MULTILINE)[-1])
    job = Job(cluster, number, out / "slurm")
    assert job.wait(timeout_s=1500)["JobState"] == "COMPLETED", job.log
    with (out / "table.csv").open() as file:
        rows = {(row["layout"], row["gpus"]): row for row in csv.DictReader(file)}
    assert rows["dp", "1"]["state"] == "done" and rows["dp", "1"]["steps"] == "2"
    assert rows["tp2", "1"]["state"] == "impossible"
    if len(study["nodes"]) == 2:
        assert rows["dp", "2"]["state"] == "done" and float(rows["dp", "2"]["step_s"]) > 0
        assert rows["tp2", "2"]["state"] == "done"
        assert "0: step 3/3" in (out / "cells/tiny/tp2_n2_b8/log").read_text()
        assert not list(out.glob("cells/tiny/*/run/checkpoints"))
    assert "# A tiny study" in (out / "report.md").read_text()
    again = cluster.run(script, spec, "--out", out, "--dry-run", folder=tmp_path)
    assert ", 0 to run;" in again.splitlines()[0]


def find_rank(job: int, rank: int) -> int | None:
    """Process id of a rank, if it runs."""
    wanted = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}"}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text().replace("\0", " ")
            environment = (process / "environ").read_text().split("\0")
        except OSError:  # it has ended
            continue
        if "megatron_cpgd.cli train" in command and wanted <= set(environment):
            return int(process.name)
    return None
