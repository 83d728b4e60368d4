"""The folder of the repository, and the type of the fixtures that run its programs: `process`, `script`."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
Command = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class Ended:
    """A command that has run: its exit code, and what it wrote."""

    code: int
    out: str
    err: str
