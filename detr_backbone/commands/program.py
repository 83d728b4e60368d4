"""`detr-backbone COMMAND`: finds the command, runs it, and tells every fault of what it was given in one line."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from detr_backbone.commands.command_line import Command
from detr_backbone.errors import ConfigError, DetrBackboneError, unknown_name

COMMANDS = {
    "train": "train a detector on a dataset in COCO format",
    "evaluate": "compute COCO's numbers of a detector, or of detections in a file",
    "predict": "detect objects in pictures; write them as JSON and draw them",
    "export": "write a detector as ONNX, for OpenVINO (also in int8) or as .pt2",
    "check-data": "find what is wrong with a dataset before training does",
    "convert-data": "convert a YOLO, Pascal VOC or CVAT dataset to COCO format, and check it",
    "make-subset": "write a part of a dataset as a dataset",
    "compare": "compare two detectors on the same images",
    "inspect": "describe the layers of a detector, and draw what they hold",
    "convert-weights": "write weights under the names of another library",
}


def main(words: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 is success; 1 a fault of files, data or numbers, or a result that is not complete; 2 a fault of the command line
    or the configuration; 75 a run that a signal stopped, and that goes on with `--resume`; 130 Ctrl-C.

    Args:
        words: the command line after the program's name; that of this process if left out.
    """
    for stream in (sys.stdout, sys.stderr):  # a console that cannot show a name must not cost the numbers
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    name, *rest = (sys.argv[1:] if words is None else words) or [""]
    try:
        code = _run(name, rest)
        if sys.stdout is not None:  # a program that was started without one
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # whoever read the output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ConfigError as error:
        return _fail(str(error), 2)
    except DetrBackboneError as error:
        return _fail(str(error), 1)
    except OSError as error:
        where = "" if error.filename is None else f" | where: file={error.filename}"
        return _fail(f"{error.strerror or error}{where}", 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "out of memory" not in str(error):
            raise
        return _fail(f"out of memory | got {error} | fix: smaller batches or smaller pictures", 1)


def _run(name: str, words: Sequence[str]) -> int:
    if name in ("", "-h", "--help"):
        print(overview())
        return 0 if name else 2
    if name == "--version":
        print(_version())
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"command does not exist: {unknown_name(name, COMMANDS)}")
    command: Command = import_module(f"detr_backbone.commands.{name.replace('-', '_')}").COMMAND
    return command.run(words)


def overview() -> str:
    """Return what `detr-backbone --help` shows."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: detr-backbone COMMAND [OPTIONS]",
            "",
            "Train, evaluate and use detectors with backbones of detr_backbone.",
            "",
            *(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()),
            "",
            "detr-backbone COMMAND --help shows the options that are used most, with an example; --help-all shows all.",
        ]
    )


def _version() -> str:
    try:
        return f"detr-backbone {version('detr_backbone')}"
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "detr-backbone, not installed"


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
