"""COCO images and their boxes as samples for a detector.

What can be wrong with a dataset is found when it is opened, not in the middle of an epoch; only what needs the pixels
waits until an image is read. Every error names the file, the image and the annotation it is about.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from detr_backbone.coco.annotations import CocoAnnotations, load_annotations
from detr_backbone.coco.images import read_image
from detr_backbone.errors import AnnotationError, DataError
from detr_backbone.nested_tensor import NestedTensor, Size, nested_tensor_from_tensor_list
from detr_backbone.padding import pad_to_multiple


class Target(TypedDict):
    """What is known about one image; N boxes, none for an image without annotations."""

    boxes: Tensor
    """float32 [N, 4]: xyxy in pixels as read; after the transforms cxcywh as a share of the image."""
    labels: Tensor
    """int64 [N], 0 .. K - 1; `CocoDetection.category_ids` gives the dataset's own ids."""
    image_id: int
    orig_size: Size
    """(h, w) of the picture in the file, upright."""
    size: Size
    """(h, w) after the transforms."""


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """Images of a folder with the boxes of a COCO file, in the order of their image ids.

    Crowd annotations are left out of the targets: they are regions to ignore, and only the evaluation knows how. So are
    boxes without area, which hold nothing to find; boxes that reach outside their image are clipped to it.
    `dropped_boxes` and `clipped_boxes` count them.

    Args:
        images: the folder of the pictures. Links that lead out of it are refused.
        annotations: the COCO annotation file, or what was read from it, such as a subset.
        transforms: called with image and target, gives both back; see `detr_backbone.coco.transforms`. Without, the
            image is a `tv_tensors.Image` of uint8 [3, h, w].

    Attributes:
        annotations: the checked annotations.
        image_ids: the id of each index.
        category_ids: the dataset's category id of each label 0 .. K - 1.
        category_names: the name of each label.
        categories: category id -> name, in the order of the labels.
        num_classes: K.

    Raises:
        AnnotationError: the annotation file contradicts itself, the COCO format, or the folder.
        DataError: there are no images, or files are missing.
    """

    def __init__(
        self,
        images: Path | str,
        annotations: CocoAnnotations | Path | str,
        *,
        transforms: Callable[[Any, Target], tuple[Tensor, Target]] | None = None,
    ) -> None:
        self.annotations = annotations if isinstance(annotations, CocoAnnotations) else load_annotations(annotations)
        self.transforms = transforms
        self.image_ids: tuple[int, ...] = tuple(self.annotations.image_ids.tolist())
        self.category_ids = self.annotations.category_ids
        self.category_names = self.annotations.category_names
        self.categories = dict(zip(self.category_ids, self.category_names, strict=True))
        self.num_classes = len(self.category_ids)
        self._images = Path(images)
        check_files(self._images, self.annotations)

        boxes, self.clipped_boxes = clipped_boxes(self.annotations)
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        keep = has_area & ~self.annotations.is_crowd
        self.dropped_boxes = int((~has_area & ~self.annotations.is_crowd).sum())
        self._boxes, self._labels = boxes[keep], self.annotations.labels[keep]
        self._ends = np.searchsorted(self.annotations.image_index[keep], np.arange(len(self) + 1))

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        height, width = self.annotations.sizes[index].tolist()
        path = self._images / str(self.annotations.file_names[index])
        picture = read_image(path, size=(height, width), image_id=self.image_ids[index])
        mine = slice(self._ends[index], self._ends[index + 1])
        boxes = torch.from_numpy(self._boxes[mine].astype(np.float32))
        target = Target(
            boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            labels=torch.from_numpy(self._labels[mine].copy()),
            image_id=self.image_ids[index],
            orig_size=(height, width),
            size=(height, width),
        )
        image = tv_tensors.Image(picture)
        return (image, target) if self.transforms is None else self.transforms(image, target)


def collate(
    samples: Sequence[tuple[Tensor, Target]], *, pad_to_multiple_of: int = 1
) -> tuple[NestedTensor, list[Target]]:
    """Samples as one padded batch with its targets; the `collate_fn` of a DataLoader.

    Args:
        samples: as `CocoDetection` gives them, transformed.
        pad_to_multiple_of: divides the sides of the batch, so that batches have few sizes.

    >>> target = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0), image_id=7, orig_size=(4, 6), size=(4, 6))
    >>> images, targets = collate([(torch.zeros(3, 4, 6), target), (torch.zeros(3, 5, 2), target)])
    >>> images.tensors.shape, [target["image_id"] for target in targets]
    (torch.Size([2, 3, 5, 6]), [7, 7])
    """
    images = nested_tensor_from_tensor_list([image for image, _ in samples])
    return pad_to_multiple(images, pad_to_multiple_of), [target for _, target in samples]


def clipped_boxes(annotations: CocoAnnotations) -> tuple[npt.NDArray[np.float64], int]:
    """Boxes [N, 4] as xyxy within their images, and how many had to be clipped by more than a hundredth of a pixel.

    Raises:
        AnnotationError: a box lies outside its image altogether.
    """
    heights, widths = annotations.sizes[annotations.image_index].T
    boxes = np.concatenate([annotations.boxes[:, :2], annotations.boxes[:, :2] + annotations.boxes[:, 2:]], axis=1)
    limits = np.stack([widths, heights, widths, heights], axis=1)
    outside = ((boxes[:, :2] >= limits[:, :2]) | (boxes[:, 2:] <= 0)).any(axis=1) & (annotations.boxes[:, 2:] > 0).all(
        axis=1
    )
    for index in np.flatnonzero(outside):
        where = f"file={annotations.source} image_id={annotations.image_ids[annotations.image_index[index]]}"
        raise AnnotationError(
            f"box lies outside its image | where: {where} ann_id={annotations.annotation_ids[index]} key=bbox | "
            f"got {annotations.boxes[index].tolist()} expected within {widths[index]} x {heights[index]}"
        )
    inside = boxes.clip(0, limits)
    return inside, int((np.abs(inside - boxes) > 0.01).any(axis=1).sum())


def check_files(folder: Path, annotations: CocoAnnotations) -> None:
    """Refuse an empty dataset, names that leave the folder, and files that do not exist."""
    if not len(annotations.image_ids):
        raise DataError(f"dataset has no images | where: file={annotations.source} key=images | got []")
    root = os.path.realpath(folder)
    missing = []
    for image_id, name in zip(annotations.image_ids.tolist(), annotations.file_names.tolist(), strict=True):
        real = os.path.realpath(os.path.join(root, name))  # noqa: PTH118 - five times faster than Path
        if Path(name).is_absolute() or os.path.commonpath([root, real]) != root:
            raise AnnotationError(
                f"file name leads out of the images folder | where: file={annotations.source} image_id={image_id} "
                f"key=file_name | got {name!r} expected a file below {root}"
            )
        if not os.path.isfile(real):  # noqa: PTH113
            missing.append(name)
    if missing:
        raise DataError(
            f"image files are missing | where: file={annotations.source} key=file_name folder={folder} | "
            f"got {len(missing)} of {len(annotations.image_ids)} missing, first {missing[:5]} | fix: check the folder"
        )
