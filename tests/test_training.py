"""From a COCO folder to an AP: train, stop, resume, evaluate, predict."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._dynamo.utils import counters

from detr_backbone.coco.findings import DataPolicies
from detr_backbone.coco.shapes import draw_shapes
from detr_backbone.detectors import build_detector, build_postprocess
from detr_backbone.errors import AnnotationError, CheckpointError, ConfigError, NumericsError
from detr_backbone.training import (
    OptimizerConfig,
    build_accelerator,
    config_from_dict,
    detector_of,
    evaluate,
    load_checkpoint,
    open_split,
    train,
)
from detr_backbone.training.checkpoint import load_model, refuse_another_run
from detr_backbone.training.data import train_loader
from detr_backbone.training.optimizer import build_optimizer, build_schedule, clip_gradient
from detr_backbone.training.run_folder import CHECKPOINT
from tests.tiny_run import tiny


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    draw_shapes(folder, train=10, val=4, image_size=64)
    return folder


@pytest.fixture(scope="session")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train(tiny(shapes, folder))
    return folder


def test_a_run_leaves_its_configuration_its_log_and_its_checkpoint(run: Path) -> None:
    files = {"config.yaml", "metrics.csv", "curves.png", CHECKPOINT, "checkpoint_1.pt", "checkpoint_best.pt"}
    assert {path.name for path in run.iterdir()} == files
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["detector"]["num_classes"] >= 3


def test_the_log_has_a_row_of_finite_losses_for_every_epoch(run: Path) -> None:
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "2"), ("2", "4")]
    assert all(math.isfinite(float(row[name])) for row in rows for name in ("loss", "loss_ce", "loss_bbox", "AP"))


def test_a_run_does_not_overwrite_another(run: Path, shapes: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must not overwrite .* fix: --resume true"):
        train(tiny(shapes, run))


def test_resuming_nothing_is_an_error(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(tiny(shapes, tmp_path / "none", resume=True))


CHANGES = [
    ({"optimizer": OptimizerConfig(epochs=2, lr_drop=1, lr=1e-3)}, r"key=optimizer\.lr \| got 0.001 expected 0.0001"),
    ({"seed": 1}, "key=seed"),
]


@pytest.mark.parametrize(("changes", "message"), CHANGES)
def test_a_resumed_run_keeps_its_settings(run: Path, shapes: Path, changes: dict[str, Any], message: str) -> None:
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        train(tiny(shapes, run, resume=True, **changes))
    assert (run / "config.yaml").read_bytes() == before


def test_a_run_from_before_an_option_came_is_resumed_with_its_default(run: Path, shapes: Path) -> None:
    checkpoint = load_checkpoint(run / CHECKPOINT)
    config = config_from_dict(checkpoint.config)
    data = {key: value for key, value in checkpoint.config["data"].items() if key != "group_by_aspect_ratio"}
    older = replace(checkpoint, config={**checkpoint.config, "data": data})

    same = {"data": checkpoint.data, "images_per_step": checkpoint.images_per_step}
    refuse_another_run(older, config, checkpoint.categories, **same)
    grouped = replace(config, data=replace(config.data, group_by_aspect_ratio=True))
    with pytest.raises(CheckpointError, match=r"key=data\.group_by_aspect_ratio \| got True expected False"):
        refuse_another_run(older, grouped, checkpoint.categories, **same)


def test_the_saved_configuration_opens_with_the_identity_of_the_images(run: Path) -> None:
    lines = (run / "config.yaml").read_text(encoding="utf-8").splitlines()

    # seq 1 10 | sha256sum and seq 1 4 | sha256sum
    assert lines[:2] == [
        "# data.train: 10 images, ids sha256 bf794518e35d7f1ce3a50b3058c4191bb9401e568fc645d77e10b0f404cf1f22",
        "# data.val: 4 images, ids sha256 16fbd7d1f18d2fedb247d73edc3bc6aa040f5ab99bd3b48c35b79e543d22179b",
    ]


def test_a_resumed_run_keeps_its_categories(run: Path, shapes: Path) -> None:
    checkpoint = load_checkpoint(run / CHECKPOINT)
    config, categories = config_from_dict(checkpoint.config), checkpoint.categories

    same = {"data": checkpoint.data, "images_per_step": checkpoint.images_per_step}
    refuse_another_run(checkpoint, config, categories, **same)
    swapped = dict(zip(categories, reversed(categories.values()), strict=True))
    with pytest.raises(CheckpointError, match="keeps its categories"):
        refuse_another_run(checkpoint, config, swapped, **same)


def test_training_and_validation_must_name_their_categories_alike(shapes: Path, tmp_path: Path) -> None:
    config = tiny(shapes, tmp_path / "run")
    content = json.loads(Path(config.data.val.annotations).read_text(encoding="utf-8"))
    for category, name in zip(content["categories"], ["star", "ellipse", "rectangle", "triangle"], strict=True):
        category["name"] = name
    renamed = tmp_path / "renamed.json"
    renamed.write_text(json.dumps(content), encoding="utf-8")
    val = replace(config.data.val, annotations=str(renamed))

    with pytest.raises(ConfigError, match=r"categories of `data.train` .*key=categories \| got \{1: 'star'"):
        train(replace(config, data=replace(config.data, val=val)))


def test_images_with_more_boxes_than_queries_are_counted_or_refused(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(shapes, tmp_path / "run", dry_run=True)
    config = replace(config, detector=replace(config.detector, num_queries=1))
    boxes = open_split(config.data, config.data.train, train=True).boxes_per_image
    crowded = int((boxes > 1).sum())
    assert crowded > 0
    assert len(boxes) == 10
    refusing = replace(config.data, policies=DataPolicies(more_boxes_than_queries="error"))

    with pytest.raises(AnnotationError, match=r"more boxes than queries \| where: .* image_id=\d+ .*1 at most"):
        train(replace(config, data=refusing))
    with pytest.warns(UserWarning, match="raise `num_queries`"):
        train(config)
    assert f"image has more boxes than queries: {crowded}" in capsys.readouterr().out


def test_nan_in_the_outputs_of_an_evaluation_names_its_images(run: Path, shapes: Path, tmp_path: Path) -> None:
    model, config = detector_of(load_checkpoint(run / CHECKPOINT))
    torch.nn.init.constant_(model.get_parameter("class_embed.1.bias"), math.nan)
    dataset = open_split(config.data, config.data.val, train=False)

    with pytest.raises(NumericsError, match=r"image_id=\[1, 2, 3, 4\]"):
        evaluate(model, build_postprocess(config.detector), dataset, config.data, build_accelerator())


def test_the_number_of_classes_is_the_datas(shapes: Path, tmp_path: Path) -> None:
    config = tiny(shapes, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"`detector.num_classes` must be null or \d+ as in the data, got 91"):
        train(replace(config, detector=replace(config.detector, num_classes=91)))


def test_a_split_that_is_not_set_is_named(shapes: Path, tmp_path: Path) -> None:
    config = tiny(shapes, tmp_path / "run")
    half = replace(config.data.val, images="")
    with pytest.raises(ConfigError, match=r"`data.val.images` and `data.val.annotations` must be set"):
        train(replace(config, data=replace(config.data, val=half)))


def test_a_checkpoint_gives_the_detector_back(run: Path) -> None:
    checkpoint = load_checkpoint(run / CHECKPOINT)
    model, config = detector_of(checkpoint)

    assert config.detector.num_classes == len(checkpoint.category_names)
    assert not model.training
    assert all(torch.equal(tensor, checkpoint.model[name]) for name, tensor in model.state_dict().items())


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "torn.pt").write_bytes(b"PK torn")
    with pytest.raises(CheckpointError, match=r"cannot be read \| where: file=.*torn\.pt"):
        load_checkpoint(tmp_path / "torn.pt")


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"lacks .*optimizer, .* where: file=.*other\.pt"):
        load_checkpoint(tmp_path / "other.pt")


def test_a_checkpoint_of_another_detector_is_refused(run: Path, shapes: Path, tmp_path: Path) -> None:
    detector = replace(tiny(shapes, tmp_path).detector, num_classes=1)
    with pytest.raises(CheckpointError, match="another detector"):
        load_model(load_checkpoint(run / CHECKPOINT), build_detector(detector))


def small_model(shapes: Path) -> torch.nn.Module:
    return build_detector(replace(tiny(shapes, shapes).detector, num_classes=3))


def test_every_trained_parameter_is_in_one_group_with_its_rate(shapes: Path) -> None:
    model = small_model(shapes)
    optimizer = build_optimizer(model, OptimizerConfig(lr=1.0, lr_backbone=0.5, lr_linear_proj_mult=0.1))
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    assert len(rate) == len(trained) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert rate[id(trained["backbone.0.body.layer2.0.conv1.weight"])] == 0.5
    assert rate[id(trained["transformer.encoder.layers.0.self_attn.sampling_offsets.weight"])] == 0.1
    assert rate[id(trained["input_proj.0.0.weight"])] == 1.0


def rates(config: OptimizerConfig, steps: int) -> list[float]:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [parameter], "lr": 1.0, "name": "detector"}])
    schedule = build_schedule(optimizer, config, steps_per_epoch=2)
    seen = []
    for _ in range(steps):
        seen.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return seen


def test_the_step_schedule_drops_to_a_tenth() -> None:
    assert rates(OptimizerConfig(epochs=3, lr_drop=2), 6) == pytest.approx([1, 1, 1, 1, 0.1, 0.1])


def test_the_cosine_schedule_falls_to_zero_after_its_warm_up() -> None:
    got = rates(OptimizerConfig(epochs=2, schedule="cosine", warmup_steps=1), 5)

    cosine = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
    assert got == pytest.approx([cosine[0] / 2, *cosine[1:]], abs=1e-12)


def test_a_gradient_that_is_not_finite_is_an_error() -> None:
    model = torch.nn.Linear(1, 1)
    model.weight.grad, model.bias.grad = torch.ones(1, 1), torch.tensor([math.nan])
    with pytest.raises(NumericsError, match=r"gradients must be finite, got NaN or infinity in \['bias'\]"):
        clip_gradient(model, 0.1)


def test_a_gradient_is_clipped_to_its_norm_or_not_at_all() -> None:
    model = torch.nn.Linear(1, 1)
    model.weight.grad, model.bias.grad = torch.full((1, 1), 3.0), torch.full((1,), 4.0)

    clip_gradient(model, 0)
    assert (model.weight.grad.item(), model.bias.grad.item()) == (3.0, 4.0)
    clip_gradient(model, 0.5)
    # the norm 5 becomes 0.5, to the 1e-6 that torch adds to it
    assert (model.weight.grad.item(), model.bias.grad.item()) == pytest.approx((0.3, 0.4), rel=1e-5)


def test_the_detector_is_compiled_where_the_configuration_says_so(shapes: Path, tmp_path: Path) -> None:
    compiled: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
        train(tiny(shapes, tmp_path / "run", dry_run=True, compile=True))

    assert compiled == ["DeformableDETR"]


@pytest.mark.sweep
@pytest.mark.no_cover  # which would watch every line of torch's compiler too
def test_a_compiled_run_has_few_graphs_and_an_evaluation(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_module = torch.nn.Module.compile
    # Inductor would take minutes; what it is given is found here all the same.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend="eager"))
    torch.compiler.reset()
    counters.clear()
    config = tiny(shapes, tmp_path / "run", compile=True)
    result = train(replace(config, data=replace(config.data, pad_to_multiple_of=64)))

    assert 2 <= counters["stats"]["unique_graphs"] <= 6  # one padded size, of training and of evaluation
    assert not counters["graph_break"]
    assert 0 <= result.stats["AP"] <= 1


def test_batches_have_sides_of_the_multiple_that_is_asked_for(shapes: Path, tmp_path: Path) -> None:
    data = replace(tiny(shapes, tmp_path).data, pad_to_multiple_of=48)
    loader, _ = train_loader(open_split(data, data.train, train=True), data)
    images, _ = next(iter(loader))

    assert [side % 48 for side in images.tensors.shape[-2:]] == [0, 0]
    assert images.is_padded
