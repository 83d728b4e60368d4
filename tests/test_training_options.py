"""What a run does besides training: averages, stops early, tells trackers, draws curves, diagnoses."""

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from detr_backbone.coco.shapes import draw_shapes
from detr_backbone.detectors import DeformableDETR, build_detector
from detr_backbone.errors import CheckpointError, ConfigError, NumericsError, ResourceError
from detr_backbone.nested_tensor import nested_tensor_from_tensor_list
from detr_backbone.training import (
    OptimizerConfig,
    TrainConfig,
    build_accelerator,
    detector_of,
    load_checkpoint,
    open_split,
    train,
)
from detr_backbone.training.average import WeightAverage
from detr_backbone.training.data import train_loader
from detr_backbone.training.finite import replay
from detr_backbone.training.machine_faults import explain_memory
from detr_backbone.training.optimizer import build_optimizer
from detr_backbone.training.overfit import overfit_config, overfit_verdict
from detr_backbone.training.progress import Means, RunLog
from detr_backbone.training.run_folder import CHECKPOINT
from detr_backbone.training.step import Learner
from detr_backbone.training.trackers import require_trackers
from tests.tiny_run import tiny, twelve_steps


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    draw_shapes(folder, train=12, val=4, image_size=64)
    return folder


@pytest.fixture(scope="module")
def model(shapes: Path) -> nn.Module:
    return build_detector(replace(tiny(shapes, shapes).detector, num_classes=3))


def test_a_run_without_validation_ends_without_numbers(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(twelve_steps(shapes, tmp_path, ema_decay=0.9, log_every=0.0, checkpoint_every=0))

    assert result is None
    output = capsys.readouterr().out
    assert "12 images to train on, nothing to evaluate, 6 steps per epoch" in output
    lines = [line for line in output.splitlines() if line.startswith("epoch 1/2  step ")]
    assert len(lines) == 6  # plain lines, for the output is no terminal
    assert all(" left  loss " in line for line in lines)
    checkpoint = load_checkpoint(tmp_path / CHECKPOINT)
    assert [set(row) & {"AP", "loss"} for row in checkpoint.rows] == [{"loss"}, {"loss"}]
    used, _ = detector_of(checkpoint)
    assert checkpoint.average is not None
    name = "class_embed.1.weight"
    assert torch.equal(used.state_dict()[name], checkpoint.average[name])  # what is used is the average
    assert not torch.equal(checkpoint.average[name], checkpoint.model[name])
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1200, 400)


def test_the_time_left_is_that_of_the_whole_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(step=60)
    monkeypatch.setattr("detr_backbone.training.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    means = Means({"sums": {"loss": torch.tensor(2.0)}, "count": 1, "pixels": 1, "cells": 1})
    log = RunLog(is_main=True, every=0)
    list(log.steps([0, 1], means, "epoch 1/3", done=3, per_epoch=5, left_after=10))

    # A step takes a minute; after the first, one is left in the epoch and ten are left after it.
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/3  step 4/5  11 min left  loss 2.000",
        "epoch 1/3  step 5/5  10 min left  loss 2.000",
    ]


def test_the_average_of_weights_follows_its_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    average = WeightAverage(model, 0.9, steps=1000)
    for value in (1.0, 2.0):
        model.weight.data.fill_(value)
        average.update(model)

    # The first update takes the weights as they are: 1, then 0.9 * 1 + 0.1 * 2
    assert average.module.weight.item() == pytest.approx(1.1)


def test_a_run_ends_where_evaluations_no_longer_improve(shapes: Path, tmp_path: Path) -> None:
    # With a learning rate of 1e-12 nothing changes, so that no evaluation is better than the first.
    still = OptimizerConfig(lr=1e-12, lr_backbone=1e-12, epochs=9)
    train(tiny(shapes, tmp_path, optimizer=still, early_stopping=2))

    assert load_checkpoint(tmp_path / CHECKPOINT).epoch == 3


def test_accumulated_batches_are_one_step_with_their_mean_gradient(shapes: Path, tmp_path: Path) -> None:
    config = twelve_steps(shapes, tmp_path, checkpoint_every=0)
    taken: list[list[int]] = []
    step = Learner.step

    def watch(self: Learner, batches: Any, number: int) -> Any:
        taken.append([len(images) for images, _ in batches])
        return step(self, batches, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", watch)
        train(replace(config, optimizer=replace(config.optimizer, accumulate_steps=3, epochs=1)))

    assert taken == [[2, 2, 2], [2, 2, 2]]
    assert load_checkpoint(tmp_path / CHECKPOINT).images_per_step == 6


def test_the_gradient_of_equal_batches_is_that_of_one(shapes: Path, tmp_path: Path) -> None:
    config = twelve_steps(shapes, tmp_path, optimizer=OptimizerConfig(clip_max_norm=0))
    config = replace(config, detector=replace(config.detector, dropout=0.0, num_classes=4))
    batch = next(iter(train_loader(open_split(config.data, config.data.train, train=True), config.data)[0]))
    moments = []
    for batches in ([batch], [batch, batch]):
        torch.manual_seed(0)
        learner = Learner(
            build_detector(config.detector), config, build_accelerator(), steps_per_epoch=6, folder=tmp_path
        )
        learner.prepare(step=0)
        learner.step(batches, 0)
        moments.append([state["exp_avg"] for state in learner.optimizer.state.values()])

    # Halves add up exactly; Adam's first moment is a tenth of the gradient, its step is not.
    assert max(float(moment.abs().max()) for moment in moments[0]) > 1e-3
    assert all(torch.equal(one, two) for one, two in zip(*moments, strict=True))


def test_accumulating_more_batches_than_there_are_is_refused(shapes: Path, tmp_path: Path) -> None:
    config = twelve_steps(shapes, tmp_path)
    with pytest.raises(ConfigError, match=r"`optimizer.accumulate_steps` must be at most 6, .* got 7"):
        train(replace(config, optimizer=replace(config.optimizer, accumulate_steps=7)))


def options_of(model: nn.Module, config: OptimizerConfig) -> dict[str, tuple[float, float]]:
    """The rate and the weight decay of each parameter that trains."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in build_optimizer(model, config).param_groups
        for parameter in group["params"]
    }


def test_norms_and_biases_may_go_without_weight_decay(model: nn.Module) -> None:
    options = options_of(model, OptimizerConfig(weight_decay=0.1, decay_norms_and_biases=False))

    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    assert {name for name, (_, decay) in options.items() if decay == 0} == {n for n in options if shapes[n] == 1}
    assert options["transformer.encoder.layers.0.norm1.weight"][1] == 0
    assert options["class_embed.0.bias"][1] == 0
    assert options["query_embed.weight"][1] == 0.1


def test_each_layer_of_the_backbone_moves_less_than_the_one_after_it(model: nn.Module) -> None:
    options = options_of(model, OptimizerConfig(lr_backbone=1.0, layer_decay=0.5))
    body = "backbone.0.body."

    assert options[f"{body}layer2.1.conv2.weight"][0] == 1.0
    assert options[f"{body}layer2.0.conv1.weight"][0] == 0.5
    assert options[f"{body}layer2.0.downsample.0.weight"][0] == 0.5
    assert options["class_embed.0.weight"][0] == OptimizerConfig().lr


def test_a_tracker_that_is_not_installed_is_named_before_any_work(shapes: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detr_backbone.training.trackers.find_spec", lambda _: None)
        with pytest.raises(ConfigError, match=r"key=trackers \| got mlflow \| fix: pip install mlflow"):
            train(tiny(shapes, tmp_path / "run", trackers=("mlflow",)))
    assert not (tmp_path / "run").exists()
    require_trackers(())


def test_tensorboard_gets_what_the_table_gets(shapes: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(twelve_steps(shapes, tmp_path, trackers=("tensorboard",), checkpoint_every=0))

    (events,) = tmp_path.rglob("events.out.tfevents.*.0")
    scalars = EventAccumulator(str(events.parent)).Reload().Scalars("loss")
    rows = load_checkpoint(tmp_path / CHECKPOINT).rows
    assert [(scalar.step, scalar.value) for scalar in scalars] == [
        (row["step"], pytest.approx(row["loss"])) for row in rows
    ]


def test_a_dry_run_says_what_the_run_would_be_and_keeps_nothing(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny(shapes, tmp_path / "run", dry_run=True)) is None

    output = capsys.readouterr().out
    for words in (
        ", 4 per step",
        "backbone          524,288 parameters  lr 1e-05",
        "level      0: [4, 64, ",
        "a cell for every 4 pixels",
        "backbone.0.body.layer1                  0 trained      147,456 frozen",
        "backbone: batching masked",
        "steps      3 per epoch, 6 in 2 epochs",
        "memory     ",
        "MiB each",
        "losses     loss ",
    ):
        assert words in output, words
    assert list((tmp_path / "run").iterdir()) == []


def test_learning_by_heart_trains_and_evaluates_the_same_images(shapes: Path, tmp_path: Path) -> None:
    config = overfit_config(replace(tiny(shapes, tmp_path / "run"), overfit=6))

    assert config.data.train == config.data.val
    assert config.data.train.subset.count == 6
    assert not config.data.transforms.crop
    assert config.detector.dropout == 0
    assert config.optimizer.epochs == config.eval_every == 300
    assert Path(config.output_dir) == tmp_path / "run" / "overfit_6"


def test_learning_by_heart_ends_with_its_verdict_in_a_folder_of_its_own(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detr_backbone.training.overfit.STEPS", 2)
        train(twelve_steps(shapes, tmp_path, overfit=4))

    assert re.search(r"it (learns|does not learn).* on the 4 images it was trained on, loss ", capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == ["overfit_4"]
    assert load_checkpoint(tmp_path / "overfit_4" / CHECKPOINT).step == 2


@pytest.mark.parametrize(
    ("loss", "precision", "words"), [(1.0, 0.9, "it learns:"), (1.0, 0.1, "slowly"), (9.9, 0.0, "does not learn")]
)
def test_a_verdict_says_whether_the_images_were_learnt(loss: float, precision: float, words: str) -> None:
    rows = [{"loss": 10.0}, {"loss": loss, "AP": precision}]

    assert words in overfit_verdict(rows, TrainConfig(overfit=4))


def poison(model: Any) -> None:
    """Let the first layer of the decoder give NaN."""
    model.get_parameter("transformer.decoder.layers.0.linear1.weight").data[0, 0] = math.nan


def test_a_loss_that_is_not_finite_is_named_and_its_batch_runs_again(shapes: Path, tmp_path: Path) -> None:
    config = twelve_steps(shapes, tmp_path, checkpoint_every=0)
    step = Learner.step

    def poisoned(self: Learner, batches: Any, number: int) -> Any:
        if number == 2:
            poison(self.model)
        return step(self, batches, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", poisoned)
        with pytest.raises(NumericsError) as error:
            train(config)

    file = tmp_path / "failed_batch_0.pt"
    module = r"module=transformer\.decoder\.layers\.0\.linear1 "
    assert "`pred_logits` must be finite" in str(error.value)
    error.match(rf"where: step=2 {module}image_id=\[\d+, \d+\] rank=0 \| fix: --replay {file}")
    with pytest.raises(NumericsError, match=rf"file={file} step=2 {module[:-1]}"):
        train(TrainConfig(replay=str(file)))

    saved = torch.load(file, weights_only=True)
    saved["model"]["transformer.decoder.layers.0.linear1.weight"][0, 0] = 0.0
    torch.save(saved, file)
    assert "loss_giou" in replay(file)  # with other weights, the same batch is computed to its end
    with pytest.raises(CheckpointError, match=f"file={tmp_path / 'none.pt'}"):
        replay(tmp_path / "none.pt")


def test_a_gradient_that_is_not_finite_names_the_batch_it_comes_from_which_runs_again(
    shapes: Path, tmp_path: Path
) -> None:
    config = twelve_steps(shapes, tmp_path, checkpoint_every=0)
    config = replace(config, optimizer=replace(config.optimizer, accumulate_steps=2))
    forward = DeformableDETR.forward
    passes: list[list[int]] = []

    def poisoned(self: DeformableDETR, images: Any, targets: Any) -> dict[str, Any]:
        outputs = forward(self, images, targets)
        passes.append([target["image_id"] for target in targets])
        if passes[-1:] == passes[1:2] and torch.is_grad_enabled():  # the second batch of a step, whenever it comes
            outputs["pred_logits"].register_hook(lambda gradient: gradient * math.nan)
        return outputs

    file = tmp_path / "failed_batch_0.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeformableDETR, "forward", poisoned)
        with pytest.raises(NumericsError, match=r"gradients must be finite, .*in \['") as error:
            train(config)
        with pytest.raises(NumericsError, match=rf"gradients must be finite.* file={file} step=0"):
            replay(file)
    assert f"where: step=0 image_id={passes[1]} rank=0 | fix: --replay {file}, lower" in str(error.value)
    assert "loss_giou" in replay(file)  # with a gradient that is finite, the same batch is computed to its end


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_full_disk_does_not_hide_why_a_batch_was_to_be_saved(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "failed_batch_0.pt").symlink_to("/dev/full")
    build = Learner.prepare

    def prepared(self: Learner, **options: Any) -> None:
        build(self, **options)
        poison(self.model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "prepare", prepared)
        with pytest.raises(NumericsError, match=r"`pred_logits` must be finite.* step=0 .*fix: make room"):
            train(twelve_steps(shapes, tmp_path, checkpoint_every=0))
    assert not list(tmp_path.glob("failed_batch*"))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_ran_out_names_shapes_and_images(error: RuntimeError) -> None:
    images = nested_tensor_from_tensor_list([torch.zeros(3, 4, 6)])
    targets: Any = [{"image_id": 7, "labels": torch.zeros(2)}]

    with (
        pytest.raises(ResourceError, match=r"image_id=\[7\] \| got a batch of \[1, 3, 4, 6\] on cpu and 2 boxes"),
        explain_memory(images, targets),
    ):
        raise error
    with pytest.raises(RuntimeError, match="another"), explain_memory(images, targets):
        raise RuntimeError("another")


def test_other_data_behind_the_same_path_is_refused_and_moved_data_taken(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(shapes)
    config = twelve_steps(shapes, tmp_path / "run", checkpoint_every=0)
    config = replace(config, optimizer=replace(config.optimizer, epochs=1))
    train(config)

    moved = twelve_steps(tmp_path / "data", tmp_path / "run", resume=True, optimizer=config.optimizer)
    train(replace(moved, data=replace(moved.data, timeout=3, eval_backend="matching")))
    (tmp_path / "data").unlink()
    draw_shapes(tmp_path / "data", train=12, val=4, image_size=64, seed=1)
    with pytest.raises(CheckpointError, match=r"keeps its data \| where: key=data.train file=.*instances_train.json"):
        train(moved)
