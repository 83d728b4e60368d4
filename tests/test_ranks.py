"""Processes of one run are given the same, and end together."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from detr_backbone.coco.shapes import draw_shapes
from detr_backbone.training import OptimizerConfig, TrainConfig, load_checkpoint, ranks, train
from detr_backbone.training.run_folder import CHECKPOINT
from tests.tiny_run import StepHook, launch, twelve_steps


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("ranks")
    draw_shapes(folder, train=12, val=4, image_size=64)
    config = twelve_steps(folder, folder / "run", checkpoint_every=0, calibration_images=0)
    detector = replace(config.detector, dropout=0.0)
    return replace(config, detector=detector, optimizer=OptimizerConfig(epochs=1))


def in_two(config: TrainConfig, output: Path) -> list[TrainConfig]:
    """The same images per step in two processes."""
    return [replace(config, output_dir=str(output), data=replace(config.data, batch_size=1))] * 2


def test_two_processes_learn_what_one_does(config: TrainConfig, tmp_path: Path) -> None:
    train(replace(config, output_dir=str(tmp_path / "one"), calibration_images=4))
    codes, _ = launch(None, [replace(part, calibration_images=4) for part in in_two(config, tmp_path / "two")])
    assert codes == [0, 0]

    one, two = (load_checkpoint(tmp_path / name / CHECKPOINT) for name in ("one", "two"))
    assert one.step == two.step == 6
    for name, tensor in one.model.items():
        # Adam moves a weight by its rate, 1e-4, in each of six steps, whatever the size of its gradient: where rounding
        # decides about the gradient, it decides about a step. All others agree to the rounding of float32.
        assert (tensor - two.model[name]).abs().max() < 6 * 1e-4, name
        assert (tensor - two.model[name]).abs().float().mean() < 1e-6, name


def test_a_stale_file_on_one_machine_ends_all_before_the_first_step(config: TrainConfig, tmp_path: Path) -> None:
    first, second = in_two(config, tmp_path / "run")
    content = json.loads(Path(first.data.train.annotations).read_text(encoding="utf-8"))
    stale = tmp_path / "stale.json"
    stale.write_text(json.dumps(content | {"annotations": content["annotations"][1:]}), encoding="utf-8")
    split = replace(second.data.train, annotations=str(stale))

    codes, errors = launch(None, [first, replace(second, data=replace(second.data, train=split))])
    assert codes == [1, 1]
    assert "rank=1 key=data.train" in errors


def test_other_settings_of_one_process_end_all(config: TrainConfig, tmp_path: Path) -> None:
    first, second = in_two(config, tmp_path / "run")

    codes, errors = launch(None, [first, replace(second, seed=1)])
    assert codes == [1, 1]
    assert "rank=1 key=config" in errors


def fail_one(rank: int, how: str, started: str) -> StepHook:
    """Let rank 1 stand still, be killed, or raise an error in the second step; note when."""
    ranks.SILENCE = 10.0

    def hook(step: int) -> None:
        if rank == 1 and step == 2:
            Path(started).write_text(str(time.time()))
            if how == "raises":
                raise ValueError("the message of rank 1")
            os.kill(os.getpid(), getattr(signal, how))

    return hook


@pytest.mark.parametrize(("how", "code"), [("SIGSTOP", -signal.SIGKILL), ("SIGKILL", -signal.SIGKILL), ("raises", 1)])
def test_a_process_that_is_gone_ends_the_others_soon(config: TrainConfig, tmp_path: Path, how: str, code: int) -> None:
    start = time.monotonic()
    codes, errors = launch(fail_one, in_two(config, tmp_path / "run"), how, str(tmp_path / "started"))

    assert codes == [1, code]
    assert time.monotonic() - start < 60
    if how == "raises":
        assert "the message of rank 1" in errors
        assert "error: a process of the run is gone" not in errors
    if how == "SIGSTOP":
        assert "rank 1 gave no sign of life for 10 seconds" in errors
