"""Published detectors predict as those that were trained here: from the file as it is, under their own categories."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detr_backbone import BackboneConfig
from detr_backbone.checkpoints.categories import COCO_NAMES
from detr_backbone.checkpoints.layouts import DetectorLayout, from_original
from detr_backbone.checkpoints.write import write_weights
from detr_backbone.coco.transforms import TransformConfig
from detr_backbone.detectors import DetectorConfig, build_detector
from detr_backbone.errors import CheckpointError, ConfigError, WeightsError
from detr_backbone.prediction import load_predictor
from detr_backbone.prediction.predictor import model_input
from tests.processes import Ended

Run = Callable[..., Ended]
CONFIG = DetectorConfig(
    backbone=BackboneConfig(name="resnet18", return_layers=("layer4",), hidden_dim=32),
    num_classes=91,
    num_queries=6,
    nheads=4,
    enc_layers=1,
    dec_layers=1,
    dim_feedforward=16,
)


@pytest.fixture(scope="module")
def detr() -> nn.Module:
    """A DETR of COCO's 91 class indices."""
    torch.manual_seed(0)
    detr = build_detector(CONFIG)
    nn.init.normal_(detr.get_submodule("class_embed").bias, std=3)
    return detr.eval()


@pytest.fixture(scope="module")
def published(detr: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint, as facebookresearch/detr writes it in training."""
    path = tmp_path_factory.mktemp("published") / "checkpoint.pth"
    args = argparse.Namespace(nheads=4, dilation=False, dropout=0.1, output_dir=Path("outputs"), lr=np.float64(1e-4))
    torch.save({"model": detr.state_dict(), "optimizer": {}, "lr_scheduler": {}, "epoch": 299, "args": args}, path)
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "one.png"
    Image.effect_noise((96, 64), 80).convert("RGB").save(path)
    return path


@torch.no_grad()
def test_a_published_file_predicts_cocos_categories_by_name(
    command: Run, published: Path, picture: Path, detr: nn.Module, tmp_path: Path
) -> None:
    options = ("--checkpoint", str(published), "--images", str(picture), "--threshold", "0")
    ended = command(tmp_path, "predict", *options, "--output", "found", "--data.transforms.eval_size", "64")
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "found" / "predictions.json").read_text(encoding="utf-8"))

    # The category of each query by hand: the best of the 80 ids that COCO uses.
    image = model_input(Image.open(picture), TransformConfig(eval_size=64))
    logits = detr([image])["pred_logits"][0]
    used = torch.tensor(list(COCO_NAMES))
    expected = sorted(used[logits[:, used].argmax(dim=1)].tolist())
    assert sorted(record["category_id"] for record in found["predictions"]) == expected
    assert {record["category"] for record in found["predictions"]} == {COCO_NAMES[label] for label in expected}
    assert {entry["id"]: entry["name"] for entry in found["categories"]} == COCO_NAMES


def test_a_folder_of_transformers_has_names_and_normalisation_beside_its_weights(
    detr: nn.Module, tmp_path: Path
) -> None:
    tensors = {key: t[[0, 1, 2, 91]] if "class_embed" in key else t for key, t in detr.state_dict().items()}
    write_weights(from_original(tensors, DetectorLayout(names="huggingface")), tmp_path / "model.safetensors")
    config = {"id2label": {"0": "N/A", "1": "cat", "2": "dog"}, "encoder_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    predictor = load_predictor(tmp_path, device="cpu")

    assert predictor.categories == {1: "cat", 2: "dog"}
    assert (predictor.transforms.mean, predictor.transforms.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_normalisation_that_nothing_tells_is_said(
    detr: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(detr.state_dict(), tmp_path / "weights.pth")
    load_predictor(tmp_path / "weights.pth", device="cpu")

    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "mean and std of the images: [0.485, 0.456, 0.406]" in record.getMessage()


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("other.pth", {"model": {"roi_heads.weight": torch.ones(1)}}, WeightsError, "must be of DETR or Deformable"),
        ("page.pth", b"<html>", WeightsError, "a web page"),
        ("cut.pt", b"PK\x03\x04", CheckpointError, "checkpoint cannot be read"),
        ("gone/checkpoint.pt", None, CheckpointError, "checkpoint cannot be read"),
        ("detr_r51", None, WeightsError, "did you mean 'detr_r50'"),
    ],
)
def test_what_is_no_detector_is_an_error_of_one_line(
    tmp_path: Path, name: str, content: Any, error: type[Exception], message: str
) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(error, match=message) as raised:
        load_predictor(tmp_path / name if "." in name else name)

    assert "\n" not in str(raised.value)


def test_the_detector_of_a_published_file_cannot_be_changed(published: Path) -> None:
    with pytest.raises(ConfigError, match="key=detector"):
        load_predictor(published, overrides=["--detector.nheads", "2"])


def test_a_published_file_is_evaluated_on_a_dataset_of_its_categories(
    command: Run, published: Path, picture: Path, tmp_path: Path
) -> None:
    box = {"id": 1, "image_id": 1, "category_id": 90, "bbox": [10, 10, 40, 30], "area": 1200, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": picture.name, "height": 64, "width": 96}],
        "annotations": [box],
        "categories": [{"id": label, "name": name} for label, name in COCO_NAMES.items()],
    }
    (tmp_path / "val.json").write_text(json.dumps(content))
    options = ("--checkpoint", str(published), "--images", str(picture.parent), "--annotations", "val.json")
    ended = command(tmp_path, "evaluate", *options, "--intervals", "0", "--data.transforms.eval_size", "64")

    assert ended.code == 0, ended.err
    assert "AP" in ended.out
