"""A report's files: the page, and the same as Markdown, JSON and CSV."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from detr_backbone.coco.images import read_image
from detr_backbone.evaluation.intervals import Intervals
from detr_backbone.evaluation.matching import Matches
from detr_backbone.evaluation.mistakes import MISTAKE_KINDS, mistakes
from detr_backbone.report.charts import percent
from detr_backbone.report.content import Summary, summarise
from detr_backbone.report.images import marks_of, side_by_side
from detr_backbone.report.page import render

WORST, BEST = 8, 4
"""Images that are shown."""


def write_report(
    folder: Path | str,
    matches: Matches,
    *,
    title: str,
    origin: Mapping[str, str],
    images: Path | str | None = None,
    config: str = "",
    intervals: Intervals | None = None,
    training_curves: Path | str | None = None,
) -> Path:
    """Write report.html, report.md, report.json and report.csv, and return the page's path.

    Args:
        folder: the folder to write, made if missing.
        matches: with COCO's settings.
        title: of the report.
        origin: where the numbers come from, by name; see `detr_backbone.report.origin`.
        images: the folder of the image files; without it the page shows none.
        config: of the detector, as text.
        intervals: of the numbers.
        training_curves: the picture of the run's losses and AP, a PNG file, which the page then holds.
    """
    all_mistakes = mistakes(matches)
    summary = summarise(matches, all_mistakes, title=title, origin=origin, config=config, intervals=intervals)
    annotations = matches.annotations
    ranking = summary["ranking"]
    chosen = {"The worst": ranking[:WORST], "The best": ranking[WORST:][-BEST:][::-1]}
    files = dict(zip(annotations.image_ids.tolist(), annotations.file_names.tolist(), strict=True))
    indices = {image_id: index for index, image_id in enumerate(matches.image_ids.tolist())}
    drawings = []
    for heading, entries in chosen.items():
        shown = []
        for entry in entries if images is not None else ():
            image_id = entry["image_id"]
            marks = marks_of(matches, all_mistakes, index=indices[image_id], score=summary["operating_point"]["score"])
            image = read_image(Path(images or "") / files[image_id], image_id=image_id)
            shown.append((entry, side_by_side(image, *marks, name=f"image-{image_id}")))
        drawings.append((heading, shown))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    curves = b"" if training_curves is None else Path(training_curves).read_bytes()
    page.write_text(render(summary, drawings, training_curves=curves), encoding="utf-8")
    (folder / "report.md").write_text(markdown(summary), encoding="utf-8")
    (folder / "report.csv").write_text(class_table(summary), encoding="utf-8", newline="")
    (folder / "report.json").write_text(json.dumps(summary, ensure_ascii=False), encoding="utf-8")
    return page


def class_table(summary: Summary) -> str:
    """Return the classes as CSV, numbers in percent with four decimals; empty for a number that does not exist."""
    text = io.StringIO()
    writer = csv.writer(text)
    numbers = ("AP", "AP_low", "AP_high", "AP50", "AP75", "AR")
    writer.writerow(["category_id", "name", "objects", *(f"{number} (%)" for number in numbers)])
    for row in summary["classes"]:
        values = [*row["AP"].values(), row["AP50"], row["AP75"], row["AR"]]
        percents = [None if value is None else round(100 * value, 4) for value in values]
        writer.writerow([row["category_id"], row["name"], row["objects"], *percents])
    return text.getvalue()


def markdown(summary: Summary) -> str:
    """Return the numbers as tables in Markdown, in percent."""
    point, costs = summary["operating_point"], summary["mistakes"]
    error = "-" if summary["calibration"] is None else percent(summary["calibration"]["error"])
    sections = [
        f"# {_escape_markdown(summary['title'])}",
        f"{summary['images']} images, {summary['objects']} objects, {summary['detections']} detections. Numbers are in "
        "percent; low and high are those of the interval.",
        _table(
            ("number", "value", "low", "high"), ((name, *_percent_cells(row)) for name, row in summary["stats"].items())
        ),
        "## Classes",
        _table(
            ("class", "objects", "AP", "low", "high", "AP50", "AP75", "recall"),
            (
                (
                    row["name"],
                    row["objects"],
                    *_percent_cells(row["AP"]),
                    *(percent(row[key]) for key in ("AP50", "AP75", "AR")),
                )
                for row in summary["classes"]
            ),
        ),
        "## Mistakes",
        f"What AP50, {percent(costs['ap50'])}, would gain without one kind of mistake.",
        _table(
            ("kind", "gain", "number", "meaning"),
            (
                (kind, percent(row["cost"], sign=True), row["count"], MISTAKE_KINDS[kind])
                for kind, row in costs["kinds"].items()
            ),
        ),
        "## Sizes",
        _table(
            ("size", "objects", "AP", "low", "high", "AR"),
            (
                (size["name"], size["objects"], *_percent_cells(size["AP"]), percent(size["AR"]["value"]))
                for size in summary["sizes"]
            ),
        ),
        "## Score",
        f"Best F1 {percent(point['f1'])} from a score of {point['score']:.3f}: precision {percent(point['precision'])}"
        f", recall {percent(point['recall'])}. Expected calibration error {error}.",
        "## Worst images",
        _table(
            ("image", "F1", "true positives", "false negatives", "false positives"),
            (
                (
                    row["file_name"],
                    percent(row["f1"]),
                    *(row[f"{kind}s"] for kind in ("true_positive", "false_negative", "false_positive")),
                )
                for row in summary["ranking"][:WORST]
            ),
        ),
        "## Origin",
        _table(("", ""), summary["origin"].items()),
    ]
    return "\n\n".join(sections) + "\n"


def _percent_cells(interval: Summary) -> tuple[str, str, str]:
    return percent(interval["value"]), percent(interval["low"]), percent(interval["high"])


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(_escape_markdown(str(cell)) for cell in line)} |" for line in lines)


def _escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is."""
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
