"""The page: what `summarise` found, in the order in which a reader asks for it."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from detr_backbone.coco.error_kinds import KINDS
from detr_backbone.report.charts import (
    interval_bar,
    matrix,
    percent,
    reliability,
    signed_bars,
    spark_steps,
    step_lines,
)
from detr_backbone.report.content import BACKGROUND, STAT_MEANINGS, Summary

_MOST_CURVES = 200  # classes with a small picture each
_MOST_CELLS = 24  # classes of a confusion matrix that can be read
_HEADS = (
    ("class", "text", "class"),
    ("objects", "", "objects to find"),
    ("AP", "", "mean over the IoU thresholds 0.50 to 0.95"),
    ("AP50", "", "at IoU 0.50"),
    ("AP75", "", "at IoU 0.75"),
    (
        "recall",
        "",
        "share of the objects found by the 100 best detections of the class in each image, mean over the IoU thresholds",
    ),
)


def render(summary: Summary, pictures: Sequence[tuple[str, Sequence[tuple[Summary, str]]]]) -> str:
    """The page as HTML.

    Args:
        summary: all numbers.
        pictures: headings, and under each the ranking's entries of some images, with their SVG.
    """
    template = files("detr_backbone.report").joinpath("page.html").read_text(encoding="utf-8")
    sections = {
        "Numbers": _numbers(summary),
        "Classes": _classes(summary),
        "Precision and recall": _curves(summary),
        "Mistakes": _mistakes(summary),
        "Confusion": _confusion(summary),
        "Calibration": _calibration(summary),
        "Images": _images(summary, pictures),
        "Origin": _origin(summary),
    }
    links = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in sections)
    parts = (f'<section id="{_anchor(name)}"><h2>{name}</h2>\n{body}</section>' for name, body in sections.items())
    body = "\n".join([_head(summary), f"<nav>{links}</nav>", "<main>", *parts, "</main>"])
    return Template(template).substitute(title=escape(summary["title"]), body=body)


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _head(summary: Summary) -> str:
    counts = f"{_count(summary['images'], 'image')}, {_count(summary['objects'], 'object')} of {_count(len(summary['classes']), 'class', 'classes')}"
    crowds = f", {_count(summary['crowds'], 'crowd region')} to ignore" if summary["crowds"] else ""
    return (
        f"<header><h1>{escape(summary['title'])}</h1>"
        f'<p class="soft">{_count(summary["detections"], "detection")} on {counts}{crowds}.</p>'
        f'<div class="tiles">{"".join(_tile(name, summary["stats"][name]) for name in ("AP", "AP50", "AP75", "AR_100"))}</div>'
        "</header>"
    )


def _tile(name: str, interval: Summary) -> str:
    return (
        f'<div class="tile"><span>{name}</span><b>{percent(interval["value"])}</b><span>{_range(interval)}</span></div>'
    )


def _numbers(summary: Summary) -> str:
    rows = [
        [f"<td>{name}</td>", f"<td>{percent(value['value'])}</td>", f'<td class="soft">{_range(value)}</td>',
         f'<td class="wide">{interval_bar(value["value"], value["low"], value["high"])}</td>',
         f'<td class="left soft wide">{STAT_MEANINGS[name]}</td>']
        for name, value in summary["stats"].items()
    ]  # fmt: skip
    sizes = [
        [f"<td>{size['name']}</td>", f'<td class="left">{_area(size)}</td>', f"<td>{size['objects']:,}</td>",
         f"<td>{percent(size['AP']['value'])}</td>", f'<td class="soft">{_range(size["AP"])}</td>',
         f'<td class="wide">{interval_bar(size["AP"]["value"], size["AP"]["low"], size["AP"]["high"])}</td>',
         f"<td>{percent(size['AR']['value'])}</td>"]
        for size in summary["sizes"]
    ]  # fmt: skip
    return (
        f"<p>COCO's twelve, in percent, with the range that holds {100 * summary['level']:.0f} % of {summary['resamples']:,} "
        "draws of as many images: how far a number would move with another sample of images. “-” stands where there is "
        "no object to find.</p>"
        + _table(["number", "value", "interval", '<th class="wide"></th>', '<th class="left wide">meaning</th>'], rows)
        + "<h3>By size of the object</h3>"
        + _table(
            [
                "size",
                '<th class="left">area in pixels</th>',
                "objects",
                "AP",
                "interval",
                '<th class="wide"></th>',
                "AR",
            ],
            sizes,
        )
    )


def _classes(summary: Summary) -> str:
    heads = "".join(
        f'<th title="{tip}" data-kind="{kind}" data-first="{"ascending" if kind else "descending"}">'
        f"<button>{name}</button></th>" + ('<th>interval</th><th class="wide"></th>' if name == "AP" else "")
        for name, kind, tip in _HEADS
    )
    rows = "".join(
        "<tr>"
        + f'<td class="name" data-value="{escape(row["name"])}" title="{escape(row["name"])}">{escape(row["name"])}</td>'
        + f'<td data-value="{row["objects"]}">{row["objects"]:,}</td>'
        + _value(row["AP"]["value"])
        + f'<td class="soft">{_range(row["AP"])}</td>'
        + f'<td class="wide">{interval_bar(row["AP"]["value"], row["AP"]["low"], row["AP"]["high"])}</td>'
        + "".join(_value(row[key]) for key in ("AP50", "AP75", "AR"))
        + "</tr>"
        for row in summary["classes"]
    )
    return (
        "<p>In percent. A click on a heading sorts by it. Few objects make a wide interval, and where one lies in only a "
        "few images, a number that the next image may overturn.</p>"
        f'<div class="scroll tall"><table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _curves(summary: Summary) -> str:
    recall, lines = summary["curves"]["recall"], summary["curves"]["precision"]
    names = {"0.50": "IoU 0.50", "0.75": "IoU 0.75", "0.50:0.95": "mean"}
    chart = step_lines(
        recall,
        [(names[key], curve["mean"]) for key, curve in lines.items()],
        title="precision over recall",
        x="recall",
        y="precision",
    )
    point = summary["operating_point"]
    there = [place for place, row in enumerate(summary["classes"]) if row["objects"]]
    there = sorted(there, key=lambda place: -summary["classes"][place]["AP"]["value"])
    shown = sorted(there, key=lambda place: -summary["classes"][place]["objects"])[:_MOST_CURVES]
    sparks = "".join(
        "<figure>"
        + spark_steps(
            recall, [lines[key]["classes"][place] for key in names], title=f"{row['name']}: precision over recall"
        )
        + f'<figcaption><span class="name" title="{escape(row["name"])}">{escape(row["name"])}</span>'
        f"<b>{percent(row['AP']['value'])}</b></figcaption></figure>"
        for place, row in ((place, summary["classes"][place]) for place in there if place in set(shown))
    )
    left_out = f" Of {len(there)} classes, the {_MOST_CURVES} with the most objects." if len(there) > len(shown) else ""
    return (
        f'<div class="beside">{chart}<div><p>The highest precision with which each recall is reached, averaged over the '
        "classes. The area under a line is the AP at that IoU; “mean” averages the ten thresholds 0.50 to 0.95. A line "
        "that lies far below that of IoU 0.50 tells of boxes that are about right, but not tight; one that ends early "
        "tells of objects that no detection finds.</p>"
        f"<p>F1, over all classes together at IoU 0.50, is highest where detections with a score of at least "
        f"<b>{point['score']:.3f}</b> count: F1 {percent(point['f1'])}, precision {percent(point['precision'])}, recall "
        f"{percent(point['recall'])}. This score was chosen on these images. It is used where this page needs one: in "
        "the confusion matrix, and in the pictures.</p></div></div>"
        f"<details open><summary>Each class, by falling AP</summary><p class='note'>Recall runs to the right and precision "
        f"up, both from 0 to 1; the number is the AP.{left_out}</p>"
        f'<div class="sparks">{sparks}</div></details>'
    )


def _mistakes(summary: Summary) -> str:
    found = summary["mistakes"]
    bars = signed_bars([(kind, found["kinds"][kind]["cost"]) for kind in KINDS], title="AP50 lost by kind of mistake")
    rows = [
        [f"<td>{kind}</td>", f"<td>{percent(row['cost'], sign=True)}</td>", f"<td>{row['count']:,}</td>",
         f"<td>{'-' if row['count_at_operating_point'] is None else format(row['count_at_operating_point'], ',')}</td>",
         f'<td class="left soft">{KINDS[kind]}</td>']
        for kind, row in found["kinds"].items()
    ]  # fmt: skip
    totals = [
        ["<td>false positives</td>", f"<td>{percent(found['false_positives'], sign=True)}</td>", "<td></td>", "<td></td>",
         '<td class="left soft">all wrong detections together</td>'],
        ["<td>false negatives</td>", f"<td>{percent(found['false_negatives'], sign=True)}</td>", "<td></td>", "<td></td>",
         '<td class="left soft">all objects that are not found together</td>'],
    ]  # fmt: skip
    return (
        f'<div class="beside">{bars}<div><p>What AP50 would gain, from {percent(found["ap50"])}, if an oracle mended one '
        "kind of mistake and left the rest. The longest bar is where work pays. Gains do not add up: mending two kinds "
        "may gain more or less than each alone.</p>"
        '<p class="note">A detection that finds no object at IoU 0.5 has the first kind below that fits. Mended, the best '
        "localisation or class mistake on each object that is not found becomes right, and all others vanish; missed "
        "objects need not be found any more, and a class of which none is left keeps an AP of 0. After TIDE, "
        "arXiv 2008.08115.</p></div></div>"
        + _table(
            [
                "kind",
                "gain",
                "number",
                f"score ≥ {summary['operating_point']['score']:.3f}",
                '<th class="left">meaning</th>',
            ],
            [*rows, *totals],
            kind="words",
        )
    )


def _confusion(summary: Summary) -> str:
    cells = summary["confusion"]
    names = [row["name"] for row in summary["classes"]]
    slips = [
        cell for cell in cells if BACKGROUND not in (cell["truth"], cell["found"]) and cell["truth"] != cell["found"]
    ]
    named, merged = names, ""
    if len(names) > _MOST_CELLS:
        involved = dict.fromkeys(names, 0)
        for cell in cells:
            weight = 1000 * (cell in slips) + 1  # confused first, then frequent
            for name in {cell["truth"], cell["found"]} - {BACKGROUND}:
                involved[name] += weight * cell["count"]
        top = set(sorted(names, key=lambda name: -involved[name])[: _MOST_CELLS - 4])
        named = [name for name in names if name in top]
        merged = f" Of {len(names)} classes, the {len(named)} most confused ones; the rest is “(others)”."
    axis = [*named, *(["(others)"] if merged else []), BACKGROUND]
    place = {name: axis.index(name) if name in axis else axis.index("(others)") for name in [*names, BACKGROUND]}
    counts = [[0] * len(axis) for _ in axis]
    for cell in cells:
        counts[place[cell["truth"]]][place[cell["found"]]] += cell["count"]
    rows = [
        [f'<td class="name">{escape(cell["truth"])}</td>', f'<td class="left name">{escape(cell["found"])}</td>',
         f"<td>{cell['count']:,}</td>"]
        for cell in slips[:10]
    ]  # fmt: skip
    listed = "<h3>Most often confused</h3>" + _table(["object", '<th class="left">found as</th>', "times"], rows)
    return (
        f"<p>Objects in rows, what they were found as in columns, for detections with a score of at least "
        f"{summary['operating_point']['score']:.3f}. The last column counts objects that are missed, the last row "
        "detections where nothing is. Blue is right, orange is wrong, and a cell is as strong as its share of the "
        f"row.{merged}</p>"
        f'<div class="scroll">{matrix(axis, counts, title="confusion matrix")}</div>'
        '<p class="note">First COCO’s pairs at IoU 0.5. Of what is left, each detection, best first, takes the free object '
        "of any class that it overlaps most, if by an IoU of 0.5.</p>" + (listed if rows else "")
    )


def _calibration(summary: Summary) -> str:
    found = summary["calibration"]
    if found is None:
        return "<p>-</p><p>There are no detections, or scores outside of 0 to 1, which cannot be read as probabilities.</p>"
    chart = reliability(
        found["edges"],
        found["scores"],
        found["precision"],
        found["counts"],
        title="share of right detections over score",
    )
    return (
        f'<div class="beside reliability">{chart}<div><p>Whether a score can be read as a probability. Each bar gives the '
        "share of right detections, at IoU 0.5, among those with scores in its range; its dot stands at their mean score. "
        "Dots on the dashed line are calibrated, below it the detector is too sure, above it too modest.</p>"
        f"<p>Expected calibration error: <b>{percent(found['error'])}</b> percent. It is the distance of the dots from "
        "the line, up or down, averaged over all detections. Where most detections have low scores, it tells mostly of "
        "those.</p>"
        '<p class="note">Ten equal bins; arXiv 1706.04599, with precision in place of accuracy.</p></div></div>'
    )


def _images(summary: Summary, pictures: Sequence[tuple[str, Sequence[tuple[Summary, str]]]]) -> str:
    score = summary["operating_point"]["score"]
    intro = (
        f"<p>Objects on the left, detections with a score of at least {score:.3f} on the right. Solid green is right: an "
        "object that is found, a detection that finds one. Dashed orange is wrong, and grey is a crowd, which does not "
        "count. Where there are many boxes, only those that are not right have words; the pointer on a box shows them "
        "all.</p>"
        '<p class="note">Ranked by F1 at IoU 0.5, 2 right / (2 right + wrong + missed); of equal ones the image with more '
        "mistakes is worse, and then the one with fewer objects found. The whole ranking is in report.json.</p>"
    )
    if not any(shown for _, shown in pictures):
        return intro + "<p>-</p>"
    return intro + "".join(
        f"<h3>{heading}</h3>" + "".join(_photo(entry, picture) for entry, picture in shown)
        for heading, shown in pictures
        if shown
    )


def _photo(entry: Summary, picture: str) -> str:
    objects = entry["right"] + entry["missed"]
    return (
        f'<figure class="photo">{picture}<figcaption>{escape(entry["file_name"])}: F1 {percent(entry["f1"])}; '
        f"{entry['right']} of {_count(objects, 'object')} found, {_count(entry['wrong'], 'wrong detection')}"
        "</figcaption></figure>"
    )


def _origin(summary: Summary) -> str:
    facts = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in summary["origin"].items())
    config = f"<h3>Configuration</h3><pre>{escape(summary['config'])}</pre>" if summary["config"] else ""
    return f"<dl>{facts}</dl>{config}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    head = "".join(text if text.startswith("<th") else f"<th>{text}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _value(value: float | None) -> str:
    return f'<td data-value="{"" if value is None else value}">{percent(value)}</td>'


def _range(interval: Any) -> str:
    return "-" if interval["low"] is None else f"{percent(interval['low'])} – {percent(interval['high'])}"


def _area(size: Summary) -> str:
    least, most = (f"{round(size[key] ** 0.5)}²" for key in ("least_area", "most_area"))
    if not size["least_area"]:
        return f"up to {most}"
    return f"from {least}" if size["name"] == "large" else f"{least} to {most}"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
