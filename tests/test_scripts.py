"""The commands that README shows, run as a user runs them."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import pytest

from detr_backbone.coco.shapes import CLASSES, draw_shapes
from detr_backbone.commands.program import COMMANDS, main
from tests.processes import ROOT, Command

SCRIPTS = ROOT / "scripts"
TINY = """
detector:
  name: deformable_detr
  backbone: {name: resnet18, return_layers: [layer2], hidden_dim: 32}
  num_queries: 5
  nheads: 4
  enc_layers: 1
  dec_layers: 1
  dim_feedforward: 32
data:
  train: {images: shapes/train, annotations: shapes/annotations/instances_train.json}
  val: {images: shapes/val, annotations: shapes/annotations/instances_val.json}
  transforms: {scales: [64], max_size: 64, crop: false, eval_size: 64}
  batch_size: 2
  num_workers: 0
optimizer: {epochs: 1}
output_dir: run
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small dataset and a recipe for it."""
    folder = tmp_path_factory.mktemp("scripts")
    draw_shapes(folder / "shapes", train=9, val=5, image_size=64)
    (folder / "tiny.yaml").write_text(TINY, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def trained(folder: Path) -> Path:
    """The checkpoint of a run of one epoch, in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "--config", "tiny.yaml", "--mixed_precision", "bf16"]) == 0
    return folder / "run" / "checkpoint.pt"


@pytest.mark.sweep
def test_torchrun_starts_processes_that_share_the_images_and_one_of_them_speaks(process: Command, folder: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(SCRIPTS / "train.py"))
    result = process(folder, *launch, "--config", "tiny.yaml", "--mixed_precision", "bf16", "--output_dir", "two")

    assert result.returncode == 0, result.stderr
    assert result.stdout.count("9 images to train on, 5 images to evaluate, 2 steps per epoch") == 1
    assert result.stdout.count("images 5 of 5") == 1


def test_evaluating_a_checkpoint_prints_and_writes_its_numbers(script: Command, trained: Path, folder: Path) -> None:
    options = ("--checkpoint", str(trained), "--output", "evaluation", "--report", "r")
    result = script(folder, "evaluate.py", *options)

    assert result.returncode == 0, result.stderr
    numbers = json.loads((folder / "evaluation" / "results.json").read_text(encoding="utf-8"))
    assert numbers["images"] == 5
    assert set(numbers["per_class"]) == set(CLASSES)
    report = json.loads((folder / "r" / "report.json").read_text(encoding="utf-8"))
    assert "name: deformable_detr" in report["config"]
    assert report["origin"]["Device"].startswith("cpu (")
    detections = json.loads((folder / "evaluation" / "detections.json").read_text(encoding="utf-8"))
    assert set(detections[0]) == {"image_id", "category_id", "bbox", "score"}


def test_an_untrained_detector_can_be_evaluated_and_says_so(script: Command, folder: Path) -> None:
    result = script(folder, "evaluate.py", "--config", "tiny.yaml")

    assert result.returncode == 0, result.stderr
    assert "this detector is untrained" in result.stdout
    assert "images 5 of 5" in result.stdout


def test_detections_of_any_detector_can_be_evaluated_and_reported(script: Command, folder: Path) -> None:
    truth = json.loads((folder / "shapes" / "annotations" / "instances_val.json").read_text(encoding="utf-8"))
    keys = ("image_id", "category_id", "bbox")
    found = [{key: entry[key] for key in keys} | {"score": 0.5} for entry in truth["annotations"]]
    for entry in found:  # perfect detections would be the same in every half, and have no interval
        entry["bbox"][0] += entry["image_id"]
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    data = ("--images", "shapes/val", "--annotations", "shapes/annotations/instances_val.json")
    options = ("--detections", "found.json", "--report", "report", "--output", "again", "--intervals", "20")
    result = script(folder, "evaluate.py", *options, *data)

    assert result.returncode == 0, result.stderr
    assert re.search(r"^AP +\d+\.\d \[\d", result.stdout, re.MULTILINE)
    assert "report: report/report.html" in result.stdout
    assert {path.suffix for path in (folder / "report").iterdir()} == {".html", ".md", ".json", ".csv"}
    again = json.loads((folder / "again" / "detections.json").read_text(encoding="utf-8"))
    assert sorted(map(str, again)) == sorted(map(str, found))


def test_images_without_a_detection_in_the_file_are_counted(script: Command, folder: Path) -> None:
    truth = "shapes/annotations/instances_val.json"
    one = json.loads((folder / truth).read_text(encoding="utf-8"))["annotations"][0]
    content = [{key: one[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5}]
    (folder / "one.json").write_text(json.dumps(content), encoding="utf-8")
    result = script(folder, "evaluate.py", "--detections", "one.json", "--annotations", truth, "--intervals", "0")

    images = re.search(r"images (\d+) of", result.stdout)[1]
    assert f"no detection in {int(images) - 1} of {images} images" in result.stdout


def test_two_detectors_are_compared(script: Command, folder: Path) -> None:
    truth = json.loads((folder / "shapes" / "annotations" / "instances_val.json").read_text(encoding="utf-8"))
    keys = ("image_id", "category_id", "bbox")
    found = [{key: entry[key] for key in keys} | {"score": 0.5} for entry in truth["annotations"]]
    (folder / "all.json").write_text(json.dumps(found), encoding="utf-8")
    (folder / "none.json").write_text("[]", encoding="utf-8")
    options = ("--a", "none.json", "--b", "all.json", "--resamples", "20", "--output", "comparison.json")
    annotations = ("--annotations", "shapes/annotations/instances_val.json")
    result = script(folder, "compare.py", *annotations, *options)

    assert result.returncode == 0, result.stderr
    assert "A none.json\nB all.json\n5 images, 20 resamples\n" in result.stdout
    assert ["AP", "0.0", "100.0", "+100.0", "-"] in [line.split() for line in result.stdout.splitlines()]
    comparison = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    assert comparison["resamples"] == 20


def test_a_subset_is_written_and_evaluated(script: Command, trained: Path, folder: Path) -> None:
    source = ("--images", "shapes/val", "--annotations", "shapes/annotations/instances_val.json")
    chosen = ("--count", "2", "--categories", "star", "1", "rectangle", "--output", "two")
    written = script(folder, "make_subset.py", *source, *chosen)

    assert written.returncode == 0, written.stderr
    manifest = json.loads((folder / "two" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["options"]["categories"] == ["star", 1, "rectangle"]
    assert len(list((folder / "two" / "val").iterdir())) == manifest["images"] == 2
    options = ("--subset.count", "2", "--subset.categories", "[star, 1, rectangle]", "--output", "evaluated")
    result = script(folder, "evaluate.py", "--checkpoint", str(trained), *options)
    assert result.returncode == 0, result.stderr
    ids = manifest["image_ids_sha256"]
    words = f"2 of 5 images (with star or 1 or rectangle, seed 0, ids sha256 {ids[:12]})"
    assert words in written.stdout
    assert f"images 2 of 2\nsubset {words}" in result.stdout
    numbers = json.loads((folder / "evaluated" / "results.json").read_text(encoding="utf-8"))
    assert (numbers["images"], numbers["subset"], numbers["image_ids_sha256"]) == (2, words, ids)


def test_a_look_inside_is_a_table_and_drawings(script: Command, trained: Path, folder: Path) -> None:
    options = ("--images", "shapes/val", "--limit", "1", "--queries", "2", "--output", "look")
    result = script(folder, "inspect_backbone.py", "--checkpoint", str(trained), *options)

    assert result.returncode == 0, result.stderr
    assert "trained deformable_detr on 000001" in result.stdout
    assert "backbone.0.body.layer2" in result.stdout
    rows = json.loads((folder / "look" / "layers.json").read_text(encoding="utf-8"))["rows"]
    assert rows[0]["path"] == "backbone.0"
    drawings = {path.stem for path in (folder / "look").glob("*.png")}
    assert drawings == {"levels", "000001.queries", "000001.backbone.0.body.layer2"}


def test_an_untrained_detr_can_be_looked_at_layer_by_layer(script: Command, folder: Path) -> None:
    (folder / "detr.yaml").write_text(TINY.replace("deformable_detr", "detr"), encoding="utf-8")
    options = ("--layers", "[backbone.0.body.layer1.0, transformer.decoder]", "--limit", "1", "--output", "untrained")
    result = script(folder, "inspect_backbone.py", "--config", "detr.yaml", *options)

    assert result.returncode == 0, result.stderr
    assert "untrained detr on shapes000001" in result.stdout
    drawings = {path.stem for path in (folder / "untrained").glob("*.png")}
    assert drawings == {"levels", "shapes000001.queries", "shapes000001.backbone.0.body.layer1.0"}


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three annotated images, without image files, of classes that few consoles can show; detections."""
    folder = tmp_path_factory.mktemp("cats")
    boxes = [{"image_id": i, "category_id": 1, "bbox": [10, 10, 12 + i, 12]} for i in (1, 2, 3)]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "猫"}, {"id": 2, "name": "犬"}],
        "annotations": [{"id": i, **box} for i, box in enumerate(boxes, start=1)],
    }
    (folder / "val.json").write_text(json.dumps(content), encoding="utf-8")
    found = [{**box, "score": 0.5} for box in boxes]
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    (folder / "less.json").write_text(json.dumps(found[:2]), encoding="utf-8")
    return folder


TRUTH = ("--annotations", "val.json")


class Full(io.RawIOBase):
    """A console or a file that takes nothing."""

    def writable(self) -> bool:
        return True

    def write(self, _: object) -> int:
        raise OSError(28, "No space left on device")


WRITTEN = [
    (("evaluate.py", "--detections", "found.json", *TRUTH, "--output", "o", "--intervals", "20"), "o/results.json"),
    (("compare.py", "--a", "less.json", "--b", "found.json", *TRUTH, "--output", "c.json"), "c.json"),
    (("check_data.py", "--images", ".", *TRUTH, "--decode", "false", "--output", "d.json"), "d.json"),
]


@pytest.mark.parametrize(("words", "written"), WRITTEN)
def test_numbers_are_on_disk_before_they_are_printed(
    script: Command, cats: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], written: str
) -> None:
    (cats / written).unlink(missing_ok=True)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Full(), "utf-8", write_through=True))  # type: ignore[arg-type]
    result = script(cats, *words)

    assert result.returncode == 1
    assert "error: No space left on device" in result.stderr
    assert json.loads((cats / written).read_text(encoding="utf-8"))


@pytest.mark.parametrize(("words", "written"), WRITTEN)
def test_numbers_are_written_though_the_console_cannot_show_a_name(
    script: Command, cats: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], written: str
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    with contextlib.suppress(UnicodeEncodeError):
        script(cats, *words)

    assert json.loads((cats / written).read_text(encoding="utf-8"))


def test_files_for_programs_say_their_unit_and_screens_show_percent(script: Command, cats: Path) -> None:
    evaluated = script(cats, "evaluate.py", "--detections", "less.json", *TRUTH, "--output", "unit", "--intervals", "0")
    compared = script(cats, "compare.py", "--a", "less.json", "--b", "found.json", *TRUTH, "--output", "unit.json")

    results = json.loads((cats / "unit" / "results.json").read_text(encoding="utf-8"))
    assert results["unit"].startswith("fractions of 1")
    assert f"AP         {100 * results['stats']['AP']:.1f}\n" in evaluated.stdout
    assert json.loads((cats / "unit.json").read_text(encoding="utf-8"))["unit"] == results["unit"]
    assert re.search(r"^AP +66\.3  100\.0  \+33\.7", compared.stdout, re.MULTILINE)


def test_thresholds_areas_and_detections_per_image_are_options_and_named_in_the_result(
    script: Command, cats: Path
) -> None:
    settings = ("--iou_thresholds", "[0.3]", "--area_ranges", "{tiny: [0, 170]}", "--max_dets", "[1, 300]")
    words = ("evaluate.py", "--detections", "found.json", *TRUTH, *settings)
    result = script(cats, *words, "--output", "other", "--intervals", "20", "--backend", "matching")

    assert result.returncode == 0, result.stderr
    assert "settings IoU 0.3, areas tiny 0 to 170, at most 1, 300 detections" in result.stdout
    results = json.loads((cats / "other" / "results.json").read_text(encoding="utf-8"))
    assert list(results["stats"]) == ["AP", "AP30", "AP_tiny", "AR_1", "AR_300", "AR_tiny"]
    assert results["settings"]["max_dets"] == [1, 300]
    assert "--report shows COCO's settings" in script(cats, *words, "--report", "r").stderr


def test_an_ignore_flag_is_handled_as_the_policy_of_an_evaluation_says(script: Command, cats: Path) -> None:
    content = json.loads((cats / "val.json").read_text(encoding="utf-8"))
    content["annotations"][2]["ignore"] = 1
    (cats / "ignored.json").write_text(json.dumps(content), encoding="utf-8")
    words = ("evaluate.py", "--detections", "less.json", "--annotations", "ignored.json", "--intervals", "0")

    kept, crowd = (script(cats, *words, "--policies.ignore_flag", policy).stdout for policy in ("keep", "crowd"))

    assert re.search(r"^AP +66\.3$", kept, re.MULTILINE)
    assert "warning: annotation is marked to be ignored" in kept
    assert re.search(r"^AP +100\.0$", crowd, re.MULTILINE)
    assert "warning" not in crowd


def test_data_of_a_run_is_found_from_any_folder(script: Command, tiny_run: Path) -> None:
    (tiny_run / "elsewhere").mkdir()
    options = ("--checkpoint", str(tiny_run / "run" / "checkpoint.pt"), "--data.batch_size", "1", "--intervals", "0")
    result = script(tiny_run / "elsewhere", "evaluate.py", *options)

    assert result.returncode == 0, result.stderr
    assert "images 3 of 3" in result.stdout


SCRIPTS_OF = {"inspect_backbone": "inspect"}
"""Scripts that have another name than their command."""


@pytest.mark.parametrize("name", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_every_script_is_its_command(script: Command, tmp_path: Path, name: str) -> None:
    command = SCRIPTS_OF.get(name, name.replace("_", "-"))
    shown = script(tmp_path, f"{name}.py", "--help")

    assert command in COMMANDS
    assert shown.returncode == 0
    assert shown.stdout.startswith(f"usage: detr-backbone {command} ")
    assert len((SCRIPTS / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 8
