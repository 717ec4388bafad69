from pathlib import Path

import pytest

from tests.helpers.valid_run import write_run


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A valid configuration; the tests run as if no launcher had started them."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return write_run(tmp_path)
