"""A sweep of a whole dataset, as a command, as a table and as JSON."""

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from detr_backbone.coco.check import check_split
from detr_backbone.coco.check_report import DataReport
from detr_backbone.coco.findings import KINDS, DataPolicies
from detr_backbone.coco.shapes import draw_shapes
from tests.processes import ROOT, Command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Drawn shapes, with an unknown category and a box without area among those to train on."""
    draw_shapes(tmp_path / "shapes", train=6, val=2, image_size=64)
    path = tmp_path / "shapes" / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 99
    content["annotations"][1]["bbox"][2] = 0
    path.write_text(json.dumps(content))
    return tmp_path


def report(folder: Path, split: str = "train", *, segmentations: bool = False, **policies: Any) -> DataReport:
    paths = folder / "shapes" / split, folder / "shapes" / "annotations" / f"instances_{split}.json"
    splits = [check_split(*paths, workers=1)]
    return DataReport(splits=splits, policies=DataPolicies(**policies), segmentations=segmentations)


def test_the_command_names_every_fault_and_fails_on_errors(process: Command, folder: Path) -> None:
    annotations = "shapes/annotations/instances_train.json"
    options = ("--images", "shapes/train", "--annotations", annotations, "--output", "report.json")
    result = process(folder, str(ROOT / "scripts" / "check_data.py"), *options)

    assert result.returncode == 2, result.stderr
    assert "error    data         1  unknown_category: annotation of an unknown category\n" in result.stdout
    assert "warning  data         1  box_without_area: box has no area; dropped\n" in result.stdout
    assert "training would refuse this dataset" in result.stdout
    written = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    (first, *_) = written["findings"]
    assert (first["kind"], first["severity"], first["count"]) == ("unknown_category", "error", 1)
    assert first["examples"][0]["where"] == f"file={annotations} ann_id=1 key=category_id"


def test_the_command_takes_splits_policies_and_queries_from_a_configuration(script: Command, folder: Path) -> None:
    (folder / "x.yaml").write_text(
        """
        detector: {num_queries: 1}
        data:
          policies: {unknown_category: drop}
          train: {images: shapes/train, annotations: shapes/annotations/instances_train.json}
          val: {images: shapes/val, annotations: shapes/annotations/instances_val.json}
        """
    )
    result = script(folder, "check_data.py", "--config", "x.yaml")

    assert result.returncode == 0, result.stdout + result.stderr
    assert "warning  train        1  unknown_category: annotation of an unknown category; dropped\n" in result.stdout
    assert "more_boxes_than_queries" in result.stdout
    assert "training takes this dataset" in result.stdout


def test_the_command_needs_a_dataset(script: Command, folder: Path) -> None:
    result = script(folder, "check_data.py", "--images", "shapes/train")

    assert result.returncode == 2
    assert "error: give --images and --annotations, or --config" in result.stderr


def test_a_policy_turns_an_error_into_a_warning_and_a_warning_into_an_error(folder: Path) -> None:
    severities = [
        {entry["kind"]: entry["severity"] for entry in report(folder, **policies).as_dict()["findings"]}
        for policies in ({}, {"unknown_category": "drop", "box_without_area": "error"})
    ]

    assert [(s["unknown_category"], s["box_without_area"]) for s in severities] == [
        ("error", "warning"),
        ("warning", "error"),
    ]


@pytest.mark.parametrize(("segmentations", "severity"), [(False, "warning"), (True, "error")])
def test_a_malformed_mask_is_an_error_only_where_masks_are_used(
    folder: Path, segmentations: bool, severity: str
) -> None:
    path = folder / "shapes" / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = [[1, 2, 3]]
    path.write_text(json.dumps(content))

    found = report(folder, "val", segmentations=segmentations).as_dict()["findings"]

    assert {entry["severity"] for entry in found if entry["kind"] == "segmentation_malformed"} == {severity}


def test_a_file_without_any_segmentation_lacks_none(folder: Path) -> None:
    path = folder / "shapes" / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation.pop("segmentation", None)
    path.write_text(json.dumps(content))

    kinds = [
        {entry["kind"] for entry in report(folder, "val", segmentations=wanted).as_dict()["findings"]}
        for wanted in (False, True)
    ]

    assert ["segmentation_missing" in found for found in kinds] == [False, True]


def test_the_documentation_lists_every_kind_with_its_policy() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    hints = get_type_hints(DataPolicies)
    for name, kind in KINDS.items():
        default = getattr(DataPolicies(), name, None)
        choices = [default, *(value for value in get_args(hints[name]) if value != default)] if default else []
        plain = "always refused" if kind.severity == "error" else kind.severity
        policy = " or ".join(f"`{choice}`" for choice in choices) or plain
        assert f"| `{name}` | {kind.what} | {policy} |" in page


def test_every_policy_is_about_a_kind_of_fault() -> None:
    assert set(DataPolicies.__dataclass_fields__) <= set(KINDS)


def test_a_policy_is_named_as_a_fix_where_it_would_help(folder: Path) -> None:
    tables = [report(folder, **policies).table() for policies in ({}, {"unknown_category": "drop"})]

    fix = "fix: correct the file, or set the policy unknown_category to drop"
    assert [fix in table for table in tables] == [True, False]
