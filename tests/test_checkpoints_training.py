"""Training that starts from a whole detector, as a user starts it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from detr_backbone import BackboneConfig
from detr_backbone.checkpoints.open import open_detector
from detr_backbone.coco.shapes import draw_shapes
from detr_backbone.coco.transforms import TransformConfig
from detr_backbone.detectors import DetectorConfig, build_detector
from detr_backbone.errors import WeightsError
from detr_backbone.training import DataConfig, OptimizerConfig, SplitConfig, TrainConfig, parse_config, train

DETECTOR = DetectorConfig(
    backbone=BackboneConfig(name="resnet18", return_layers=("layer1",), train_layers=(), hidden_dim=32),
    num_queries=4,
    nheads=4,
    enc_layers=1,
    dec_layers=1,
    dim_feedforward=16,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A dataset of stars and crosses."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    draw_shapes(folder, train=2, val=1, image_size=32, classes=("star", "cross"))
    train_split, val_split = (
        SplitConfig(images=str(folder / split), annotations=str(folder / "annotations" / f"instances_{split}.json"))
        for split in ("train", "val")
    )
    transforms = TransformConfig(scales=(32,), max_size=32, crop=False, eval_size=32)
    return DataConfig(train=train_split, val=val_split, transforms=transforms, batch_size=2, num_workers=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A detector of ellipses, rectangles, triangles and stars, and its file."""
    model = build_detector(replace(DETECTOR, num_classes=4))
    path = tmp_path_factory.mktemp("source") / "four.pth"
    torch.save({"model": model.state_dict(), "category_names": ("ellipse", "rectangle", "triangle", "star")}, path)
    return path, model


@pytest.fixture
def config(data: DataConfig, source: tuple[Path, nn.Module], tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        output_dir=str(tmp_path / "run"),
        detector=DETECTOR,
        data=data,
        optimizer=OptimizerConfig(epochs=1, lr=1e-12, lr_backbone=0),
        init_from=str(source[0]),
        init_classes="by_name",
    )


def test_a_run_starts_from_another_detector_and_logs_what_it_took(
    config: TrainConfig, source: tuple[Path, nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    train(config)
    log = capsys.readouterr().out
    opened = open_detector(str(Path(config.output_dir) / "checkpoint.pt"))
    trained, theirs = opened.model.state_dict(), source[1].state_dict()

    assert f"weights of {source[0]}" in log
    assert "resized     2 tensors  class_embed" in log
    assert "classes copied by name: star" in log
    assert "mean and std of the images: [0.485" in log
    assert opened.category_names == ("star", "cross")
    # The rates are too small to move anything: what was loaded is what was saved.
    torch.testing.assert_close(trained["query_embed.weight"], theirs["query_embed.weight"], rtol=0, atol=1e-9)
    torch.testing.assert_close(trained["class_embed.weight"][0], theirs["class_embed.weight"][3], rtol=0, atol=1e-9)


def test_a_start_that_does_not_fit_ends_before_anything_is_trained(config: TrainConfig) -> None:
    with pytest.raises(WeightsError, match=r"key=transformer\.encoder\.layers\.1"):
        train(replace(config, detector=replace(DETECTOR, enc_layers=2)))
    assert not (Path(config.output_dir) / "config.yaml").exists()


def test_the_command_line_takes_a_start() -> None:
    parsed = parse_config(["--init_from", "detr_r50", "--init_classes", "by_name"])

    assert (parsed.init_from, parsed.init_classes) == ("detr_r50", "by_name")
