"""One thread, gloo on the loopback, and no test that this machine cannot run."""

import os
from collections.abc import Generator
from typing import Any

# Both are read when torch is imported, which no test module has done yet.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores; sums keep their order
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import pytest
from hypothesis import settings

from megatron_cpgd.imports import without_collection

# A shared machine can stall any single example for longer than hypothesis' 200 ms.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    with without_collection():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = {
        name: [item for item in items if item.get_closest_marker(name)]
        for name in ("gpu", "distributed")
    }
    if not any(marked.values()):
        return
    import torch

    cuda = torch.cuda.is_available()
    reason = "gloo ranks compute on the CPU: hide the GPU, CUDA_VISIBLE_DEVICES=" if cuda else None
    for item in marked["distributed" if cuda else "gpu"]:
        item.add_marker(pytest.mark.skip(reason=reason or "needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`pytest -n 2`: a worker takes the next file, in their order; tests/e2e is for one worker.

    A file's fixtures are thus made once. tests/e2e shares runs that it starts ahead of its tests.
    """
    from xdist.scheduler import LoadScopeScheduling

    class FileScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, _ = nodeid.partition("::")
            return "tests/e2e" if file.startswith("tests/e2e/") else file

    config.option.loadscopereorder = False
    return FileScheduling(config, log)
