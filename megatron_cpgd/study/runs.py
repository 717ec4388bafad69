"""The runs of a study and their folders: which are done, which are to be made."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.files import write_text_atomic
from megatron_cpgd.study.spec import Arm, Study
from megatron_cpgd.tracking.run_folder import RunFolder

type Outcome = Literal["finished", "diverged"]
"""`diverged`: ended by TrainingDivergedError, which is a result and no failure of the study."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """One arm with one seed."""

    arm: Arm
    seed: int
    config: ExperimentConfig

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def folder(self) -> RunFolder:
        """Its output."""
        return RunFolder(self.config.run.dir)

    @property
    def _done_file(self) -> Path:
        return self.folder.dir / "done.json"

    def done(self) -> dict[str, Any] | None:
        """The record of this run, if it has ended with exactly this configuration.

        Compared as configurations, not as text: a setting that is new in the schema has its
        default in both.
        """
        try:
            record: dict[str, Any] = json.loads(self._done_file.read_text())
            same = ExperimentConfig.model_validate(record["config"]) == self.config
        except (OSError, ValueError, KeyError, ValidationError):
            return None
        return record if same else None

    def clear(self) -> None:
        """Remove what an interrupted or other run has left here."""
        shutil.rmtree(self.folder.dir, ignore_errors=True)

    def write_done(self, outcome: Outcome, *, reason: str, seconds: float) -> None:
        """Record the end of the run and drop its weights."""
        shutil.rmtree(self.folder.checkpoints, ignore_errors=True)
        shutil.rmtree(self.folder.dir / "hf", ignore_errors=True)
        record = {
            "outcome": outcome,
            "reason": reason,
            "seconds": round(seconds, 1),
            "config": self.config.model_dump(mode="json"),
        }
        write_text_atomic(self._done_file, json.dumps(record, indent=1) + "\n")


def plan_runs(study: Study, out: Path) -> list[StudyRun]:
    """All runs; seed after seed, so that an interrupted study has whole comparisons."""
    return [
        StudyRun(arm=arm, seed=seed, config=_with_run(arm.config, out, arm.name, seed))
        for seed in study.spec.seeds
        for arm in study.arms.values()
    ]


def claim_folder(out: Path, name: str, path: Path) -> None:
    """Make `out` the folder of the study of this name, whose file is `path`.

    Raises:
        ConfigError: it holds another study.
    """
    marker = out / "study.txt"
    if marker.exists() and marker.read_text().strip() != name:
        raise ConfigError(
            f"{out} holds the study {marker.read_text().strip()!r}, {path} is "
            f"{name!r}; use another --out"
        )
    if not marker.exists():
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out} is not empty and holds no study; use another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_text_atomic(marker, f"{name}\n")


def _with_run(config: ExperimentConfig, out: Path, arm: str, seed: int) -> ExperimentConfig:
    changes: Mapping[str, Any] = {"dir": out / "runs" / arm / f"seed_{seed}", "seed": seed}
    return config.model_copy(update={"run": config.run.model_copy(update=changes)})
