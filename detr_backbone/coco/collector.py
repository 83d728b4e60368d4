"""Python's search for reference cycles, held off while millions of objects are made that have none."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without the search, which walks through a growing tree again and again: a third of the time it takes to grow."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
