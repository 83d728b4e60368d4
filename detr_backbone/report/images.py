"""Images with objects beside detections, as SVG over one JPEG, so that boxes and labels stay sharp."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from detr_backbone.evaluation.analysis import IOU_50, true_and_false_positives
from detr_backbone.evaluation.matching import Matches
from detr_backbone.evaluation.mistakes import MISTAKE_KINDS, Mistakes

SIDE = 420
"""Pixels of the longer side of an image on the page."""
_CROWDED = 8  # boxes from which only mistakes have a label
_FONT, _LINE = 11.0, 14.0  # pixels of the label's font and background


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A box on an image: xywh in pixels, its label, and how it is drawn: `true`, `false` or `crowd`."""

    box: Sequence[float]
    label: str
    kind: str


def marks_of(matches: Matches, mistakes: Mistakes, *, index: int, score: float) -> tuple[list[Mark], list[Mark]]:
    """Return the objects of one image, and its detections of at least this score.

    Args:
        matches: with COCO's settings.
        mistakes: of the detections.
        index: of the image in `matches.image_ids`.
        score: the least score.
    """
    annotations, names = matches.annotations, matches.category_names
    true, false = true_and_false_positives(matches, score=score)
    detected = set(matches.matched[0, IOU_50, true].tolist())
    objects = []
    for i in matches.object_index[matches.object_image_index == index].tolist():
        kind = "crowd" if annotations.is_crowd[i] else "true" if i in detected else "false"
        remark = {"crowd": " (crowd)", "true": "", "false": " (missed)"}[kind]
        objects.append(Mark(box=annotations.boxes[i].tolist(), label=names[annotations.labels[i]] + remark, kind=kind))
    kinds = list(MISTAKE_KINDS)
    detections = []
    here = np.flatnonzero((matches.image_index == index) & (matches.scores >= score))
    for i in here[np.argsort(matches.scores[here], kind="stable")].tolist():
        kind = "true" if true[i] else "false" if false[i] else "crowd"
        remark = {"crowd": " (crowd)", "true": "", "false": f" ({kinds[mistakes.kinds[i]]})"}[kind]
        label = f"{names[matches.labels[i]]} {matches.scores[i]:.2f}{remark}"
        box = matches.detections.boxes[matches.detection_index[i]].tolist()
        detections.append(Mark(box=box, label=label, kind=kind))
    return objects, detections


def side_by_side(image: Image.Image, objects: Sequence[Mark], detections: Sequence[Mark], *, name: str) -> str:
    """Return two views of an image that share its pixels: objects on the left, detections on the right."""
    scale = SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    views = [
        f'<svg class="view" role="img" aria-label="{title}" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}">{pixels}{_drawn(boxes, scale, width, height)}</svg>'
        for title, boxes, pixels in (
            (
                f"objects: {_tally(objects)}",
                objects,
                f'<image id="{name}" width="{width}" height="{height}" {_href(image)}/>',
            ),
            (f"detections: {_tally(detections)}", detections, f'<use href="#{name}"/>'),
        )
    ]
    return f'<div class="pair">{"".join(views)}</div>'


def _href(image: Image.Image) -> str:
    """Return the image as a data URI, no larger than it is shown."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80, optimize=True)
    return f'preserveAspectRatio="none" href="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"'


def _tally(boxes: Sequence[Mark]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(mark.kind for mark in boxes).items()) or "none"


def _drawn(boxes: Sequence[Mark], scale: float, width: int, height: int) -> str:
    """Return boxes first, labels above all of them; of many boxes, those of mistakes, where they cover no other."""
    shapes, labels = [], []
    crowded = len(boxes) >= _CROWDED
    taken: list[tuple[float, float, float]] = []
    for mark in boxes:
        left, top = (max(1.0, side * scale) for side in mark.box[:2])
        right = min(width - 1.0, (mark.box[0] + mark.box[2]) * scale)
        bottom = min(height - 1.0, (mark.box[1] + mark.box[3]) * scale)
        sides = f'width="{max(0.0, right - left):.1f}" height="{max(0.0, bottom - top):.1f}"'
        corner = f'x="{left:.1f}" y="{top:.1f}" {sides}'
        tip = f"<title>{escape(mark.label)}</title>"
        shapes.append(f'<g class="{mark.kind}">{tip}<rect class="halo" {corner}/><rect class="box" {corner}/></g>')
        if crowded and mark.kind == "true":
            continue
        wide = 0.58 * _FONT * len(mark.label) + 6
        x = max(0.0, min(left - 1, width - wide))
        heights = [y for y in (top - _LINE, top, bottom - _LINE, bottom) if 0 <= y <= height - _LINE] or [0.0]
        free = [y for y in heights if _is_free(x, y, wide, taken)]
        if free or not crowded:
            y = (free or heights)[0]
            taken.append((x, y, wide))
            labels.append(
                f'<g class="{mark.kind} label"><rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{_LINE:.1f}"/>'
                f'<text x="{x + 3:.1f}" y="{y + _FONT - 0.5:.1f}">{escape(mark.label)}</text></g>'
            )
    return "".join(shapes + labels)


def _is_free(x: float, y: float, wide: float, taken: Sequence[tuple[float, float, float]]) -> bool:
    """Return whether a label covers no other."""
    return not any(abs(y - other_y) < _LINE and x < at + w and at < x + wide for at, other_y, w in taken)
