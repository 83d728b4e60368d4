"""A report: a page that needs no network and shows the numbers of its JSON, whatever names and numbers there are."""

import base64
import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detr_backbone.evaluation.evaluator import CocoEvaluator
from detr_backbone.evaluation.intervals import resample_intervals
from detr_backbone.report import origin, write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}
NAMES = {3: "<script>alert(1)</script>", 4: 'dog & "cat"', 9: "naïve | *owl* `x`", 12: "never there"}
FILES = {7: "one.png", 8: "a <b> & 'c' ünï.png", 21: "empty.png"}
BOX = [10, 10, 20, 20]


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; fails where tags are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "td":
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


def make(folder: Path, *, found: dict[int, Any] | None = None, objects: bool = True, intervals: bool = True) -> Path:
    """The folder of a report on three pictures with three objects of three classes."""
    labels = (3, 4, 9) if objects else ()
    content = {
        "images": [{"id": i, "file_name": name, "width": 60, "height": 40} for i, name in FILES.items()],
        "categories": [{"id": i, "name": name} for i, name in NAMES.items()],
        "annotations": [
            {"id": i, "image_id": 7 if i < 2 else 8, "category_id": label, "bbox": [BOX[0] + 15 * i, *BOX[1:]]}
            for i, label in enumerate(labels)
        ],
    }
    (folder / "truth.json").write_text(json.dumps(content))
    (folder / "pictures").mkdir()
    for name in FILES.values():
        Image.new("RGB", (60, 40), (90, 120, 150)).save(folder / "pictures" / name)
    evaluator = CocoEvaluator(folder / "truth.json")
    if found is None:
        found = {7: ([3, 3, 9], [0.9, 0.8, 0.7], [[10, 10, 30, 30], [10, 10, 30, 29], [25, 10, 45, 30]])}
    nothing: tuple[list[int], list[float], list[list[float]]] = ([], [], [])
    evaluator.update(
        {
            i: {
                "labels": torch.tensor(ids, dtype=torch.int64),
                "scores": torch.tensor(scores),
                "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            }
            for i, (ids, scores, boxes) in ((i, found.get(i, nothing)) for i in FILES)
        }
    )
    matches = evaluator.matches()
    write_report(
        folder / "report",
        matches,
        title="<i>title</i> & more",
        origin=origin(evaluator.annotations, evaluator.image_ids),
        images=folder / "pictures",
        config="lr: '<1>'",
        intervals=resample_intervals(matches, resamples=20) if intervals else None,
        training_curves=folder / "pictures" / FILES[7] if objects else None,
    )
    return folder / "report"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("report"))


def text_of(report: Path, ending: str) -> str:
    return (report / f"report.{ending}").read_text(encoding="utf-8")


def numbers_of(report: Path) -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads(text_of(report, "json"), parse_constant=pytest.fail)
    return numbers


def test_the_page_asks_for_nothing(report: Path) -> None:
    page = Page(text_of(report, "html"))
    links = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "xlink:href", "data")]

    assert links
    assert [link for link in links if not link.startswith(("data:", "#"))] == []
    assert not re.search(r"url\(|@import|fetch\(|https?://", text_of(report, "html"))


def test_no_name_becomes_markup(report: Path) -> None:
    page = Page(text_of(report, "html"))

    assert page.tags.count("script") == 1
    assert not {"b>", "i"} & set(page.tags)
    assert NAMES[3] in page.cells
    assert "&lt;b&gt; &amp; &#x27;c&#x27; ünï.png" in text_of(report, "html")


def test_identifiers_are_unique_and_links_within_the_page_lead_somewhere(report: Path) -> None:
    page = Page(text_of(report, "html"))
    ids = [value for _, name, value in page.attributes if name == "id"]

    assert len(ids) == len(set(ids))
    assert {v[1:] for _, name, v in page.attributes if name == "href" and v.startswith("#")} <= set(ids)


def test_the_page_shows_the_numbers_of_the_json(report: Path) -> None:
    cells, numbers = Page(text_of(report, "html")).cells, numbers_of(report)

    for name, number in numbers["stats"].items():
        shown = "-" if number["value"] is None else f"{100 * number['value']:.1f}"
        assert cells[cells.index(name) + 1] == shown
    for row in numbers["classes"]:
        place = cells.index(row["name"])
        assert cells[place + 1] == str(row["objects"])
        assert cells[place + 2] == ("-" if row["AP"]["value"] is None else f"{100 * row['AP']['value']:.1f}")


def test_the_numbers_are_those_of_the_evaluation(report: Path, tmp_path: Path) -> None:
    numbers = numbers_of(report)

    # of three objects one is found first at every IoU up to 0.95; of the other two classes nothing is right
    assert numbers["stats"]["AP"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    aps = [row["AP"]["value"] for row in numbers["classes"]]
    assert aps[:3] == pytest.approx([1, 0, 0])
    assert aps[3] is None
    assert (numbers["images"], numbers["objects"], numbers["detections"]) == (3, 3, 3)
    kinds = {kind: row["count"] for kind, row in numbers["mistakes"]["kinds"].items()}
    assert kinds == {"localisation": 0, "class": 1, "duplicate": 1, "background": 0, "both": 0, "missed": 1}
    assert {(cell["truth"], cell["predicted"], cell["count"]) for cell in numbers["confusion"]} >= {
        (NAMES[3], NAMES[3], 1)
    }
    assert [row["image_id"] for row in numbers["ranking"]] == [8, 7]  # nothing to say of the third


def test_files_for_programs_say_their_unit(report: Path) -> None:
    assert numbers_of(report)["unit"].startswith("fractions of 1")


def test_the_csv_holds_the_classes(report: Path) -> None:
    rows = list(csv.DictReader(text_of(report, "csv").splitlines()))

    assert [row["name"] for row in rows] == list(NAMES.values())
    assert [row["AP (%)"] for row in rows] == ["100.0", "0.0", "0.0", ""]


def test_markdown_has_a_row_for_each_class_and_no_stray_columns(report: Path) -> None:
    lines = text_of(report, "md").splitlines()
    start = lines.index("## Classes") + 2
    table = lines[start : lines.index("", start)]

    assert len(table) == 2 + len(NAMES)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {9}
    assert r"\<script\>" in table[2]


@pytest.mark.parametrize(
    ("found", "objects"),
    [
        ({}, True),
        ({7: ([3], [0.9], [[10, 10, 30, 30]])}, False),
        ({}, False),
        ({7: ([4], [-3.5], [[25, 10, 45, 30]])}, True),
    ],
    ids=["no detections", "no objects", "neither", "scores that are no probabilities"],
)
def test_what_does_not_exist_is_a_dash(tmp_path: Path, found: dict[int, Any], *, objects: bool) -> None:
    report = make(tmp_path, found=found, objects=objects)
    page, numbers = Page(text_of(report, "html")), numbers_of(report)

    assert "nan" not in text_of(report, "html").lower().replace("nance", "")
    assert page.cells[page.cells.index("AP") + 1] == (
        "-" if not objects else f"{100 * numbers['stats']['AP']['value']:.1f}"
    )
    assert (numbers["calibration"] is None) == (found == {} or found[7][1][0] < 0)
    if not objects:
        assert {number["value"] for number in numbers["stats"].values()} == {None}


def test_intervals_can_be_left_out(tmp_path: Path) -> None:
    report = make(tmp_path, intervals=False)
    cells = Page(text_of(report, "html")).cells

    assert cells[cells.index("AP") + 2] == "-"
    assert "not asked for" in text_of(report, "html")


def test_the_curves_of_the_run_are_in_the_page(report: Path, tmp_path: Path) -> None:
    page = text_of(report, "html")
    (source,) = re.findall(r'<img [^>]*src="data:image/png;base64,([^"]+)"', page)

    assert '<a href="#training">' in page
    assert base64.b64decode(source) == (report.parent / "pictures" / FILES[7]).read_bytes()
    assert "#training" not in text_of(make(tmp_path, objects=False), "html")


def test_the_origin_names_command_versions_and_data(report: Path) -> None:
    import hashlib

    facts = numbers_of(report)["origin"]
    truth = (report.parent / "truth.json").read_bytes()

    assert f"torch {torch.__version__.partition('+')[0]}" in facts["Versions"]
    assert f"numpy {np.__version__}" in facts["Versions"]
    assert facts["SHA-256 of the annotations"] == hashlib.sha256(truth).hexdigest()
    assert facts["SHA-256 of the image ids"] == hashlib.sha256(b"7\n8\n21\n").hexdigest()
    assert facts["Command"].startswith("python ")


def test_without_git_the_commit_is_a_dash(monkeypatch: pytest.MonkeyPatch, report: Path) -> None:
    from detr_backbone.coco.annotations import load_annotations

    monkeypatch.setenv("PATH", "")

    assert origin(load_annotations(report.parent / "truth.json"), [7])["Commit"] == "-"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_checkout_around_an_installed_package_is_not_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, report: Path
) -> None:
    from detr_backbone.coco.annotations import load_annotations
    from detr_backbone.report import origin as module_function

    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    monkeypatch.setitem(module_function.__globals__, "_PACKAGE", tmp_path)

    assert origin(load_annotations(report.parent / "truth.json"), [7])["Commit"] == "-"


def test_every_drawn_box_lies_within_its_picture(report: Path) -> None:
    page = text_of(report, "html")
    views = re.findall(r'<svg class="view".*?viewBox="0 0 (\d+) (\d+)".*?</svg>', page, re.DOTALL)
    boxes = re.findall(r'class="box" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', page)

    assert views == [("420", "280")] * 4  # two pictures of 60 x 40, twice each
    assert len(boxes) == 4  # three objects, and the one detection from the score with the best F1
    assert all(float(x) + float(w) <= 420 and float(y) + float(h) <= 280 for x, y, w, h in boxes)
