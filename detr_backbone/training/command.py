"""How a script meets its user: options from a function's signature, and faults as one line instead of a traceback."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import ArgumentParser

from detr_backbone.errors import DetrBackboneError


def parse_options(function: Callable[..., None]) -> dict[str, Any]:
    """The keyword arguments that the command line gives for a function; its docstring is the help."""
    parser = ArgumentParser(description=(function.__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_function_arguments(function, fail_untyped=True)
    return vars(parser.instantiate(parser.parse_args()))


@contextmanager
def plain_errors() -> Iterator[None]:
    """End the program with the message alone where the fault is in what the user gave."""
    try:
        yield
    except (DetrBackboneError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
