"""What a run has achieved, for the terminal and as a picture."""

import sys
from collections.abc import Sequence

from pydantic import ValidationError

from megatron_cpgd.config.stability import StabilityConfig
from megatron_cpgd.config.yaml_io import read_yaml
from megatron_cpgd.errors import ConfigError, UserError
from megatron_cpgd.stability.detector import find_collapses
from megatron_cpgd.tracking.console import summary_table
from megatron_cpgd.tracking.metrics import read_metrics
from megatron_cpgd.tracking.run_folder import RunFolder


def print_report(folder: RunFolder, notes: Sequence[str] = ()) -> None:
    """Print the summary table of metrics.jsonl and its findings, and draw learning_curve.png.

    Args:
        notes: further lines.

    Raises:
        UserError: the folder holds no finished step.
    """
    # Not at the top: matplotlib takes half a second, which every rank would wait for at its start.
    from megatron_cpgd.tracking.plot import plot_learning_curve

    if not folder.metrics.exists():
        raise UserError(f"{folder.metrics}: no such file; is this the run.dir of a training run?")
    rows = read_metrics(folder.metrics)
    if not rows:
        raise UserError(f"{folder.metrics}: no finished step yet")
    plot_learning_curve(rows, folder.learning_curve)
    findings = [finding.message for finding in find_collapses(rows, _stability(folder))]
    lines = [summary_table(rows), *notes, *findings, f"plot: {folder.learning_curve}"]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _stability(folder: RunFolder) -> StabilityConfig:
    """The section of the run's own configuration; the defaults if that is older than the section.

    Raises:
        ConfigError: the section does not fit this version.
    """
    config = read_yaml(folder.config) if folder.config.exists() else {}
    try:
        return StabilityConfig.model_validate(config.get("stability", {}))
    except ValidationError as error:
        problems = "; ".join(f"{each['loc'][-1:]} {each['msg']}" for each in error.errors())
        raise ConfigError(
            f"{folder.config}: the section `stability` does not fit this version: {problems}; "
            "repair it there"
        ) from error
