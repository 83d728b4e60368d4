"""Simulated datasets and detectors of any size, to measure speed and how often intervals cover."""

import numpy as np

from detr_backbone.coco.annotations import CocoAnnotations
from detr_backbone.coco.typed_arrays import FloatArray
from detr_backbone.evaluation.detections import Detections

HEIGHT, WIDTH = 480, 640
_DETECTED, _CONFUSED, _CROWDS = 0.85, 0.1, 0.01  # fractions of the objects
_SHIFT = 0.08  # standard deviation of a detected box's corner and sides, as a fraction of the sides


def simulate(
    images: int, *, classes: int = 80, objects: float = 7.2, detections: int = 100, seed: int = 0
) -> tuple[CocoAnnotations, Detections]:
    """Return a dataset like COCO, and the detections of a mediocre detector on it, with an AP of about 0.3.

    Objects are distributed over the images at random; class k is 1 / (k + 1)^0.9 as frequent as the first. A detected
    object gives one to three detections with higher scores than the false positives, which fill each image up.

    Args:
        images: how many.
        classes: how many.
        objects: mean per image; COCO has 7.2.
        detections: in each image.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    count = round(images * objects)
    frequency = np.arange(1, classes + 1) ** -0.9
    frequency /= frequency.sum()
    image_index = np.sort(rng.integers(0, images, count))
    labels = rng.choice(classes, count, p=frequency)
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
    detected = np.repeat(np.arange(count), rng.integers(1, 4, count) * (rng.random(count) < _DETECTED))
    near = boxes[detected] + rng.normal(0, _SHIFT, (len(detected), 4)) * np.tile(boxes[detected, 2:], 2)
    near[:, 2:] = np.abs(near[:, 2:])
    false = np.repeat(
        np.arange(images), np.maximum(0, detections - np.bincount(image_index[detected], minlength=images))
    )
    confused = rng.random(len(detected)) < _CONFUSED
    detected_labels = np.where(confused, rng.choice(classes, len(detected), p=frequency), labels[detected])
    image_of = np.concatenate([image_index[detected], false])
    scores = np.concatenate([rng.beta(3, 2, len(detected)), rng.beta(1, 6, len(false))])
    order = np.lexsort((-scores, image_of))
    order = order[np.arange(len(order)) - np.searchsorted(image_of[order], image_of[order]) < detections]
    return annotations, Detections(
        image_index=image_of[order],
        labels=np.concatenate([detected_labels, rng.choice(classes, len(false), p=frequency)])[order],
        scores=scores[order],
        boxes=np.concatenate([near, _boxes(rng, len(false))])[order],
    )


def _boxes(rng: np.random.Generator, count: int) -> FloatArray:
    """Return boxes [count, 4], xywh: sides from 8 to 300 pixels, uniform in their logarithm."""
    sides = np.exp(rng.uniform(np.log(8), np.log(300), (count, 1)) + rng.normal(0, 0.3, (count, 2)))
    return np.concatenate([rng.uniform(0, (400, 300), (count, 2)), sides], axis=1)
