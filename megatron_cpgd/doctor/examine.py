"""All checks, in order. Findings that can be read, before anything is started."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from megatron_cpgd.config.load import load_config
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.doctor.host import Finding, Host
from megatron_cpgd.doctor.network import check_network
from megatron_cpgd.doctor.resources import check_limits, check_space
from megatron_cpgd.doctor.software import check_apex, check_gpus, check_packages
from megatron_cpgd.errors import ConfigError

CHECKS: tuple[Callable[[Host], Iterator[Finding]], ...] = (
    check_packages, check_gpus, check_apex, check_network, check_space, check_limits,
)  # fmt: skip


def examine(
    config_path: Path | None, overrides: Sequence[str], environment: Mapping[str, str]
) -> list[Finding]:
    """All findings about this host, in the order of the checks."""
    findings, config = _read_config(config_path, overrides)
    host = Host(config=config, environment=environment)
    for check in CHECKS:
        findings += check(host)
    return findings


def format_findings(findings: Sequence[Finding], host: str) -> str:
    """A line for each finding, and one for what to do."""
    counts = [f"{sum(f.status == s for f in findings)} {s}" for s in ("PASS", "WARN", "FAIL")]
    lines = [f"{host}: {', '.join(counts)}"]
    for finding in findings:
        lines.append(f"  {finding.status}  {finding.check}: {finding.found}")
        if finding.advice:
            lines.append(f"        -> {finding.advice}")
    return "\n".join(lines) + "\n"


def _read_config(
    path: Path | None, overrides: Sequence[str]
) -> tuple[list[Finding], ExperimentConfig | None]:
    if path is None:
        return [], None
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        advice = "correct the settings; `megatron-cpgd config` shows the same"
        return [Finding(check="config", status="FAIL", found=str(error), advice=advice)], None
    found = f"{path} is valid, {config.parallel.world_size} ranks"
    return [Finding(check="config", status="PASS", found=found)], config
