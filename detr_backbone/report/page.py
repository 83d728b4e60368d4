"""The HTML page: the template `page.html` filled with the numbers of `summarise`."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template

from detr_backbone.evaluation.mistakes import MISTAKE_KINDS
from detr_backbone.report.charts import interval_bar, matrix, percent, reliability, signed_bars, spark_steps, step_lines
from detr_backbone.report.content import BACKGROUND, MEANINGS, Summary

OTHERS = "(others)"
_MOST_CURVES = 200  # classes with a small chart each
_MOST_CELLS = 20  # classes of a confusion matrix that can be read
_LINES = {"0.50": "IoU 0.50", "0.75": "IoU 0.75", "0.50:0.95": "mean"}


def render(
    summary: Summary, drawings: Sequence[tuple[str, Sequence[tuple[Summary, str]]]], *, training_curves: bytes = b""
) -> str:
    """Return the page as HTML.

    Args:
        summary: all numbers.
        drawings: headings, and under each the ranking's entries of some images, with their SVG.
        training_curves: of the run, a PNG file; left out, the page has no such section.
    """
    template = files("detr_backbone.report").joinpath("page.html").read_text(encoding="utf-8")
    point, config = summary["operating_point"], summary["config"]
    return Template(template).substitute(
        title=escape(summary["title"]),
        counts=_counts(summary),
        tiles="".join(_tile(name, summary["stats"][name]) for name in ("AP", "AP50", "AP75", "AR_100")),
        intervals=_intervals(summary),
        stats=_stats(summary),
        sizes=_sizes(summary),
        classes=_classes(summary),
        score=f"{point['score']:.3f}",
        **{name: percent(point[name]) for name in ("f1", "precision", "recall")},
        **_curves(summary),
        **_mistakes(summary),
        **_confusion(summary),
        **_calibration(summary),
        training=_training(training_curves),
        training_link='<a href="#training">Training</a>' if training_curves else "",
        images="".join(f"<h3>{heading}</h3>{_figures(shown)}" for heading, shown in drawings if shown) or "<p>-</p>",
        origin="".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in summary["origin"].items()),
        config=f"<h3>Configuration</h3><pre>{escape(config)}</pre>" if config else "",
    )


def _training(curves: bytes) -> str:
    if not curves:
        return ""
    picture = f'<img alt="losses and AP over epochs" src="data:image/png;base64,{b64encode(curves).decode()}">'
    words = (
        "<p>Losses of the training images and AP of the validation split, as the run wrote them after every epoch.</p>"
    )
    return f'\n<section id="training"><h2>Training</h2>\n{words}\n{picture}\n</section>\n'


def _counts(summary: Summary) -> str:
    crowds = f", {_count(summary['crowds'], 'crowd region')} to ignore" if summary["crowds"] else ""
    return (
        f"{_count(summary['detections'], 'detection')} on {_count(summary['images'], 'image')}, "
        f"{_count(summary['objects'], 'object')} of {_count(len(summary['classes']), 'class', 'classes')}{crowds}"
    )


def _tile(name: str, number: Summary) -> str:
    return f'<div class="tile"><span>{name}</span><b>{percent(number["value"])}</b><span>{_range(number)}</span></div>'


def _intervals(summary: Summary) -> str:
    if summary["level"] is None:
        return "Intervals were not asked for."
    return (
        f"An interval covers, in {100 * summary['level']:.0f} % of samples of images, the number over all images "
        f"like them; it comes from {summary['resamples']:,} draws of half of the images. "
        "It may lie below the value: on few images, AP is too high."
    )


def _stats(summary: Summary) -> str:
    heads = [_head("number"), _head("value"), *_RANGE, _head("meaning", _MEANING)]
    rows = (
        [
            _cell(name),
            _cell(percent(number["value"])),
            *_range_cells(number),
            _cell(MEANINGS[name], "left soft wide"),
        ]
        for name, number in summary["stats"].items()
    )
    return _table(heads, rows)


def _sizes(summary: Summary) -> str:
    heads = [_head("size"), _head("area in pixels", "left wide"), *map(_head, ("objects", "AP")), *_RANGE, _head("AR")]
    rows = (
        [_cell(size["name"]), _cell(_area(size), "left wide"), _cell(f"{size['objects']:,}"),
         _cell(percent(size["AP"]["value"])), *_range_cells(size["AP"]), _cell(percent(size["AR"]["value"]))]
        for size in summary["sizes"]
    )  # fmt: skip
    return _table(heads, rows)


def _classes(summary: Summary) -> str:
    heads = [_sorter("class", first="ascending"), _sorter("objects"), _sorter("AP"), *_RANGE]
    rows = (
        [
            f'<td class="name" data-value="{(name := escape(row["name"]))}" title="{name}">{name}</td>',
            f'<td data-value="{row["objects"]}">{row["objects"]:,}</td>',
            _value(row["AP"]["value"]),
            *_range_cells(row["AP"]),
            _value(row["AP50"]),
            _value(row["AP75"], "wide"),
            _value(row["AR"]),
        ]
        for row in summary["classes"]
    )
    heads += [_sorter("AP50"), _sorter("AP75", kind="wide"), _sorter("recall")]
    return _table(heads, rows, kind="sortable")


def _curves(summary: Summary) -> dict[str, str]:
    recall, lines, classes = summary["curves"]["recall"], summary["curves"]["precision"], summary["classes"]
    with_objects = [index for index, row in enumerate(classes) if row["objects"]]
    shown = sorted(with_objects, key=lambda index: -classes[index]["objects"])[:_MOST_CURVES]
    sparks = []
    for index in sorted(shown, key=lambda index: -classes[index]["AP"]["value"]):
        name = escape(classes[index]["name"])
        chart = spark_steps(recall, [lines[key]["classes"][index] for key in _LINES], title=classes[index]["name"])
        caption = f'<span class="name" title="{name}">{name}</span><b>{percent(classes[index]["AP"]["value"])}</b>'
        sparks.append(f"<figure>{chart}<figcaption>{caption}</figcaption></figure>")
    chart = step_lines(recall, [(_LINES[key], lines[key]["mean"]) for key in _LINES], title="precision over recall")
    left_out = (
        f" Of {len(with_objects)} classes, the {len(shown)} with the most objects."
        if len(with_objects) > len(shown)
        else ""
    )
    return {"curves": chart, "sparks": "".join(sparks), "curves_left_out": left_out}


def _mistakes(summary: Summary) -> dict[str, str]:
    costs, score = summary["mistakes"], f"score ≥ {summary['operating_point']['score']:.3f}"
    heads = [*map(_head, ("kind", "gain", "number", score)), _head("meaning", "left")]
    rows = [
        [_cell(kind), _cell(percent(row["cost"], sign=True)), _cell(_integer(row["count"])),
         _cell(_integer(row["count_at_operating_point"])), _cell(MISTAKE_KINDS[kind], "left soft")]
        for kind, row in costs["kinds"].items()
    ]  # fmt: skip
    rows += [
        [_cell(name), _cell(percent(costs[key], sign=True)), _cell(""), _cell(""), _cell(meaning, "left soft")]
        for name, key, meaning in (
            ("false positives", "false_positives", "all of them together"),
            ("false negatives", "false_negatives", "all of them together"),
        )
    ]
    bars = signed_bars([(kind, row["cost"]) for kind, row in costs["kinds"].items()], title="gain of AP50 by kind")
    return {"mistakes": _table(heads, rows, kind="words"), "mistake_bars": bars, "ap50": percent(costs["ap50"])}


def _confusion(summary: Summary) -> dict[str, str]:
    cells, names = summary["confusion"], [row["name"] for row in summary["classes"]]
    slips = [cell for cell in cells if len({cell["truth"], cell["predicted"], BACKGROUND}) == 3]
    named, merged = names, ""
    if len(names) > _MOST_CELLS:
        confused = dict.fromkeys(names, 0)
        for cell in slips:
            confused[cell["truth"]] += cell["count"]
            confused[cell["predicted"]] += cell["count"]
        top = set(sorted(names, key=lambda name: -confused[name])[:_MOST_CELLS])
        named = [name for name in names if name in top]
        merged = f" Of {len(names)} classes, the {len(named)} most confused ones; the others stand together."
    axis = [*named, *([OTHERS] if merged else []), BACKGROUND]
    position = dict.fromkeys(names, len(named)) | {name: i for i, name in enumerate(axis)}
    counts = [[0] * len(axis) for _ in axis]
    for cell in cells:
        counts[position[cell["truth"]]][position[cell["predicted"]]] += cell["count"]
    heads = [_head("object"), _head("detected as", "left"), _head("times")]
    rows = [
        [
            _cell(escape(cell["truth"]), "name"),
            _cell(escape(cell["predicted"]), "left name"),
            _cell(_integer(cell["count"])),
        ]
        for cell in slips[:10]
    ]
    return {
        "confusion": matrix(axis, counts, mixed=OTHERS, title="confusion matrix"),
        "merged": merged,
        "slips": f"<h3>Most often confused</h3>{_table(heads, rows)}" if rows else "",
    }


def _calibration(summary: Summary) -> dict[str, str]:
    bins = summary["calibration"]
    if bins is None:
        return {"calibration": "<p>-</p>", "calibration_error": "-"}
    chart = reliability(bins["edges"], bins["scores"], bins["precision"], bins["counts"], title="calibration")
    return {"calibration": chart, "calibration_error": percent(bins["error"])}


def _figures(shown: Sequence[tuple[Summary, str]]) -> str:
    return "".join(
        f'<figure class="photo">{drawing}<figcaption>{escape(entry["file_name"])}: F1 {percent(entry["f1"])}; '
        f"{(hits := entry['true_positives'])} of {_count(hits + entry['false_negatives'], 'object')} detected, "
        f"{_count(entry['false_positives'], 'false positive')}</figcaption></figure>"
        for entry, drawing in shown
    )


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    table = f'<table class="{kind}"><thead><tr>{"".join(heads)}</tr></thead><tbody>{body}</tbody></table>'
    return table if kind == "sortable" else f'<div class="scroll">{table}</div>'


def _head(name: str, kind: str = "") -> str:
    return f'<th class="{kind}">{name}</th>'


def _sorter(name: str, *, first: str = "descending", kind: str = "") -> str:
    """Return the heading of a column that can be sorted: numbers from the highest, names from the first."""
    return f'<th class="{kind}" data-first="{first}"><button>{name}</button></th>'


def _cell(content: str, kind: str = "") -> str:
    return f'<td class="{kind}">{content}</td>'


def _value(value: float | None, kind: str = "") -> str:
    return f'<td class="{kind}" data-value="{"" if value is None else value}">{percent(value)}</td>'


_MEANING = "left soft wide"
_RANGE = (_head("interval"), _head("", "wide"))


def _range_cells(number: Summary) -> tuple[str, str]:
    """Return the interval as text and as a drawing."""
    drawn = interval_bar(number["value"], number["low"], number["high"])
    return _cell(_range(number), "soft"), _cell(drawn, "wide")


def _range(number: Summary) -> str:
    return "-" if number["low"] is None else f"{percent(number['low'])} to {percent(number['high'])}"


def _area(size: Summary) -> str:
    least, most = (f"{round(size[key] ** 0.5)}²" for key in ("least_area", "most_area"))
    if not size["least_area"]:
        return f"up to {most}"
    return f"from {least}" if size["name"] == "large" else f"{least} to {most}"


def _integer(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
