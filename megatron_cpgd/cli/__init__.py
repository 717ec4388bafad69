"""The command line: `megatron-cpgd train | plan | config | verify-layout | doctor | convert | ...`.

Each command is one thin file; what it needs is imported when it runs, so that checking a
configuration takes no torch.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from megatron_cpgd.cli import (
    config,
    convert,
    doctor,
    eval,
    plan,
    report,
    serve,
    train,
    verify_layout,
)
from megatron_cpgd.errors import RUN_ERROR, USER_ERROR, RunError, UserError

INTERRUPTED = 130
_ELSEWHERE = "choose another place, or get the permission to write there", USER_ERROR
_FULL = "make room there; the same command goes on from the last checkpoint", RUN_ERROR
_NO_DEFECT = {
    errno.EACCES: _ELSEWHERE, errno.EPERM: _ELSEWHERE, errno.EROFS: _ELSEWHERE,
    errno.ENOTDIR: _ELSEWHERE, errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: _FULL,
}  # fmt: skip
"""Errors of the operating system: what to do about them, and the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; default: those of this process.

    Returns:
        Exit code: 0 success, 2 the user's input is wrong, 3 the run cannot go on (the message is on
        stderr), 4 a plan does not fit, 130 Ctrl-C, 200 a run stopped by SIGUSR1 or SIGTERM, to be
        resumed. Any other exception is a defect and propagates with its traceback (exit code 1).
    """
    arguments = _parse(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `megatron-cpgd config --schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        sys.stderr.write(f"megatron-cpgd {arguments.command}: {error}\n")
        return USER_ERROR
    except RunError as error:
        sys.stderr.write(f"megatron-cpgd {arguments.command}: {error}\n")
        return RUN_ERROR
    except OSError as error:
        if error.errno not in _NO_DEFECT:
            raise
        hint, code = _NO_DEFECT[error.errno]
        where = f"{error.filename2 or error.filename or 'a file'}: {error.strerror}"
        sys.stderr.write(f"megatron-cpgd {arguments.command}: {where}; {hint}\n")
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Settings may stand behind options too, where argparse alone does not look for them."""
    parser = _build_parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [each for each in rest if each.startswith("-") or "=" not in each]
    if unknown or (rest and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-cpgd",
        description="Stable RL post-training of large language models on Megatron-Core (CPGD).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in (train, plan, config, verify_layout, doctor, convert, eval, report, serve):
        command.add_parser(commands)
    return parser
