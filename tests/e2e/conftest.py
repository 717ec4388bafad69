"""A model with data, and one complete run of it that nothing has disturbed."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.full_run import Finished, run_cli, settings, write_assets, write_yaml

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With the first module here the runs of `ahead` begin, so it is the first of all.

    Other folders leave time to them; with `pytest -n` other workers run those. Modules that wait
    for no run of their own are next.
    """
    first = next((item.path for item in items if item.path.parent == HERE), None)

    def turn(item: pytest.Item) -> int:
        if item.path == first:
            return 0
        if item.path.parent != HERE:
            return 1
        return 3 if hasattr(item.module, "prepare") else 2  # type: ignore[attr-defined]

    items.sort(key=turn)


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


@pytest.fixture(scope="session", autouse=True)
def ahead(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Any, Future[Any]]]:
    """Runs of modules whose turn is still to come, two at a time.

    Most of a run is the start of its engine, which keeps one core busy and lets the other wait. A
    module with a run has `prepare(assets, folder)`, which writes files and returns what to do in
    the background; its fixture `prepared` is the result of that. Only one thread may use torch.
    """
    items = request.session.items
    modules = dict.fromkeys(item.module for item in items if hasattr(item.module, "prepare"))
    work = {module: module.prepare for module in modules}
    if any("complete_run" in item.fixturenames for item in items):
        work = {"complete_run": _prepare_complete_run} | work
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = {}
        for key, prepare in work.items():
            folder = tmp_path_factory.mktemp(str(getattr(key, "__name__", key)).rpartition(".")[2])
            futures[key] = pool.submit(prepare(request.getfixturevalue("assets"), folder))
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def prepared(request: pytest.FixtureRequest, ahead: dict[Any, Future[Any]]) -> Any:
    """What the module's run has left."""
    return ahead[request.module].result()


@pytest.fixture(scope="session")
def complete_run(ahead: dict[Any, Future[Any]]) -> CompleteRun:
    """Six steps on two tensor-parallel ranks."""
    return ahead["complete_run"].result()


def _prepare_complete_run(assets: Path, folder: Path) -> Callable[[], CompleteRun]:
    content = settings(assets)
    content["run"]["dir"] = str(folder / "run")
    yaml = write_yaml(folder / "run.yaml", content)
    return lambda: CompleteRun(yaml, folder / "run", run_cli("train", yaml, folder=folder))
