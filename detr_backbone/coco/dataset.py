"""COCO images and their boxes as samples for a detector.

A dataset is checked when it is opened, not in the middle of an epoch; only checks of pixels wait until an image is
read. Every error names the file, the image and the annotation.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detr_backbone.coco.annotations import CocoAnnotations, load_annotations, refuse
from detr_backbone.coco.box_clipping import MOVED_TOLERANCE, clip
from detr_backbone.coco.findings import DEFAULT_POLICIES, DataPolicies
from detr_backbone.coco.image_files import examine_files
from detr_backbone.coco.images import read_image
from detr_backbone.coco.typed_arrays import IntArray
from detr_backbone.nested_tensor import NestedTensor, Size, nested_tensor_from_tensor_list, pad_to_multiple


class Target(TypedDict):
    """The ground truth of one image; N boxes, none for an image without annotations."""

    boxes: Tensor
    """float32 [N, 4]: xyxy in pixels as read; after the transforms cxcywh in fractions of the image."""
    labels: Tensor
    """int64 [N], 0 .. K - 1; `CocoDetection.category_ids` gives the dataset's own ids."""
    image_id: int
    orig_size: Size
    """(h, w) of the image in the file, upright."""
    size: Size
    """(h, w) after the transforms."""


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """Images of a folder with the boxes of a COCO file, in the order of their image ids.

    Crowd annotations are left out of the targets: they are regions to ignore, which the evaluation does. So are boxes
    without area; boxes that reach outside their image are clipped to it. `dropped_boxes` and `clipped_boxes` count
    them.

    Args:
        images: the folder of the images. Links that lead out of it are refused.
        annotations: the COCO annotation file, or its checked content, such as a subset.
        transforms: called with image and target, returns both; see `detr_backbone.coco.transforms`. Without, the
            image is a `tv_tensors.Image` of uint8 [3, h, w].
        policies: how faults are handled that need not be refused.

    Attributes:
        annotations: the checked annotations.
        image_ids: the id of each index.
        category_ids: the dataset's category id of each label 0 .. K - 1.
        category_names: the name of each label.
        categories: category id -> name, in the order of the labels.
        num_classes: K.
        findings: the number of faults of each kind that were let through, by dropping, clipping, or with a warning.

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
        policies: DataPolicies = DEFAULT_POLICIES,
    ) -> None:
        if not isinstance(annotations, CocoAnnotations):
            annotations = load_annotations(annotations, policies=policies)
        self.annotations = annotations
        self.transforms = transforms
        self.image_ids: tuple[int, ...] = tuple(self.annotations.image_ids.tolist())
        self.category_ids = self.annotations.category_ids
        self.category_names = self.annotations.category_names
        self.categories = dict(zip(self.category_ids, self.category_names, strict=True))
        self.num_classes = len(self.category_ids)
        self._images = Path(images)
        self.findings = dict(self.annotations.findings)
        files = examine_files(
            self._images,
            self.annotations.image_ids,
            self.annotations.file_names.tolist(),
            source=self.annotations.source,
        )
        refuse(files, policies)
        self.findings |= {one.kind: one.count for one in files}
        clipped = clip(self.annotations.boxes, self.annotations.sizes[self.annotations.image_index])
        keep = clipped.is_target & ~self.annotations.is_crowd
        self.dropped_boxes = int((~clipped.is_target & ~self.annotations.is_crowd).sum())
        self.clipped_boxes = int((clipped.moved > MOVED_TOLERANCE).sum())
        self._boxes, self._labels = clipped.boxes[keep], self.annotations.labels[keep]
        self._ends = np.searchsorted(self.annotations.image_index[keep], np.arange(len(self) + 1))

        import torchvision  # noqa: F401 - once here, and not in every worker of a DataLoader

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def boxes_per_image(self) -> IntArray:
        """The number of boxes of each index before the transforms, int64 [len(self)]."""
        return np.diff(self._ends)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        from torchvision import tv_tensors

        height, width = self.annotations.sizes[index].tolist()
        path = self._images / str(self.annotations.file_names[index])
        decoded = read_image(path, size=(height, width), image_id=self.image_ids[index])
        mine = slice(self._ends[index], self._ends[index + 1])
        boxes = torch.from_numpy(self._boxes[mine].astype(np.float32))
        target = Target(
            boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            labels=torch.from_numpy(self._labels[mine].copy()),
            image_id=self.image_ids[index],
            orig_size=(height, width),
            size=(height, width),
        )
        image = tv_tensors.Image(decoded)
        return (image, target) if self.transforms is None else self.transforms(image, target)


def collate(
    samples: Sequence[tuple[Tensor, Target]], *, pad_to_multiple_of: int = 1
) -> tuple[NestedTensor, list[Target]]:
    """Return samples as one padded batch with its targets; the `collate_fn` of a DataLoader.

    Args:
        samples: as `CocoDetection` gives them, transformed.
        pad_to_multiple_of: the sides of the batch are padded to multiples of it, so that batches have few sizes.

    >>> target = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0), image_id=7, orig_size=(4, 6), size=(4, 6))
    >>> images, targets = collate([(torch.zeros(3, 4, 6), target), (torch.zeros(3, 5, 2), target)])
    >>> images.tensors.shape, [target["image_id"] for target in targets]
    (torch.Size([2, 3, 5, 6]), [7, 7])
    """
    images = nested_tensor_from_tensor_list([image for image, _ in samples])
    return pad_to_multiple(images, pad_to_multiple_of), [target for _, target in samples]
