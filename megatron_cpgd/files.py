"""Writing a file so that a reader never sees half of it."""

import os
from pathlib import Path


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`: readers see the old content or the new one, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
