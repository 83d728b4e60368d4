"""Exported models in OpenVINO, and in int8; OpenVINO and NNCF are too large for every test run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from detr_backbone import Joiner
from detr_backbone.errors import ExportError
from detr_backbone.export import ExportedDetector, ExportReport, export, load_exported, quantize
from tests.export_models import assert_same, build_joiner, build_tiny_detr, images

pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def joiner() -> Joiner:
    return build_joiner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openvino")


@pytest.fixture(scope="module")
def exported(joiner: Joiner, folder: Path) -> ExportReport:
    return export(joiner, folder / "joiner.xml", mean=(0.5, 0.5, 0.5))


def test_a_joiner_gives_levels_and_positions_of_padded_images(joiner: Joiner, exported: ExportReport) -> None:
    features, positions = joiner(images())
    got_features, got_positions = load_exported(exported.path)(images())

    assert_same([level.tensors for level in got_features], [level.tensors for level in features])
    assert_same(got_positions, positions)


def test_an_onnx_file_runs_in_openvino_with_its_metadata(joiner: Joiner, folder: Path) -> None:
    report = export(joiner, folder / "joiner.onnx")
    loaded = load_exported(report.path, engine="openvino", threads=1)
    assert isinstance(loaded, Joiner)

    assert loaded[0].metadata == report.metadata
    assert_same(loaded(images())[0][-1].tensors, joiner(images())[0][-1].tensors)


def test_both_engines_check_an_onnx_file(joiner: Joiner, folder: Path) -> None:
    report = export(joiner, folder / "checked.onnx")

    assert {batch.split(",")[0] for batch in report.differences} == {"onnxruntime", "openvino"}


def test_metadata_come_back_from_the_xml_file(exported: ExportReport) -> None:
    loaded = load_exported(exported.path)
    assert isinstance(loaded, Joiner)

    assert loaded[0].metadata == exported.metadata


def test_a_detector_gives_the_detections_of_each_image(folder: Path) -> None:
    detector = build_tiny_detr()
    loaded = load_exported(export(detector, folder / "detector.xml").path)

    assert isinstance(loaded, ExportedDetector)
    assert_same(loaded(images())["pred_boxes"], detector(images())["pred_boxes"])


def test_bf16_is_an_option_and_close(joiner: Joiner, exported: ExportReport) -> None:
    got = load_exported(exported.path, precision="bf16")(images())[0][-1].tensors
    expected = joiner(images())[0][-1].tensors

    assert (got - expected).norm() < 0.02 * expected.norm()  # 8 bits of mantissa through three convolutions


def test_a_file_of_another_program_is_refused(folder: Path) -> None:
    path = folder / "foreign.xml"
    path.write_text("<net></net>")
    with pytest.raises(ExportError, match=r"file=.*foreign\.xml"):
        load_exported(path)


def test_int8_stays_close_and_says_what_it_was_calibrated_on(
    joiner: Joiner, exported: ExportReport, folder: Path
) -> None:
    pytest.importorskip("nncf")

    def measure(quantized: nn.Module) -> Mapping[str, Any]:
        got, expected = quantized(images())[0][-1].tensors, joiner(images())[0][-1].tensors
        return {"difference": float((got - expected).norm() / expected.norm())}

    calibration = [torch.randn(3, 40, 48) for _ in range(8)]
    quantize(exported.path, folder / "int8.xml", calibration, measure=measure, description="noise")
    loaded = load_exported(folder / "int8.xml")
    assert isinstance(loaded, Joiner)
    said = loaded[0].metadata

    assert said.precision == "int8"
    assert said.quantization is not None
    assert said.quantization["calibration"]["images"] == 8
    assert 0 < said.quantization["accuracy"]["difference"] < 0.1


def test_an_int8_file_that_is_not_accepted_is_not_left(exported: ExportReport, tmp_path: Path) -> None:
    pytest.importorskip("nncf")

    def refuse(_: nn.Module) -> Mapping[str, Any]:
        raise ExportError("too much is lost")

    with pytest.raises(ExportError, match="too much is lost"):
        quantize(exported.path, tmp_path / "int8.xml", [torch.randn(3, 40, 48)], measure=refuse, description="noise")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "count", "message"),
    [
        ("int8.onnx", 1, r"`path` must end in \.xml for int8"),
        ("int8.xml", 0, "`images` must hold at least one image for int8, got none"),
    ],
)
def test_options_that_do_not_fit_int8_are_refused(
    path: str, count: int, message: str, exported: ExportReport, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        quantize(
            exported.path,
            tmp_path / path,
            [torch.zeros(3, 32, 32)] * count,
            measure=lambda _: {},
            description="nothing",
        )
