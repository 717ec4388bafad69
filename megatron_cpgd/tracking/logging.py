"""One logging setup for all ranks: who says it, what reaches the terminal, one file per rank."""

import logging
import os
import sys
from pathlib import Path

_DATE = "%H:%M:%S"


def setup_logging(rank: int | str, log_path: Path | None = None) -> None:
    """Install the handlers of this process on the root logger, in place of earlier ones.

    The terminal shows INFO and above of rank 0, WARNING and above of the others; of libraries only
    errors. The file gets INFO and above of this rank, warnings of libraries included.

    Args:
        rank: its number, or what another process is.
        log_path: appended to; its folder is created. None logs to the terminal only.
    """
    name = f"rank {rank}" if isinstance(rank, int) else rank
    formatter = logging.Formatter(
        f"%(asctime)s [{name}] %(levelname).1s %(name)s: %(message)s", _DATE
    )
    handlers: list[logging.Handler] = []
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(log_path, encoding="utf-8")
        file.setLevel(logging.INFO)
        handlers.append(file)
    if log_path is None or not _is_stderr(log_path):
        console = logging.StreamHandler(sys.stderr)
        console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        console.addFilter(_is_ours_or_error)
        handlers.append(console)
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)


def _is_ours_or_error(record: logging.LogRecord) -> bool:
    return record.name.startswith("megatron_cpgd") or record.levelno >= logging.ERROR


def _is_stderr(path: Path) -> bool:
    """The launcher sends the stderr of rank N to its log: a second handler would write twice."""
    try:
        return os.path.samestat(os.fstat(sys.stderr.fileno()), path.stat())
    except (OSError, ValueError):  # stderr is closed or not a file
        return False
