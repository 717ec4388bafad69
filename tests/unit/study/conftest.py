from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.study import write_study


@pytest.fixture
def make_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a valid study of the arms cpgd and grpo; sections given replace those of it."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def write(**changes: Any) -> Path:
        return write_study(tmp_path, **changes)

    return write
