"""One section in a process of its own: `python -m megatron_cpgd.gpu_check NAME SETUP RESULTS`."""

import faulthandler
import json
import sys
from importlib import import_module
from pathlib import Path

from megatron_cpgd.errors import RunError, UserError
from megatron_cpgd.gpu_check.checks import STACKS_SIGNAL, Check, Setup, append_check


def main(name: str, setup: str, results: Path) -> None:
    """Results go to the file `results`, a traceback to stderr."""
    faulthandler.register(STACKS_SIGNAL)
    section = import_module(f"megatron_cpgd.gpu_check.{name}")
    try:
        section.run(Setup(**json.loads(setup)), lambda check: append_check(results, check))
    except (UserError, RunError) as error:  # no defect of this code: the message says what to do
        sys.stderr.write(f"{error}\n")
        first, *more = str(error).splitlines()
        reason = " ... ".join([first, *more[-1:]])
        append_check(results, Check(name=name, status="FAIL", reason=reason))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
