"""A model with data, and one complete run of it that nothing has disturbed."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.full_run import Finished, run_cli, settings, write_assets, write_yaml


@dataclass(frozen=True, slots=True)
class CompleteRun:
    """A run that has ended."""

    yaml: Path
    dir: Path
    finished: Finished


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and data of all runs."""
    return write_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="session")
def complete_run(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> CompleteRun:
    """Six steps on two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("complete")
    content = settings(assets)
    content["run"]["dir"] = str(folder / "run")
    yaml = write_yaml(folder / "run.yaml", content)
    return CompleteRun(yaml, folder / "run", run_cli("train", yaml, folder=folder))
