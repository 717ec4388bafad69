"""The runs of a scaling study: the folder of each, and all of them on this machine in a row."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpgd.config.load import read_config, save_config
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.files import write_text_atomic
from megatron_cpgd.study.scaling.cells import Cell
from megatron_cpgd.tracking.run_folder import RunFolder

TOO_LONG = 124
"""Exit code of a run that was ended at its time limit, as that of `timeout`."""
_END_GRACE_S = 90.0
"""The launcher gives its ranks 60 s."""
_REASON_CHARACTERS = 300
_REASONS = (
    r"out of memory|OutOfMemory",
    r"^megatron-cpgd \w+: ",
    r"^srun: error: .*(?:Out Of Memory|oom)",
    r"^[\w.]*(?:Error|Exception): ",
    r"\S",
)
"""What the line that says why a run has failed looks like, the most telling first."""


@dataclass(frozen=True, slots=True)
class CellRun:
    """The folder of a cell: config.yaml, log, run/ and, once it has ended, exit_code."""

    cell: Cell

    @property
    def config(self) -> Path:
        """Settings of the run."""
        return self.cell.folder / "config.yaml"

    @property
    def log(self) -> Path:
        """All that it has said."""
        return self.cell.folder / "log"

    @property
    def run(self) -> RunFolder:
        """Its output."""
        return RunFolder(self.cell.folder / "run")

    @property
    def exit_code(self) -> int | None:
        """None: it runs, was interrupted, or was never started."""
        file = self.cell.folder / "exit_code"
        return int(file.read_text()) if file.exists() else None

    def prepare(self) -> None:
        """Replace whatever is there by the settings of the run."""
        shutil.rmtree(self.cell.folder, ignore_errors=True)
        self.cell.folder.mkdir(parents=True)
        save_config(self.cell.config, self.config)

    def is_done(self) -> bool:
        """Whether it was complete, with these settings."""
        try:
            same = read_config(self.config) == self.cell.config
        except ConfigError:
            return False
        return same and self.exit_code == 0

    def end(self, code: int) -> None:
        """Record the end of the run and drop its weights, as slurm/scaling_study.sh does."""
        shutil.rmtree(self.run.checkpoints, ignore_errors=True)
        shutil.rmtree(self.run.dir / "hf", ignore_errors=True)
        write_text_atomic(self.cell.folder / "exit_code", f"{code}\n")

    def failure(self) -> str:
        """Why it is not done, in one line."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        # `srun --label` puts the number of the rank before each line.
        lines = [re.sub(r"^\d+: ", "", line) for line in text.splitlines()]
        code = "did not end" if self.exit_code is None else f"exit code {self.exit_code}"
        if self.exit_code == TOO_LONG:
            code = "took longer than `hours`"
        return f"{code}: {_reason(lines)}"


def run_cells(cells: Sequence[Cell], *, hours: float, show: Callable[[str], None]) -> int:
    """Make these runs, one after the other; returns how many failed."""
    failed = 0
    for number, cell in enumerate(cells, start=1):
        run, start = CellRun(cell), time.monotonic()
        run.prepare()
        code = _train(run, hours * 3600)
        run.end(code)
        failed += code != 0
        result = f"{time.monotonic() - start:.0f} s" if code == 0 else f"FAILED, {run.failure()}"
        show(f"[{number}/{len(cells)}] {cell.name}: {result}")
    return failed


def _train(run: CellRun, limit_s: float) -> int:
    """`megatron-cpgd train` on this machine."""
    command = [sys.executable, "-m", "megatron_cpgd.cli", "train", str(run.config)]
    with run.log.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return TOO_LONG
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The ranks and the engine end with the launcher."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _reason(lines: Sequence[str]) -> str:
    for pattern in _REASONS:
        found = [i for i, line in enumerate(lines) if re.search(pattern, line, re.IGNORECASE)]
        if found:
            # A message may go on in the next lines.
            text = " ".join(" ".join(lines[found[-1] :]).split())
            return text[:_REASON_CHARACTERS]
    return "it has said nothing"
