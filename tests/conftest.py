"""What every test starts from, and the scripts as a user runs them: in a process of their own, or without its start."""

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.processes import ROOT, Command


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forget_devices() -> Iterator[None]:
    """Accelerate keeps the precision of the first run in a process, and refuses another one."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def process() -> Command:
    """Run Python in a new process: `process(folder, *words)`."""

    def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )

    return run


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a script in this process, which has imported torch: `script(folder, "evaluate.py", *options)`.

    An error that the script does not turn into the end of the program is the test's.
    """

    def run(folder: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        path = ROOT / "scripts" / name
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [str(path), *options])
        monkeypatch.syspath_prepend(path.parent)  # as for every script that Python runs
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if not isinstance(end.code, int | None):
                print(end.code, file=sys.stderr)
        return subprocess.CompletedProcess(sys.argv, code, *capfd.readouterr())

    return run
