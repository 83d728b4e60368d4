"""From photographs in a folder to a padded batch: our pipeline, and the one that torchvision documents.

Both decode, flip, resize to a shorter side of 800 and normalise the same photographs in one process, as each worker of
a loader does.
"""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peers import Case, Run
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from detr_backbone import nested_tensor_from_tensor_list
from detr_backbone.coco.dataset import CocoDetection, collate
from detr_backbone.coco.transforms import TransformConfig, make_transforms

CONFIG = TransformConfig(scales=(800,), crop=False)
OBJECTS = 7  # in each photograph, as in COCO


class Photographs(TemporaryDirectory[str]):
    """A folder of JPEG photographs of random blots, of the sizes of a case, with an annotation file."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.annotations = str(Path(self.name) / "annotations.json")
        rng = np.random.default_rng(0)
        content: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "blot"}]}
        for number, (height, width) in enumerate(case.sizes):
            blots = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
            blots.resize((width, height), Image.Resampling.BICUBIC).save(Path(self.name) / f"{number}.jpg", quality=90)
            content["images"].append({"id": number, "file_name": f"{number}.jpg", "height": height, "width": width})
            for _ in range(OBJECTS):
                box = [*rng.integers(0, [width // 2, height // 2]).tolist(), width // 4, height // 4]
                identity = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": 1}
                content["annotations"].append(identity | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0})
        Path(self.annotations).write_text(json.dumps(content), encoding="utf-8")


@dataclass
class _Pipeline:
    photographs: Photographs
    """Deleted with the pipeline that reads them."""
    read: Run

    def __call__(self) -> object:
        return self.read()


def our_pipeline(case: Case) -> Run:
    """CocoDetection with its transforms and its collation."""
    folder = Photographs(case)
    dataset = CocoDetection(folder.name, folder.annotations, transforms=make_transforms(CONFIG, train=True))

    return _Pipeline(folder, lambda: collate([dataset[index] for index in range(len(dataset))]))


def torchvision_pipeline(case: Case) -> Run:
    """torchvision.datasets.CocoDetection, wrapped for transforms.v2, with the transforms of its documentation."""
    folder = Photographs(case)
    transforms = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomHorizontalFlip(CONFIG.horizontal_flip),
            v2.RandomShortestSize(CONFIG.scales, max_size=CONFIG.max_size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(CONFIG.mean, CONFIG.std),
            v2.ConvertBoundingBoxFormat("CXCYWH"),
            v2.SanitizeBoundingBoxes(),
        ]
    )
    with contextlib.redirect_stdout(io.StringIO()):
        dataset: Any = datasets.CocoDetection(folder.name, folder.annotations, transforms=transforms)
    dataset = datasets.wrap_dataset_for_transforms_v2(dataset, target_keys=("boxes", "labels", "image_id"))

    return _Pipeline(
        folder, lambda: nested_tensor_from_tensor_list([dataset[index][0] for index in range(len(dataset))])
    )


PIPELINES: dict[str, Callable[[Case], Run]] = {
    "our pipeline": our_pipeline,
    "torchvision pipeline": torchvision_pipeline,
}
