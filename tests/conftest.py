"""What every test starts from, and the scripts as a user runs them: in a process of their own, or without its start."""

import gc
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from detr_backbone.commands.program import main
from tests.processes import ROOT, Command, Ended
from tests.quick_draws import draw_quickly

LONGEST = ("test_networks", "test_training_resume", "test_ranks_gone", "test_install", "test_commands", "test_export")
"""The modules that compute, or wait for others, for longest; they begin first, so that all processes end together."""

gc.disable()  # until all modules are imported: nothing of them is garbage


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gc.enable()
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True, scope="session")
def _hear_signals() -> None:
    """A shell's background, and nohup, let the tests and all that they start ignore Ctrl-C and a closed terminal."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="module")
def _keep_what_is_imported() -> None:
    """Half a million objects of libraries live until the end: looking for garbage among them takes long each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _draw_quickly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        draw_quickly(patch)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.default_generator.manual_seed(0)  # faster than torch.manual_seed, which notes the stack for other devices


@pytest.fixture(autouse=True)
def _forget_devices() -> Iterator[None]:
    """Accelerate keeps the precision of the first run in a process, and refuses another one."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def process() -> Command:
    """Run Python in a new process: `process(folder, *words, **environment)`."""

    def run(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
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


TINY = {
    "detector": {
        "name": "deformable_detr",
        "backbone": {"name": "resnet18", "return_layers": ["layer2"], "hidden_dim": 32},
        "num_queries": 5,
        "nheads": 4,
        "enc_layers": 1,
        "dec_layers": 1,
        "dim_feedforward": 32,
    },
    "data": {
        "train": {"images": "shapes/train", "annotations": "shapes/annotations/instances_train.json"},
        "val": {"images": "shapes/val", "annotations": "shapes/annotations/instances_val.json"},
        "transforms": {"scales": [64], "max_size": 64, "crop": False, "eval_size": 64},
        "batch_size": 2,
        "num_workers": 0,
    },
    "optimizer": {"epochs": 1},
    "output_dir": "run",
    "calibration_images": 2,
}
"""A configuration that trains in a second."""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run `detr-backbone` in this process: `command(folder, "predict", "--images", "a")`."""

    def run(folder: Path, *words: str) -> Ended:
        monkeypatch.chdir(folder)
        capfd.readouterr()
        try:
            code = main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        return Ended(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with drawn shapes in `shapes`, the recipe tiny.yaml, and a run in `run` with its checkpoint.pt."""
    from detr_backbone.coco.shapes import draw_shapes

    folder = tmp_path_factory.mktemp("tiny")
    draw_shapes(folder / "shapes", train=4, val=3, image_size=64)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "--config", "tiny.yaml"]) == 0
    return folder
