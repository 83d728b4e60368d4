"""Category names of published detectors, whose class heads count otherwise than a dataset does.

Detectors of COCO have a class for every id from 0 to 90, of which COCO's 2017 detection task uses 80: the names of the
others are "N/A".
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from detr_backbone.errors import WeightsError
from detr_backbone.weights.read import WeightsFile

UNUSED = "N/A"
"""Name of a class that no dataset category stands for."""
COCO_CLASSES = 91
"""Classes of a detector of COCO in the original code: the highest category id and one (facebookresearch/detr)."""
COCO_PANOPTIC_CLASSES = 250

_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_NAMES_IN_ORDER = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush"
)
COCO_NAMES: Mapping[int, str] = dict(
    zip([i for i in range(1, COCO_CLASSES) if i not in _UNUSED_IDS], _NAMES_IN_ORDER.split(", "), strict=True)
)
"""COCO category id -> name: 80 of the ids from 1 to 90. Source: `categories` of COCO's instances_val2017.json."""


def class_names(file: WeightsFile, num_classes: int) -> tuple[str, ...] | None:
    """Return the name of each class of a detector's file, or None where nothing tells them.

    They stand in the file, as in a checkpoint of this package's training; or in the `config.json` beside it, as in a
    folder of transformers; or a class head of 91 or 250 classes is COCO's.

    Args:
        file: the file.
        num_classes: K, the classes of its head, without "no object".

    Raises:
        WeightsError: there are names, but not one for each class.
    """
    names = file.extras.get("category_names")
    if names is None:
        labels = folder_config(file).get("id2label")
        if isinstance(labels, Mapping) and any(name != f"LABEL_{label}" for label, name in labels.items()):
            names = [labels.get(str(label), UNUSED) for label in range(max(map(int, labels)) + 1)]
    if names is None:
        if num_classes not in (COCO_CLASSES, COCO_PANOPTIC_CLASSES):
            return None
        named = num_classes if num_classes == COCO_CLASSES else COCO_CLASSES
        names = [COCO_NAMES.get(label, UNUSED) for label in range(named)]
        names += [f"stuff {label}" for label in range(named, num_classes)]
    if len(names) != num_classes:
        raise WeightsError(
            f"names do not fit the class head | where: file={file.path} | got {len(names)} names expected {num_classes}"
        )
    return tuple(map(str, names))


def folder_config(file: WeightsFile, name: str = "config.json") -> dict[str, Any]:
    """Return a JSON file beside a weights file of transformers; {} where there is none."""
    path = file.path.parent / name
    if not file.path.name.startswith(("model.safetensors", "pytorch_model")) or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(
            f"config cannot be read | where: file={path} | got {error} | fix: fetch or copy the file again"
        ) from error
    return content if isinstance(content, dict) else {}


def matching_classes(names: Sequence[str], wanted: Sequence[str]) -> dict[int, int]:
    """Return for each wanted name that a detector has, by index, the class of that name; case does not matter.

    >>> matching_classes(["N/A", "person", "car"], ["Car", "tree"])
    {0: 2}
    """
    known = {name.strip().casefold(): label for label, name in enumerate(names) if name != UNUSED}
    return {
        index: known[name.strip().casefold()] for index, name in enumerate(wanted) if name.strip().casefold() in known
    }
