"""The program `detr-backbone`, which answers Ctrl-C while torch is still being imported: the package imports it."""

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType


def main(words: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, as `detr_backbone.commands.program.main` does.

    Args:
        words: the command line after the program's name; that of this process if left out.
    """
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # in the background of a shell, Ctrl-C is ignored, and stays so
        signal.signal(signal.SIGINT, _end)
    from detr_backbone.commands.program import main as run

    signal.signal(signal.SIGINT, handler)
    return run(words)


def _end(number: int, frame: FrameType | None) -> None:
    """End the process at once: an exception would pass through the initialisation of compiled modules."""
    os.write(2, b"error: interrupted\n")
    os._exit(130)


if __name__ == "__main__":  # for torchrun, which starts modules
    sys.exit(main())
