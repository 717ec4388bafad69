"""What the command lines of all studies do alike."""

import signal
import sys
from collections.abc import Callable

from megatron_cpgd.errors import USER_ERROR, UserError

INTERRUPTED = 130


def run_command(name: str, command: Callable[[], int]) -> int:
    """Exit code of a command: its own, 2 the user's input is wrong, 130 Ctrl-C or SIGTERM.

    Args:
        name: of the program, for messages.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        return command()
    except UserError as error:
        sys.stderr.write(f"{name}: {error}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command makes the rest\n")
        return INTERRUPTED
