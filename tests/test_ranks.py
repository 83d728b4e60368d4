"""Processes of one run are given the same, and learn what one does."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from detr_backbone.training import Checkpoint, TrainConfig, load_checkpoint, train
from detr_backbone.training.run_folder import CHECKPOINT
from tests.tiny_run import StepHook, in_two, launch, raise_at, six_steps


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return six_steps(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def one(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The last checkpoint of a run in one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train(replace(config, output_dir=str(folder), calibration_images=4))
    return load_checkpoint(folder / CHECKPOINT)


def assert_learnt_alike(one: Checkpoint, two: Checkpoint) -> None:
    assert one.step == two.step == 6
    for name, tensor in one.model.items():
        # Adam moves a weight by its rate, 1e-4, in each of six steps, whatever the size of its gradient: where rounding
        # decides about the gradient, it decides about a step. All others agree to the rounding of float32.
        assert (tensor - two.model[name]).abs().max() < 6 * 1e-4, name
        assert (tensor - two.model[name]).abs().float().mean() < 1e-6, name


def test_two_processes_learn_what_one_does(config: TrainConfig, one: Checkpoint, tmp_path: Path) -> None:
    codes, printed = launch(None, [replace(part, calibration_images=4) for part in in_two(config, tmp_path / "two")])

    assert codes == [0, 0], printed
    assert printed.count("12 images to train on") == printed.count("epoch   1 ") == 1  # one of them speaks
    assert_learnt_alike(one, load_checkpoint(tmp_path / "two" / CHECKPOINT))


def stop_all(rank: int, step: int) -> StepHook:
    return raise_at(step, "SIGTERM")


def test_two_processes_that_share_one_detector_stop_go_on_and_learn_what_one_does(
    config: TrainConfig, one: Checkpoint, tmp_path: Path
) -> None:
    changes = {"calibration_images": 4, "strategy": "fsdp", "resume": "auto"}
    parts = [replace(part, **changes) for part in in_two(config, tmp_path / "two")]
    codes, errors = launch(stop_all, parts, 2)
    assert codes == [75, 75], errors
    half = load_checkpoint(tmp_path / "two" / CHECKPOINT)
    assert half.step == 3
    assert {name: tensor.shape for name, tensor in half.model.items()} == {n: t.shape for n, t in one.model.items()}

    codes, errors = launch(None, parts)
    assert codes == [0, 0], errors
    assert_learnt_alike(one, load_checkpoint(tmp_path / "two" / CHECKPOINT))


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
