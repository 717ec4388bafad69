"""What a section is given and what it reports."""

import json
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["PASS", "FAIL", "SKIP"]
Figures = dict[str, float | str]
STACKS_SIGNAL = signal.SIGUSR2
"""Has a section write where its threads stand, before it is ended for its time limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One result."""

    name: str
    status: Status
    figures: Figures = field(default_factory=dict)
    """By name, units last."""
    reason: str = ""
    """Of a SKIP or a FAIL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How large a section may be, and where."""

    scale: Literal["rehearsal", "quick", "full"]
    """`rehearsal`: tiny sizes on the CPU, which show that the code runs."""
    scratch: str
    """Folder for large temporary files."""

    @property
    def device(self) -> str:
        return "cpu" if self.scale == "rehearsal" else "cuda"

    def pick[T](self, *, rehearsal: T, quick: T, full: T | None = None) -> T:
        """What belongs to the scale; `full` is as `quick` if it is not given."""
        if self.scale == "rehearsal":
            return rehearsal
        return quick if self.scale == "quick" or full is None else full


Emit = Callable[[Check], None]
"""Called with each result as soon as there is one: a crash then loses none."""


def verdict(passed: bool, reason: str) -> dict[str, Any]:
    """Status and reason of a check, as arguments of `Check`."""
    return {"status": "PASS", "reason": ""} if passed else {"status": "FAIL", "reason": reason}


def append_check(path: Path, check: Check) -> None:
    """Add a line to the results of a section."""
    with path.open("a") as file:
        file.write(f"{json.dumps(asdict(check))}\n")


def read_checks(path: Path) -> list[Check]:
    """The complete lines of such a file; none if it is not there."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [Check(**json.loads(line)) for line in lines]
