"""From files, pictures and arrays to detections: what is taken, what is left out and said, what is written."""

import io
import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from detr_backbone.coco.images import read_image
from detr_backbone.errors import AnnotationError, ConfigError, DataError
from detr_backbone.prediction import (
    Prediction,
    Predictor,
    coco_results,
    find_images,
    load_predictor,
    prediction_records,
    read_image_list,
    to_supervision,
)
from detr_backbone.training import load_checkpoint
from tests.processes import Ended

Run = Callable[..., Ended]
ONE = Prediction(
    scores=torch.tensor([0.9, 0.25]),
    category_ids=torch.tensor([3, 1]),
    boxes=torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 5.0, 5.0]]),
    names=("star", "ellipse"),
    size=(100, 200),
)


@pytest.fixture(scope="module")
def predictor(tiny_run: Path) -> Predictor:
    return load_predictor(tiny_run / "run" / "checkpoint.pt", device="cpu")


@pytest.fixture
def stray(tmp_path: Path) -> Path:
    """A folder as people have them: two pictures among what is none."""
    folder = tmp_path / "stray"
    (folder / "more").mkdir(parents=True)
    picture = Image.effect_noise((60, 40), 80).convert("RGB")
    picture.save(folder / "a.jpg")
    picture.save(folder / "b.webp")
    picture.save(folder / "more" / "a.png")
    picture.save(folder / "no_ending", format="PNG")
    picture.resize((32, 32)).save(folder / "favicon.ico")
    (folder / "._a.jpg").write_bytes(b"\0\5\x16\7" + bytes(60))
    (folder / "paper.pdf").write_bytes(b"%PDF-1.4")
    whole = io.BytesIO()
    picture.save(whole, "JPEG")
    (folder / "cut.jpg").write_bytes(whole.getvalue()[:-200])
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(60))
    (folder / "labels.txt").write_text("0 0 0 1 1", encoding="utf-8")
    return folder


def test_files_pictures_and_arrays_give_the_same_detections(predictor: Predictor, tiny_run: Path) -> None:
    path = tiny_run / "shapes" / "val" / "000001.png"
    picture = read_image(path)
    kinds = [path, str(path), picture, np.asarray(picture)]

    first, *others = predictor(kinds)

    assert len(first) > 0
    assert all(torch.equal(first.boxes, other.boxes) and torch.equal(first.scores, other.scores) for other in others)


def test_a_picture_is_what_its_file_is_upright_and_of_16_bits(predictor: Predictor, tmp_path: Path) -> None:
    grey = np.asarray(Image.effect_noise((60, 40), 80))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(grey).save(tmp_path / "turned.png", exif=exif)

    for name in ("grey.png", "turned.png"):
        with Image.open(tmp_path / name) as opened:
            from_file, from_picture = predictor([tmp_path / name, opened])
        assert from_picture.size == from_file.size
        assert torch.equal(from_picture.scores, from_file.scores)


def test_boxes_are_in_pixels_of_the_picture_and_clipped_within_it(predictor: Predictor) -> None:
    (prediction,) = predictor([Image.new("RGB", (300, 200))])

    assert prediction.size == (200, 300)
    assert prediction.boxes[:, 2].max() > 64  # the picture's own pixels, not those of the resized one
    beyond = replace(prediction, boxes=torch.tensor([[-5.0, 10.0, 310.0, 250.0]]))
    assert beyond.clipped().boxes.tolist() == [[0, 10, 300, 200]]


def test_the_best_come_first_under_the_ids_and_names_of_the_dataset(predictor: Predictor, tiny_run: Path) -> None:
    categories = load_checkpoint(tiny_run / "run" / "checkpoint.pt").categories
    (prediction,) = predictor([Image.new("RGB", (64, 64))])

    assert prediction.scores.tolist() == sorted(prediction.scores.tolist(), reverse=True)
    assert [categories[i] for i in prediction.category_ids.tolist()] == list(prediction.names)


def test_a_batch_gives_what_its_pictures_give_alone(predictor: Predictor, tiny_run: Path) -> None:
    pictures = [Image.effect_noise(size, 60).convert("RGB") for size in ((64, 64), (100, 50), (40, 90))]

    alone, together = list(predictor(pictures)), list(predictor(pictures, batch_size=3))

    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)  # sums in another order


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ("a.jpg", r"`pictures` must be a list of pictures, got one str"),
        ([torch.zeros(3, 4, 4)], r"`pictures\[0\]` must be a path, .* got Tensor"),
        ([np.zeros((4, 4, 3))], r"`pictures\[0\]` must be .* uint8 .* got float64 \[4, 4, 3\]"),
        ([np.zeros((3, 4, 5), np.uint8)], r"got uint8 \[3, 4, 5\]"),
    ],
)
def test_what_is_no_picture_is_refused(predictor: Predictor, pictures: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        list(predictor(pictures))


def test_overrides_change_the_configuration_of_the_run(tiny_run: Path) -> None:
    changed = load_predictor(
        tiny_run / "run" / "checkpoint.pt", device="cpu", overrides=["--data.transforms.eval_size", "96"]
    )

    assert changed.transforms.eval_size == 96
    with pytest.raises(ConfigError, match=r"eval_siz.*did you mean --data\.transforms\.eval_size"):
        load_predictor(tiny_run / "run" / "checkpoint.pt", overrides=["--data.transforms.eval_siz", "96"])


def test_pictures_are_told_from_other_files_and_none_is_left_out_in_silence(stray: Path) -> None:
    found = find_images(stray)

    assert found.names == ("a.jpg", "b.webp", "cut.jpg", "no_ending", "phone.heic")
    assert set(found.skipped) == {"._a.jpg", "favicon.ico", "paper.pdf"}
    assert (found.others, found.folders) == ({".txt": 1}, 1)


@pytest.mark.parametrize("recursive", [False, True])
def test_a_link_to_no_file_is_skipped_and_said(tmp_path: Path, recursive: bool) -> None:
    (tmp_path / "a.jpg").symlink_to("gone.jpg")
    (tmp_path / "notes").symlink_to("gone.txt")
    Image.new("RGB", (20, 20)).save(tmp_path / "b.jpg")
    found = find_images(tmp_path, recursive=recursive)

    assert (found.names, set(found.skipped), found.others) == (("b.jpg",), {"a.jpg"}, {"no ending": 1})


def test_metadata_of_macos_for_what_is_no_picture_is_counted_with_its_ending(tmp_path: Path) -> None:
    (tmp_path / "._notes.txt").touch()
    Image.new("RGB", (20, 20)).save(tmp_path / "b.jpg")
    found = find_images(tmp_path)

    assert (found.skipped, found.others) == ({}, {".txt": 1})


def test_folders_in_the_folder_are_taken_when_asked_for(stray: Path) -> None:
    found = find_images(stray, recursive=True)

    assert "more/a.png" in found.names
    assert found.folders == 0


def test_a_folder_without_pictures_says_what_it_has(stray: Path) -> None:
    (stray / "outer" / "inner").mkdir(parents=True)
    (stray / "outer" / "readme.txt").touch()
    with pytest.raises(DataError, match=r"file=.*outer .*1 others \| fix: --recursive"):
        find_images(stray / "outer")
    with pytest.raises(DataError, match=r"file=.*missing"):
        find_images(stray / "missing")


def test_a_picture_of_several_frames_is_read_and_the_others_are_counted(tmp_path: Path) -> None:
    from detr_backbone.coco.images import examine_image

    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    picture, findings = examine_image(tmp_path / "a.gif")

    assert picture is not None
    assert picture.getpixel((5, 5)) == (255, 0, 0)
    assert ("picture_animated", "3 frames") in [(finding.kind, finding.got) for finding in findings]


def test_avif_is_read_as_any_other_picture(tmp_path: Path) -> None:
    pytest.importorskip("PIL._avif")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.avif")

    assert read_image(tmp_path / "a.avif").size == (20, 20)


def test_detections_as_records_and_as_coco_results() -> None:
    records, results = prediction_records(ONE, "a/b.jpg"), coco_results(ONE, 7)

    assert records[0] == {
        "file_name": "a/b.jpg",
        "category_id": 3,
        "category": "star",
        "bbox": [10, 20, 20, 40],
        "score": pytest.approx(0.9),
    }
    assert [(entry["image_id"], entry["category_id"], entry["bbox"]) for entry in results] == [
        (7, 3, [10, 20, 20, 40]),
        (7, 1, [0, 0, 5, 5]),
    ]
    json.dumps(records + results)


def test_detections_for_supervision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
    detections = to_supervision(ONE)

    assert detections.xyxy.dtype == detections.confidence.dtype == np.float32
    assert detections.xyxy.tolist() == ONE.boxes.tolist()
    assert (detections.class_id.tolist(), detections.data["class_name"].tolist()) == ([3, 1], ["star", "ellipse"])


def test_a_test_file_without_annotations_gives_ids_and_sizes(tiny_run: Path, tmp_path: Path) -> None:
    truth = json.loads((tiny_run / "shapes" / "annotations" / "instances_val.json").read_text(encoding="utf-8"))
    categories = {entry["id"]: entry["name"] for entry in truth["categories"]}
    (tmp_path / "test.json").write_text(json.dumps({"images": truth["images"]}), encoding="utf-8")
    images = read_image_list(tiny_run / "shapes" / "val", tmp_path / "test.json", categories)

    assert images.image_ids == {entry["file_name"]: entry["id"] for entry in truth["images"]}
    assert set(images.sizes.values()) == {(64, 64)}
    with pytest.raises(ConfigError, match="key=categories"):
        read_image_list(
            tiny_run / "shapes" / "val", tiny_run / "shapes" / "annotations" / "instances_val.json", {1: "cat"}
        )
    with pytest.raises(AnnotationError):
        read_image_list(tiny_run / "shapes" / "val", tiny_run / "tiny.yaml", categories)


def test_a_stray_folder_is_predicted_with_what_was_skipped_named(command: Run, tiny_run: Path, stray: Path) -> None:
    options = ("--checkpoint", "run/checkpoint.pt", "--images", str(stray), "--threshold", "0", "--recursive")
    ended = command(tiny_run, "predict", *options, "--output", str(stray.parent / "found"))

    assert ended.code == 1
    content = json.loads((stray.parent / "found" / "predictions.json").read_text(encoding="utf-8"))
    assert content["partial"] is True
    skipped = {entry["file_name"]: entry["reason"] for entry in content["skipped"]}
    assert set(skipped) == {"._a.jpg", "cut.jpg", "favicon.ico", "paper.pdf", "phone.heic"}
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "b.webp", "more/a.png", "no_ending"]
    drawn = {path.relative_to(stray.parent / "found").as_posix() for path in (stray.parent / "found").rglob("*.jpg")}
    assert drawn == {"a.jpg", "b.jpg", "more/a.jpg", "no_ending.jpg"}
    assert all(name in ended.out for name in skipped)
    assert ".txt 1" in ended.out


def test_pictures_are_drawn_beside_the_next_forward(
    command: Run, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def draw(picture: Image.Image, *_: object) -> Image.Image:
        threads.append(threading.current_thread())
        return picture

    monkeypatch.setattr("detr_backbone.visualize.draw_detections", draw)
    options = ("--checkpoint", "run/checkpoint.pt", "--images", "shapes/val", "--output", str(tmp_path))
    ended = command(tiny_run, "predict", *options)

    assert ended.code == 0, ended.err
    assert len(threads) == 3
    assert threading.main_thread() not in threads


def test_what_no_jpeg_holds_is_drawn_as_png_and_said(command: Run, tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (65501, 20)).save(tmp_path / "in" / "long.png")
    options = ("--checkpoint", "run/checkpoint.pt", "--images", str(tmp_path / "in"), "--threshold", "0")
    ended = command(tiny_run, "predict", *options, "--output", str(tmp_path / "found"))

    assert ended.code == 0, ended.err
    with Image.open(tmp_path / "found" / "long.png") as drawn:
        assert drawn.size == (65501, 20)
    assert "drawn as PNG, since a JPEG has at most 65500 pixels a side: 1 pictures" in ended.out


def test_a_list_none_of_whose_files_exists_names_the_change_that_finds_them(tiny_run: Path, tmp_path: Path) -> None:
    image = {"id": 1, "file_name": "VAL/000001.PNG", "height": 64, "width": 64}
    (tmp_path / "test.json").write_text(json.dumps({"images": [image]}), encoding="utf-8")

    with pytest.raises(DataError, match=r"1 of 1 missing.*1 would be found with"):
        read_image_list(tiny_run / "shapes" / "val", tmp_path / "test.json", {1: "cat"})


def test_strict_stops_at_a_file_that_cannot_be_read(command: Run, tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes(b"no picture")
    options = ("--checkpoint", "run/checkpoint.pt", "--images", str(tmp_path / "in"), "--strict")
    ended = command(tiny_run, "predict", *options, "--output", str(tmp_path / "found"))

    assert ended.code == 1
    assert "file=" in ended.err
    assert "b.png" in ended.err
    content = json.loads((tmp_path / "found" / "predictions.json").read_text(encoding="utf-8"))
    assert content["partial"] is True


def test_how_many_pictures_have_nothing_is_said(command: Run, tiny_run: Path, tmp_path: Path) -> None:
    options = ("--checkpoint", "run/checkpoint.pt", "--images", "shapes/val", "--threshold", "1", "--pictures", "none")
    ended = command(tiny_run, "predict", *options, "--output", str(tmp_path))

    assert ended.code == 0
    assert "3 of the pictures have none" in ended.out
    content = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    assert (content["partial"], content["predictions"], len(content["images"])) == (False, [], 3)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.json"]


def test_the_best_threshold_is_that_of_the_report_or_else_of_the_checkpoint(
    command: Run, tiny_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "report.json").write_text('{"operating_point": {"score": 0.125}}', encoding="utf-8")
    checkpoint = load_checkpoint(tiny_run / "run" / "checkpoint.pt")
    torch.save({**vars(checkpoint), "threshold": 0.375}, tmp_path / "evaluated.pt")
    torch.save({**vars(checkpoint), "threshold": None}, tmp_path / "not.pt")

    def best(checkpoint: str, *options: str) -> Ended:
        options = ("--checkpoint", checkpoint, "--images", "shapes/val", "--threshold", "best", *options)
        return command(tiny_run, "predict", *options, "--limit", "1", "--output", str(tmp_path / "found"))

    for expected, words in (
        (0.125, ("run/checkpoint.pt", "--report", str(tmp_path))),
        (0.375, (f"{tmp_path}/evaluated.pt",)),
    ):
        assert best(*words).code == 0
        content = json.loads((tmp_path / "found" / "predictions.json").read_text(encoding="utf-8"))
        assert content["threshold"] == expected
    without = best(f"{tmp_path}/not.pt")
    assert (without.code, "report.json" in without.err) == (2, True)


def test_predictions_can_be_evaluated(command: Run, tiny_run: Path, tmp_path: Path) -> None:
    truth = "shapes/annotations/instances_val.json"
    options = ("--checkpoint", "run/checkpoint.pt", "--images", "shapes/val", "--annotations", truth)
    predicted = command(tiny_run, "predict", *options, "--output", str(tmp_path), "--pictures", "none")
    results = json.loads((tmp_path / "detections.json").read_text(encoding="utf-8"))

    assert predicted.code == 0
    assert {entry["image_id"] for entry in results} == {1, 2, 3}
    assert min(entry["score"] for entry in results) < 0.5  # all of them, whatever the threshold
    words = ("--detections", str(tmp_path / "detections.json"), "--annotations", truth, "--intervals", "0")
    evaluated = command(tiny_run, "evaluate", *words)
    of_the_run = command(tiny_run, "evaluate", "--checkpoint", "run/checkpoint.pt", "--intervals", "0")
    assert (evaluated.code, of_the_run.code) == (0, 0)
    assert re.search(r"^AP +[\d.]+$.*", evaluated.out, re.DOTALL | re.MULTILINE)[0] in of_the_run.out


def test_another_normalisation_than_that_of_training_is_told(tiny_run: Path) -> None:
    other = ("--data.transforms.mean", "[0.5, 0.5, 0.5]")
    with pytest.warns(UserWarning, match=r"otherwise than in training .*key=data.transforms .*mean \[0.5, 0.5, 0.5\]"):
        load_predictor(tiny_run / "run" / "checkpoint.pt", overrides=other)
