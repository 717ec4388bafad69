"""The dry run of the scripts: on a login node without Slurm, GPU or torch."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.full_run import ROOT
from tests.helpers.valid_run import write_run


@pytest.fixture
def login_node(tmp_path):
    """A Python without torch, and a PATH with what every Linux has."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "sed", "sort", "comm", "dirname"):
        (tools / name).symlink_to(shutil.which(name))
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('a login node has no torch')")
    return {"PATH": str(tools), "PYTHONPATH": str(blocked), "PYTHON": sys.executable}


def run(script: str, *arguments: object, folder: Path, **environment: str):
    return subprocess.run(
        [str(ROOT / "slurm" / script), *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.fixture
def run_yaml(tmp_path):
    folder = tmp_path / "my runs"
    folder.mkdir()
    return write_run(folder)


def test_a_dry_run_shows_every_command(login_node, run_yaml, tmp_path):
    arguments = ["--dry-run", "--nodes=2", run_yaml, "parallel.tp=4", "parallel.dp=2"]
    result = run("train_cpgd.sh", *arguments, folder=tmp_path, **login_node)
    assert result.returncode == 0, result.stderr
    assert "  parallel:\n    tp: 4\n    dp: 2\n" in result.stdout
    assert "rollout:" not in result.stdout  # nothing differs from its defaults
    assert "ranks: 8 on 2 node(s), 4 on each" in result.stdout
    assert '  OMP_NUM_THREADS="1"' in result.stdout
    config = f"'{run_yaml}'"
    root = str(ROOT)
    assert (
        f"  sbatch --nodes=2 {root}/slurm/train_cpgd.sh {config} parallel.tp=4 parallel.dp=2\n"
    ) in result.stdout
    python = f"{sys.executable} -m megatron_cpgd.cli"
    common = "  srun --nodes=2 --label --cpu-bind=none"
    assert f"{common} --ntasks=2 --ntasks-per-node=1 {python} doctor {config}" in result.stdout
    assert (
        f"{common} --ntasks=8 --ntasks-per-node=4 --kill-on-bad-exit=1 {python} train {config}"
    ) in result.stdout
    assert "plan:\n  none: ImportError: a login node has no torch\n" in result.stdout
    assert "there is no sbatch here" in result.stdout
    assert not (run_yaml.parent / "run").exists()


def test_a_dry_run_says_why_the_run_does_not_fit(login_node, run_yaml, tmp_path):
    shutil.copy(ROOT / "configs/models/Qwen3-8B/config.json", run_yaml.parent / "model")
    with_torch = login_node | {"PYTHONPATH": ""}
    result = run("train_cpgd.sh", "--dry-run", run_yaml, folder=tmp_path, **with_torch)
    assert result.returncode == 0, result.stderr
    warning, problem = result.stdout.partition("plan:\n")[2].partition("submit:")[0].splitlines()
    assert warning.startswith("  warning: the run uses 1 of 8 GPUs")
    assert problem.startswith("  DOES NOT FIT: GPU memory: a rank of stage 0 needs ")


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("nvcr.io/x:1", "--container-image=nvcr.io/x:1 --container-mounts={root}:{root},{folder}:"),
        ("/images/a.sif", "apptainer exec --nv --bind {root}:{root},{folder}:{folder},/data:/data"),
    ],
)
def test_a_container_takes_the_place_of_the_environment(
    login_node, run_yaml, tmp_path, image, expected
):
    environment = login_node | {"CONTAINER_IMAGE": image, "CONTAINER_MOUNTS": "/data:/data"}
    if image.endswith(".sif"):  # it also answers the questions of the script
        apptainer = Path(login_node["PATH"], "apptainer")
        apptainer.write_text('#!/bin/bash\nwhile [[ $1 != *python* ]]; do shift; done; exec "$@"\n')
        apptainer.chmod(0o755)
    result = run("train_cpgd.sh", "--dry-run", run_yaml, folder=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert expected.format(root=ROOT, folder=tmp_path) in result.stdout


def test_mistakes_are_the_messages_of_the_command_line(login_node, run_yaml, tmp_path):
    wrong = run(
        "train_cpgd.sh", "--dry-run", run_yaml, "run.steps=0", folder=tmp_path, **login_node
    )
    assert wrong.returncode == 2
    assert "run.steps: must be > 0, got 0" in wrong.stderr
    uneven = ["--dry-run", "--nodes=3", run_yaml, "parallel.tp=4"]
    refused = run("train_cpgd.sh", *uneven, folder=tmp_path, **login_node)
    assert refused.returncode == 2
    assert "parallel.* need 4 ranks, which 3 nodes cannot share evenly" in refused.stderr


@pytest.mark.parametrize("nodes", ["0", "-2", "two", ""])
def test_a_number_of_nodes_that_is_none_is_refused(login_node, run_yaml, tmp_path, nodes):
    arguments = ["--dry-run", f"--nodes={nodes}", run_yaml]
    refused = run("train_cpgd.sh", *arguments, folder=tmp_path, **login_node)
    assert refused.returncode == 2
    assert refused.stderr == f"train_cpgd.sh: --nodes={nodes}: expected a number of nodes\n"


@pytest.mark.parametrize("script", ["train_cpgd.sh", "convert.sh", "scaling_study.sh"])
def test_an_interpreter_that_is_not_there_is_named(login_node, run_yaml, tmp_path, script):
    environment = login_node | {"PYTHON": "/no/python"}
    refused = run(script, "--dry-run", run_yaml, folder=tmp_path, **environment)
    assert refused.returncode == 2
    assert "no interpreter /no/python: export PYTHON with one that" in refused.stderr


def test_a_cell_of_a_study_outside_of_an_array_is_refused(login_node, tmp_path):
    refused = run("scaling_study.sh", "cell", "cells", folder=tmp_path, **login_node)
    assert refused.returncode == 2
    assert "`cell` is for a task of a Slurm array" in refused.stderr


def test_without_sbatch_nothing_is_started(login_node, run_yaml, tmp_path):
    for script in ("train_cpgd.sh", "convert.sh"):
        refused = run(script, run_yaml, folder=tmp_path, **login_node)
        assert refused.returncode == 2
        assert refused.stderr == f"{script}: submit it with sbatch, or give --dry-run\n"
        usage = run(script, folder=tmp_path, **login_node)
        assert usage.returncode == 2
        assert "sbatch " in usage.stderr and f"slurm/{script}" in usage.stderr


def test_the_converter_shows_its_command(login_node, tmp_path):
    arguments = ["hf-to-megatron", "a b", "c", "--dtype", "fp32"]
    result = run("convert.sh", "--dry-run", *arguments, folder=tmp_path, **login_node)
    assert result.returncode == 0, result.stderr
    command = f"{sys.executable} -m megatron_cpgd.cli convert hf-to-megatron 'a b' c --dtype fp32"
    assert f"  srun --nodes=1 --ntasks=1 --cpu-bind=none {command}\n" in result.stdout


def test_an_unknown_option_shows_the_usage(login_node, tmp_path):
    result = run("train_cpgd.sh", "--dryrun", "x.yaml", folder=tmp_path, **login_node)
    assert result.returncode == 2
    assert "slurm/train_cpgd.sh --dry-run" in result.stderr


def test_the_last_nodes_are_for_engines(login_node, run_yaml, tmp_path):
    settings = ["parallel.tp=4", "rollout.nodes=2", "rollout.engines=4"]
    arguments = ["--dry-run", "--nodes=4", run_yaml, *settings]
    result = run("train_cpgd.sh", *arguments, folder=tmp_path, **login_node)
    assert result.returncode == 0, result.stderr
    assert "ranks: 4 on 2 node(s), 2 on each\nengines: on 2 further node(s)\n" in result.stdout
    common = "--label --cpu-bind=none"
    for expected in (
        f"srun --nodes=4 {common} --ntasks=4 --ntasks-per-node=1 ",
        f"srun --relative=0 --nodes=2 {common} --ntasks=4 --ntasks-per-node=2 --kill-on-bad-exit=1",
        f"srun --relative=2 --nodes=2 {common} --ntasks=2 --ntasks-per-node=1 {sys.executable} -m "
        f"megatron_cpgd.cli serve '{run_yaml}' {' '.join(settings)}",
    ):
        assert expected in result.stdout
    arguments[1] = "--nodes=2"
    refused = run("train_cpgd.sh", *arguments, folder=tmp_path, **login_node)
    assert refused.returncode == 2
    assert "rollout.nodes=2 of 2 node(s) leave none for the ranks" in refused.stderr


@pytest.fixture
def compute_node(tmp_path):
    """Slurm's commands as files: srun ends with $CODE_doctor or $CODE_train, scontrol as in a job.

    A requeued job's script is ended; that one waits for it.
    """
    tools = tmp_path / "slurm"
    tools.mkdir()
    commands = {
        "srun": """
            [[ $* == *"config --counts"* ]] && echo 1 0
            [[ $* == *" doctor "* ]] && exit "$CODE_doctor"
            [[ $* == *" train "* ]] && exit "$CODE_train"
            exit 0""",
        "scontrol": """
            [[ $1 == requeue ]] && kill "$PPID"
            echo "   StartTime=Unknown EndTime=$(date -d "@$END" +%FT%T) Deadline=N/A"
            echo "   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=$PREEMPTED" """,
    }
    for name, lines in commands.items():
        (tools / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tools / name).chmod(0o755)
    return {"PATH": f"{tools}:/usr/bin:/bin", "PYTHON": sys.executable, "SLURM_JOB_ID": "7"}


REQUEUED = -15
AGAIN = "stopped as asked; job 7 goes back into the queue"


@pytest.mark.parametrize(
    ("codes", "left_s", "preempted", "ends_with", "said"),
    [
        ((0, 0), 3600, "None", 0, ""),
        ((0, 200), 10, "None", REQUEUED, AGAIN),
        ((0, 138), 3600, "None", REQUEUED, AGAIN),
        ((0, 138), 600, "None", 138, "the time limit ends, and no checkpoint was written since"),
        ((138, 0), 3600, "None", REQUEUED, AGAIN),
        ((0, 143), 3600, "2026-01-01T00:00:00", REQUEUED, AGAIN),
        ((143, 0), 3600, "2026-01-01T00:00:00", REQUEUED, AGAIN),
        # srun's code is the largest one: a rank may have failed first, and srun ended this one.
        ((0, 143), 3600, "None", 143, ""),
        ((0, 1), 3600, "None", 1, ""),
        ((1, 0), 3600, "None", 1, "a node fails the preflight above; nothing was started"),
    ],
)
def test_a_job_goes_back_into_the_queue_if_its_next_start_can_get_further(
    compute_node, tmp_path, codes, left_s, preempted, ends_with, said
):
    environment = compute_node | {
        "CODE_doctor": str(codes[0]),
        "CODE_train": str(codes[1]),
        "END": str(int(time.time()) + left_s),
        "PREEMPTED": preempted,
    }
    result = run("train_cpgd.sh", "run.yaml", folder=tmp_path, **environment)
    assert result.returncode == ends_with, result.stderr
    printed = result.stdout + result.stderr
    assert printed.startswith(f"train_cpgd.sh: {said}") if said else not printed
