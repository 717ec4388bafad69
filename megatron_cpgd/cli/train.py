"""`megatron-cpgd train`: checks everything first, then starts the ranks or runs as one of them."""

import argparse
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from megatron_cpgd.cli.arguments import Commands, add_config_arguments
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import USER_ERROR, ConfigError, RunStopped
from megatron_cpgd.imports import without_collection
from megatron_cpgd.stop_request import stop_on_signals


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "train",
        help="train a policy, or resume it",
        description=(
            "Trains, or resumes what is in run.dir. Starts the ranks of one machine itself; as a "
            "task of srun or torchrun it runs as that rank. SIGUSR1 and SIGTERM save and stop the "
            "run; exit code 200 says that the same command goes on from there."
        ),
    )
    add_config_arguments(parser, required=True)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run as the rank that RANK names, or start all ranks on this machine."""
    from megatron_cpgd.config.load import load_config
    from megatron_cpgd.slurm import adopt_step, check_rank
    from megatron_cpgd.tracking.run_folder import RunFolder

    adopt_step(os.environ)
    config = load_config(arguments.config, arguments.overrides)
    folder, rank = RunFolder(config.run.dir), os.environ.get("RANK")
    if rank in (None, "0"):  # rank 0 will write config.yaml: the others would race with it
        _check_run_folder(config)
    if folder.is_complete(config.run.steps):
        if rank in (None, "0"):
            from megatron_cpgd.planning.outcome import predicted_and_measured
            from megatron_cpgd.tracking.report import print_report

            print_report(folder, predicted_and_measured(folder))
        return 0
    stop_within_s = config.checkpoint.stop_within_s
    if rank is not None:
        check_rank(os.environ)
        with stop_on_signals(stop_within_s) as stop:
            with without_collection():
                from megatron_cpgd.train import train

            try:
                train(config, stop=stop)
            except RunStopped:
                return stop.exit_code
        return 0
    from megatron_cpgd.launch import launch_ranks
    from megatron_cpgd.weight_sync.shared_memory import remove_stale_arenas

    cli, settings = [sys.executable, "-m", "megatron_cpgd.cli"], map(str, arguments.overrides)
    given = [str(arguments.config), *settings]
    existed = folder.dir.exists()
    code = launch_ranks(
        [*cli, "train", *given],
        config.parallel.world_size,
        folder.logs,
        stop_within_s=stop_within_s,
        engine_nodes=[
            [*cli, "serve", f"--node={node}", *given] for node in range(config.rollout.nodes)
        ],
    )
    if code == USER_ERROR and not existed and not _has_rows(folder.metrics):
        with suppress(ConfigError), folder.claim():  # another run may have come first
            shutil.rmtree(folder.dir)  # refused before the first step: nothing but logs
    remove_stale_arenas()  # of a rank 0 that was killed
    return code


def _has_rows(metrics: Path) -> bool:
    return metrics.exists() and metrics.stat().st_size > 0


def _check_run_folder(config: ExperimentConfig) -> None:
    from megatron_cpgd.config.resume import check_resume
    from megatron_cpgd.tracking.run_folder import RunFolder

    problems = check_resume(config, config.run.dir)
    done, steps = RunFolder(config.run.dir).done, config.run.steps
    if done > steps:
        problems.append(
            f"run.steps={steps}: this run is behind step {done} already; set run.steps to at least "
            f"{done}"
        )
    if problems:
        raise ConfigError("\n  ".join([f"run.dir={config.run.dir} cannot be resumed:", *problems]))
