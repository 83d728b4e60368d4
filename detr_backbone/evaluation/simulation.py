"""Simulated detectors on simulated datasets, as large as wanted: to measure speed, and whether intervals cover."""

import numpy as np

from detr_backbone.coco.annotations import CocoAnnotations
from detr_backbone.evaluation.detections import Detections

HEIGHT, WIDTH = 480, 640
_FOUND, _CONFUSED, _CROWDS = 0.85, 0.1, 0.01  # shares of the objects
_SHIFT = 0.08  # standard deviation of a found box's corner and sides, as a share of the sides


def simulate(
    images: int, *, classes: int = 80, objects: float = 7.2, detections: int = 100, seed: int = 0
) -> tuple[CocoAnnotations, Detections]:
    """A dataset like COCO and what a mediocre detector, AP about 0.3, finds in it.

    Objects stand in images by chance; class k is 1 / (k + 1)^0.9 as frequent as the first. A found object gives one to
    three detections with higher scores than the false ones, which fill each image up.

    Args:
        images: how many.
        classes: how many.
        objects: mean per image; COCO has 7.2.
        detections: in each image.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    count = round(images * objects)
    share = np.arange(1, classes + 1) ** -0.9
    share /= share.sum()
    image_index = np.sort(rng.integers(0, images, count))
    labels = rng.choice(classes, count, p=share)
    boxes = _boxes(rng, count)
    annotations = CocoAnnotations(
        source="<simulated>",
        image_ids=np.arange(1, images + 1),
        file_names=np.array([f"{i}.jpg" for i in range(images)]),
        sizes=np.tile([HEIGHT, WIDTH], (images, 1)),
        category_ids=tuple(range(1, classes + 1)),
        category_names=tuple(f"class {label}" for label in range(classes)),
        annotation_ids=np.arange(count),
        image_index=image_index,
        labels=labels,
        boxes=boxes,
        areas=0.7 * boxes[:, 2] * boxes[:, 3],
        is_crowd=rng.random(count) < _CROWDS,
    )
    found = np.repeat(np.arange(count), rng.integers(1, 4, count) * (rng.random(count) < _FOUND))
    near = boxes[found] + rng.normal(0, _SHIFT, (len(found), 4)) * np.tile(boxes[found, 2:], 2)
    near[:, 2:] = np.abs(near[:, 2:])
    false = np.repeat(np.arange(images), np.maximum(0, detections - np.bincount(image_index[found], minlength=images)))
    confused = rng.random(len(found)) < _CONFUSED
    found_labels = np.where(confused, rng.choice(classes, len(found), p=share), labels[found])
    places = np.concatenate([image_index[found], false])
    scores = np.concatenate([rng.beta(3, 2, len(found)), rng.beta(1, 6, len(false))])
    best = np.lexsort((-scores, places))
    best = best[np.arange(len(best)) - np.searchsorted(places[best], places[best]) < detections]
    return annotations, Detections(
        image_index=places[best],
        labels=np.concatenate([found_labels, rng.choice(classes, len(false), p=share)])[best],
        scores=scores[best],
        boxes=np.concatenate([near, _boxes(rng, len(false))])[best],
    )


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Boxes [count, 4], xywh: sides from 8 to 300 pixels, uniform in their logarithm."""
    sides = np.exp(rng.uniform(np.log(8), np.log(300), (count, 1)) + rng.normal(0, 0.3, (count, 2)))
    return np.concatenate([rng.uniform(0, (400, 300), (count, 2)), sides], axis=1)
