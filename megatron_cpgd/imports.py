"""Imports of libraries that take seconds."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Inside, no garbage is collected; what is there at the end, no later collection looks at.

    Importing torch and vLLM makes objects by the million, and they stay. Walking over them again
    and again is a fifth of the time that the import takes, and most of every later collection.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
