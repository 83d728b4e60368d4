"""Transforms of images and boxes, as in the training of DETR.

Every draw comes from torch's generator, so that a seed decides the whole epoch and a resumed run can repeat it.

Source: DETR, arXiv 2005.12872, appendix A.4 (scales, random crop), and the sizes of its published implementation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from detr_backbone.coco.dataset import Target
from detr_backbone.errors import ConfigError
from detr_backbone.nested_tensor import Size

if TYPE_CHECKING:
    from torchvision.transforms import v2


@dataclass(frozen=True, kw_only=True)
class TransformConfig:
    """Resizing, augmentation and normalisation of images.

    Attributes:
        scales: pixels of the shorter side in training, one drawn per image.
        max_size: the most pixels of the longer side.
        crop: in training, cut a random region out of every second image before it is resized.
        crop_scales: pixels of the shorter side before a crop, one drawn per image.
        crop_sides: shortest and longest side of a crop in pixels.
        horizontal_flip: fraction of training images that are mirrored left to right.
        vertical_flip: fraction of training images that are mirrored top to bottom; for images such as aerial ones.
        color_jitter: strength of random brightness, contrast and saturation, each within 1 +- this factor.
        mean: of each channel, red first, in 0 .. 1; the default is ImageNet's.
        std: of each channel; the default is ImageNet's.
        eval_size: pixels of the shorter side outside training.

    Raises:
        ConfigError: a value is out of range; the message names it.
    """

    scales: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    max_size: int = 1333
    crop: bool = True
    crop_scales: tuple[int, ...] = (400, 500, 600)
    crop_sides: tuple[int, int] = (384, 600)
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    color_jitter: float = 0.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    eval_size: int = 800

    def __post_init__(self) -> None:
        for key, fits, expected in (
            ("scales", bool(self.scales) and min(self.scales) >= 1, "at least one positive size"),
            ("max_size", self.max_size >= 1, "a positive size"),
            ("crop_scales", bool(self.crop_scales) and min(self.crop_scales) >= 1, "at least one positive size"),
            ("crop_sides", 1 <= self.crop_sides[0] <= self.crop_sides[1], "shortest, longest, both positive"),
            ("horizontal_flip", 0 <= self.horizontal_flip <= 1, "a fraction between 0 and 1"),
            ("vertical_flip", 0 <= self.vertical_flip <= 1, "a fraction between 0 and 1"),
            ("color_jitter", 0 <= self.color_jitter <= 1, "a strength between 0 and 1"),
            ("std", min(self.std) > 0, "positive numbers"),
            ("eval_size", self.eval_size >= 1, "a positive size"),
        ):
            if not fits:
                raise ConfigError(f"`{key}` must be {expected}, got {getattr(self, key)}")


def make_transforms(config: TransformConfig, *, train: bool) -> "v2.Compose":
    """Return the transforms of a `CocoDetection`: (uint8 image, target) in, (float32 [3, h, w] normalised, target) out.

    Boxes come out as cxcywh in fractions of the image. A box without area after a crop is removed with its label.

    >>> from torchvision import tv_tensors
    >>> transforms = make_transforms(TransformConfig(), train=False)
    >>> boxes = tv_tensors.BoundingBoxes([[10, 20, 30, 40]], format="XYXY", canvas_size=(427, 640), dtype=torch.float32)
    >>> target = Target(boxes=boxes, labels=torch.tensor([3]), image_id=7, orig_size=(427, 640), size=(427, 640))
    >>> image, target = transforms(tv_tensors.Image(torch.zeros(3, 427, 640, dtype=torch.uint8)), target)
    >>> image.shape, image.dtype, target["size"], target["boxes"].shape
    (torch.Size([3, 800, 1199]), torch.float32, (800, 1199), torch.Size([1, 4]))
    """
    from torchvision.transforms import v2

    # In 0 .. 255, which saves a pass; in place, as the conversion from uint8 has made a copy.
    mean, std = ([255 * value for value in values] for values in (config.mean, config.std))
    finish = [v2.ToDtype(torch.float32), v2.Normalize(mean, std, inplace=True), finish_target]
    if not train:
        return v2.Compose([ResizeShorterSide((config.eval_size,), config.max_size), *finish])
    resize = ResizeShorterSide(config.scales, config.max_size)
    crop = v2.Compose([ResizeShorterSide(config.crop_scales), RandomCrop(config.crop_sides), resize])
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(config.horizontal_flip),
            v2.RandomVerticalFlip(config.vertical_flip),
            v2.RandomChoice([resize, crop]) if config.crop else resize,
            v2.ColorJitter(config.color_jitter, config.color_jitter, config.color_jitter),
            *finish,
        ]
    )


def resized_size(size: Size, shorter: int, max_size: int | None = None) -> Size:
    """Return the (h, w) to which an image of this (h, w) is resized: DETR's rule, pixel by pixel.

    The shorter side becomes `shorter`, or less where the longer one would pass `max_size`; the longer one is rounded
    down. Rounding the shorter side up may let the longer one pass `max_size` by a few pixels, as in DETR. No side falls
    below one pixel: an image for which the rule gives none becomes a line of `max_size` pixels.

    >>> resized_size((480, 640), 800, 1333), resized_size((427, 640), 800, 1333), resized_size((1000, 4000), 800, 1333)
    ((800, 1066), (800, 1199), (333, 1332))
    """
    short, long = min(size), max(size)
    longer = shorter * long // short
    if max_size is not None and shorter * long > max_size * short:
        shorter = round(max_size * short / long)
        longer = shorter * long // short if shorter else max_size
    shorter = max(shorter, 1)
    return (shorter, longer) if size[0] <= size[1] else (longer, shorter)


@dataclass(frozen=True)
class ResizeShorterSide:
    """Resize so that the shorter side is one of `scales`, drawn for each image."""

    scales: Sequence[int]
    max_size: int | None = None

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        from torchvision.transforms.v2 import functional as F

        shorter = self.scales[_random_integer(0, len(self.scales) - 1)]
        size = list(resized_size((image.shape[-2], image.shape[-1]), shorter, self.max_size))
        return F.resize(image, size), {**target, "boxes": F.resize(target["boxes"], size)}


@dataclass(frozen=True)
class RandomCrop:
    """Cut out a region with sides between the two of `sides`, or as long as the image if that is shorter."""

    sides: tuple[int, int]

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        from torchvision.transforms.v2 import functional as F

        low, high = self.sides
        full = image.shape[-2:]
        height, width = (_random_integer(min(low, side), min(high, side)) for side in full)
        top, left = _random_integer(0, full[0] - height), _random_integer(0, full[1] - width)
        region = (top, left, height, width)
        return F.crop(image, *region), {**target, "boxes": F.crop(target["boxes"], *region)}


def finish_target(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Return plain tensors: boxes with an area, as cxcywh in fractions of the image, their labels, and `size`."""
    from torchvision.ops import box_convert
    from torchvision.transforms.v2 import functional as F

    height, width = image.shape[-2:]
    boxes = F.clamp_bounding_boxes(target["boxes"]).as_subclass(Tensor)  # a resize may round past the edge
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    fractions = box_convert(boxes[keep], "xyxy", "cxcywh") / torch.tensor([width, height, width, height])
    finished: Target = {**target, "boxes": fractions, "labels": target["labels"][keep], "size": (height, width)}
    return image.as_subclass(Tensor), finished


def _random_integer(low: int, high: int) -> int:
    """Return a random integer between two bounds, both included."""
    return int(torch.randint(low, high + 1, ()))
