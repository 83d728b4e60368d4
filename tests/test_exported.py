"""From a training checkpoint to an exported detector, and back to datasets."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_backbone.coco.dataset import CocoDetection
from detr_backbone.coco.shapes import draw_shapes
from detr_backbone.detectors import DETR, build_detector, build_postprocess
from detr_backbone.errors import EvaluationError, ExportError
from detr_backbone.evaluation.intervals import Difference, Interval
from detr_backbone.export import export
from detr_backbone.export.metadata import KEY
from detr_backbone.training import (
    Checkpoint,
    SplitConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    evaluate,
    open_split,
    save_checkpoint,
)
from detr_backbone.training.exported import Cost, export_checkpoint, open_exported_detector, quantize_detector
from tests.export_models import build_joiner

CONFIG: dict[str, Any] = {
    "detector": {
        "name": "detr",
        "backbone": {"name": "resnet18", "return_layers": ["layer2"], "hidden_dim": 32},
        "num_classes": 4,
        "num_queries": 5,
        "nheads": 2,
        "enc_layers": 1,
        "dec_layers": 1,
        "dim_feedforward": 32,
    },
    "data": {"transforms": {"eval_size": 64, "scales": [64], "crop": False}, "num_workers": 0},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def config(root: Path) -> TrainConfig:
    draw_shapes(root / "shapes", train=8, val=4, image_size=64)
    config = config_from_dict(CONFIG)
    splits = {
        split: SplitConfig(
            images=str(root / "shapes" / split),
            annotations=str(root / "shapes" / "annotations" / f"instances_{split}.json"),
        )
        for split in ("train", "val")
    }
    return replace(config, data=replace(config.data, **splits))


@pytest.fixture(scope="module")
def validation(config: TrainConfig) -> CocoDetection:
    return open_split(config.data, config.data.val, train=False)


@pytest.fixture(scope="module")
def detector(config: TrainConfig) -> DETR:
    torch.manual_seed(0)
    detector = build_detector(config.detector)
    assert isinstance(detector, DETR)
    return detector.eval()


@pytest.fixture(scope="module")
def checkpoint(detector: DETR, config: TrainConfig, validation: CocoDetection, root: Path) -> Path:
    save_checkpoint(
        Checkpoint(
            model=detector.state_dict(),
            optimizer={},
            schedule={},
            step=1,
            epoch=1,
            images_per_step=1,
            seconds=0.0,
            losses={},
            rows=[],
            threshold=None,
            config=config_to_dict(config),
            category_ids=validation.category_ids,
            category_names=tuple(validation.categories.values()),
        ),
        root / "checkpoint.pt",
    )
    return root / "checkpoint.pt"


@pytest.fixture(scope="module")
def exported(checkpoint: Path, root: Path) -> Path:
    return export_checkpoint(checkpoint, root / "detector.pt2").path


def test_an_exported_checkpoint_holds_its_configuration_categories_and_normalisation(
    exported: Path, config: TrainConfig, validation: CocoDetection
) -> None:
    opened, read = open_exported_detector(exported)

    assert read == config
    assert opened.metadata.categories == validation.categories
    assert opened.metadata.mean == config.data.transforms.mean
    assert opened.metadata.std == config.data.transforms.std


def test_an_exported_detector_is_evaluated_like_the_detector(
    exported: Path, detector: DETR, config: TrainConfig, validation: CocoDetection
) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    postprocess = build_postprocess(config.detector, category_ids=validation.category_ids)
    detections = []
    for model in (detector, open_exported_detector(exported)[0]):
        _, evaluator = evaluate(model, postprocess, validation, config.data, accelerator)
        detections.append(evaluator.detections)

    assert [d["score"] for d in detections[1]] == pytest.approx([d["score"] for d in detections[0]], abs=1e-4)
    assert [d["category_id"] for d in detections[1]] == [d["category_id"] for d in detections[0]]


def test_a_backbone_is_no_detector(root: Path) -> None:
    path = export(build_joiner(), root / "backbone.pt2").path
    with pytest.raises(ExportError, match=r"key=kind \| got a backbone expected a detector"):
        open_exported_detector(path)


def test_a_detector_that_does_not_say_what_it_detects_is_refused(exported: Path, root: Path) -> None:
    path = root / "anonymous.pt2"
    with zipfile.ZipFile(exported) as whole, zipfile.ZipFile(path, "w") as anonymous:
        for entry in whole.infolist():
            content = whole.read(entry)
            if entry.filename.endswith(f"{KEY}.json"):
                content = json.dumps(json.loads(content) | {"config": None}).encode()
            anonymous.writestr(entry, content)
    with pytest.raises(ExportError, match=r"file=.*anonymous\.pt2 key=config"):
        open_exported_detector(path)


def test_int8_is_not_judged_on_what_it_was_calibrated_on(validation: CocoDetection, root: Path) -> None:
    with pytest.raises(EvaluationError, match="got 4 in both"):
        quantize_detector(root / "a.xml", root / "b.xml", calibration=validation, validation=validation)


@pytest.fixture(scope="module")
def float32(checkpoint: Path, root: Path) -> Path:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    return export_checkpoint(checkpoint, root / "float32.xml").path


def test_int8_says_what_it_costs_in_the_file(
    float32: Path, config: TrainConfig, validation: CocoDetection, root: Path
) -> None:
    calibration = open_split(config.data, config.data.train, train=False)
    _, cost = quantize_detector(
        float32, root / "int8.xml", calibration=calibration, validation=validation, calibration_images=3
    )
    said = open_exported_detector(root / "int8.xml")[0].metadata.quantization
    assert said is not None

    assert said["calibration"]["images"] == 3
    assert said["accuracy"]["AP"]["int8"] == cost.ap.b
    assert said["accuracy"]["images"] == 4
    json.dumps(said, allow_nan=False)


def test_what_int8_costs_is_told_in_percent() -> None:
    ap = Difference(a=0.5, b=0.487, interval=Interval(estimate=-0.013, low=-0.021, high=-0.005), p=0.004)
    cost = Cost(ap=ap, ap50=ap, images=7, of="val.json", image_ids_sha256="")

    assert str(cost) == (
        "AP 50.00 in float32 (A), 48.70 in int8 (B), on 7 images of val.json: "
        "A is better: B - A is -1.3 AP [-2.1, -0.5] (p = 0.004)"
    )


def test_int8_that_loses_more_than_it_may_is_refused_unless_that_is_allowed(
    float32: Path, config: TrainConfig, validation: CocoDetection, tmp_path: Path
) -> None:
    calibration = open_split(config.data, config.data.train, train=False)

    def write(**options: Any) -> None:
        quantize_detector(
            float32,
            tmp_path / "int8.xml",
            calibration=calibration,
            validation=validation,
            calibration_images=3,
            max_loss=-1.0,  # not even a gain of one whole AP is
            **options,
        )

    with pytest.raises(ExportError, match=r"key=AP \| got .* expected at least"):
        write()
    assert list(tmp_path.iterdir()) == []

    write(allow_loss=True)
    assert (tmp_path / "int8.xml").is_file()
