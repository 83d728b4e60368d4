"""Pictures with their objects beside the detections, as SVG over one JPEG, so that boxes and words stay crisp."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from detr_backbone.coco.annotations import CocoAnnotations
from detr_backbone.evaluation.analysis import right_and_wrong
from detr_backbone.evaluation.detections import Detections
from detr_backbone.evaluation.matching import Matches
from detr_backbone.evaluation.mistakes import KINDS, Mistakes

SIDE = 420
"""Pixels of the longer side of a picture on the page."""
_CROWDED = 8  # boxes from which only those that are wrong have words
_FONT, _LINE = 11.0, 14.0  # pixels of the words, and of the ground they stand on


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A box on a picture: xywh in pixels, what it is, and how it is drawn: `right`, `wrong` or `other`."""

    box: Sequence[float]
    words: str
    kind: str


def marks(
    annotations: CocoAnnotations,
    detections: Detections,
    matches: Matches,
    mistakes: Mistakes,
    *,
    place: int,
    score: float,
) -> tuple[list[Mark], list[Mark]]:
    """The objects of one image, and its detections of at least this score, as they are called right or wrong.

    Args:
        annotations: the ground truth.
        detections: all of them.
        matches: of the two.
        mistakes: their kinds.
        place: of the image in `matches.image_ids`.
        score: the least score.
    """
    names = annotations.category_names
    right, wrong = right_and_wrong(matches, score=score)
    found = set(matches.matched[0, 0, right].tolist())
    objects = []
    for i in matches.object_index[matches.object_image_index == place].tolist():
        kind = "other" if annotations.is_crowd[i] else "right" if i in found else "wrong"
        word = {"other": " (crowd)", "right": "", "wrong": " (not found)"}[kind]
        objects.append(Mark(box=annotations.boxes[i].tolist(), words=names[annotations.labels[i]] + word, kind=kind))
    kinds = list(KINDS)
    detected = []
    here = np.flatnonzero((matches.image_index == place) & (matches.scores >= score))
    for i in here[np.argsort(matches.scores[here], kind="stable")].tolist():
        kind = "right" if right[i] else "wrong" if wrong[i] else "other"
        word = {"other": " (crowd)", "right": "", "wrong": f" ({kinds[mistakes.kinds[i]]})"}[kind]
        words = f"{names[matches.labels[i]]} {matches.scores[i]:.2f}{word}"
        detected.append(Mark(box=detections.boxes[matches.detection_index[i]].tolist(), words=words, kind=kind))
    return objects, detected


def side_by_side(picture: Image.Image, objects: Sequence[Mark], detected: Sequence[Mark], *, name: str) -> str:
    """Two views of a picture that share its pixels: objects on the left, detections on the right."""
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    views = [
        f'<svg class="picture" role="img" aria-label="{title}" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}">{pixels}{_drawn(boxes, scale, width, height)}</svg>'
        for title, boxes, pixels in (
            (
                f"objects: {_tally(objects)}",
                objects,
                f'<image id="{name}" width="{width}" height="{height}" {_href(picture)}/>',
            ),
            (f"detections: {_tally(detected)}", detected, f'<use href="#{name}"/>'),
        )
    ]
    return f'<div class="pair">{"".join(views)}</div>'


def _href(picture: Image.Image) -> str:
    """The picture as a data URI, no larger than it is shown."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80, optimize=True)
    return f'preserveAspectRatio="none" href="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"'


def _tally(boxes: Sequence[Mark]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(mark.kind for mark in boxes).items()) or "none"


def _drawn(boxes: Sequence[Mark], scale: float, width: int, height: int) -> str:
    """Boxes first, words above all of them."""
    shapes, words = [], []
    taken: list[tuple[float, float, float]] = []
    for mark in boxes:
        left, top = (max(1.0, side * scale) for side in mark.box[:2])
        right = min(width - 1.0, (mark.box[0] + mark.box[2]) * scale)
        bottom = min(height - 1.0, (mark.box[1] + mark.box[3]) * scale)
        sides = f'width="{max(0.0, right - left):.1f}" height="{max(0.0, bottom - top):.1f}"'
        corner = f'x="{left:.1f}" y="{top:.1f}" {sides}'
        tip = f"<title>{escape(mark.words)}</title>"
        shapes.append(f'<g class="{mark.kind}">{tip}<rect class="halo" {corner}/><rect class="box" {corner}/></g>')
        if len(boxes) < _CROWDED or mark.kind != "right":
            wide = 0.58 * _FONT * len(mark.words) + 6
            x = max(0.0, min(left - 1, width - wide))
            y = _free_height(x, wide, (top - _LINE, top, bottom - _LINE, bottom), taken, height - _LINE)
            taken.append((x, y, wide))
            words.append(
                f'<g class="{mark.kind} words"><rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{_LINE:.1f}"/>'
                f'<text x="{x + 3:.1f}" y="{y + _FONT - 0.5:.1f}">{escape(mark.words)}</text></g>'
            )
    return "".join(shapes + words)


def _free_height(
    x: float, wide: float, heights: Sequence[float], taken: Sequence[tuple[float, float, float]], lowest: float
) -> float:
    """The first of some heights within the picture at which words cover no others, or else the first within it."""
    within = [y for y in heights if 0 <= y <= lowest] or [0.0]
    for y in within:
        if not any(abs(y - other_y) < _LINE and x < at + w and at < x + wide for at, other_y, w in taken):
            return y
    return within[0]
