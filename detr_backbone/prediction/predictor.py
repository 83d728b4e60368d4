"""A trained detector as a function: pictures in, scores, categories and boxes out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from detr_backbone.backbone import fold_for_inference
from detr_backbone.coco.dataset import Target
from detr_backbone.coco.images import read_image, to_rgb
from detr_backbone.coco.transforms import TransformConfig, make_transforms
from detr_backbone.detectors import PostProcess, build_postprocess
from detr_backbone.errors import ConfigError
from detr_backbone.export import EngineName, EnginePrecision, ExportedDetector
from detr_backbone.nested_tensor import Size, nested_tensor_from_tensor_list
from detr_backbone.training.exported import open_detector

Picture: TypeAlias = str | Path | Image.Image | npt.NDArray[np.uint8]
"""A file, a PIL image, or uint8 [h, w, 3] in RGB (OpenCV reads BGR: `array[..., ::-1]`) or [h, w] in grey."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """The M detections of a picture, best first, on the CPU.

    Attributes:
        scores: float32 [M], 0 to 1.
        category_ids: int64 [M], as in the dataset that the detector was trained on.
        boxes: float32 [M, 4], (x1, y1, x2, y2) in pixels of the picture, beyond which they may reach, as in DETR's
            evaluation; see `clipped`.
        names: of each one's category.
        size: (h, w) of the picture.
    """

    scores: Tensor
    category_ids: Tensor
    boxes: Tensor
    names: tuple[str, ...]
    size: Size

    def __len__(self) -> int:
        return len(self.names)

    def above(self, threshold: float) -> "Prediction":
        """Return the detections with at least this score."""
        count = int((self.scores >= threshold).sum())  # they are sorted
        parts = {key: getattr(self, key)[:count] for key in ("scores", "category_ids", "boxes", "names")}
        return replace(self, **parts)

    def clipped(self) -> "Prediction":
        """Return the detections with boxes that end at the edges of the picture."""
        height, width = self.size
        edges = torch.tensor([width, height, width, height], dtype=self.boxes.dtype)
        return replace(self, boxes=self.boxes.clamp(min=0).minimum(edges))


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A detector with all that turns pictures into what it takes and its outputs into detections.

    Attributes:
        model: the detector, in evaluation mode.
        postprocess: from its outputs to detections with the dataset's category ids.
        transforms: how pictures are resized and normalised; those of the evaluation are used.
        categories: category id -> name.
    """

    model: nn.Module
    postprocess: PostProcess
    transforms: TransformConfig
    categories: Mapping[int, str]

    def __call__(self, pictures: Iterable[Picture], *, batch_size: int = 1) -> Iterator[Prediction]:
        """Return the detections of each picture, in the order of the pictures, which are read as they are needed.

        Args:
            pictures: files, PIL images or arrays, also mixed.
            batch_size: pictures in one forward pass. With exact padding, the detections are the same for every number.

        Raises:
            DataError: a file cannot be read.
            TypeError, ValueError: an entry is no picture; the message names its index.
        """
        if isinstance(pictures, str | Path | Image.Image | np.ndarray):
            raise TypeError(f"`pictures` must be a list of pictures, got one {type(pictures).__name__}: [picture]")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
        read = (_as_image(picture, index) for index, picture in enumerate(pictures))
        return self._predict(read, batch_size)

    @torch.inference_mode()
    def _predict(self, images: Iterator[Image.Image], batch_size: int) -> Iterator[Prediction]:
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        while batch := list(islice(images, batch_size)):
            inputs = [model_input(image, self.transforms) for image in batch]
            outputs = self.model(nested_tensor_from_tensor_list(inputs).to(device))
            sizes = torch.tensor([(image.height, image.width) for image in batch], device=device)
            for image, detections in zip(batch, self.postprocess(outputs, sizes), strict=True):
                yield self._prediction(detections, (image.height, image.width))

    def _prediction(self, detections: Mapping[str, Tensor], size: Size) -> Prediction:
        order = detections["scores"].argsort(descending=True, stable=True)
        scores, labels, boxes = (detections[key][order].cpu() for key in ("scores", "labels", "boxes"))
        return Prediction(
            scores=scores,
            category_ids=labels,
            boxes=boxes,
            names=tuple(self.categories[label] for label in labels.tolist()),
            size=size,
        )


def load_predictor(
    checkpoint: Path | str,
    *,
    device: torch.device | str | None = None,
    engine: EngineName | None = None,
    threads: int | None = None,
    precision: EnginePrecision = "float32",
    overrides: Sequence[str] = (),
) -> Predictor:
    """Return the trained detector of a checkpoint or of an exported file, ready for pictures.

    Args:
        checkpoint: the file that training wrote, or that `export_checkpoint` made of it, or a published detector, as
            `read_detector` takes it.
        device: where it runs; a GPU if there is one, if left out. Exported files run on the CPU.
        engine: see `load_exported`; for exported files only, as are `threads` and `precision`.
        threads: see `load_exported`.
        precision: see `load_exported`.
        overrides: words of a command line that change its configuration, as ["--data.transforms.eval_size", "640"].

    Raises:
        CheckpointError: the file is damaged, no such checkpoint, or does not fit the overrides.
        ConfigError: an override is no key, or does not fit it.
        ExportError, WeightsError: an exported file or a published detector cannot be run.
    """
    model, config, categories = open_detector(
        checkpoint, engine=engine, threads=threads, precision=precision, overrides=overrides
    )
    if not isinstance(model, ExportedDetector):
        fold_for_inference(model).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    elif torch.device(device or "cpu").type != "cpu":
        raise ConfigError(f"`device` must be cpu for an exported file, got {device}")
    return Predictor(
        model=model,
        postprocess=build_postprocess(config.detector, category_ids=tuple(categories)),
        transforms=config.data.transforms,
        categories=categories,
    )


def model_input(picture: Image.Image, config: TransformConfig) -> Tensor:
    """Return a picture as a detector takes it in evaluation, float32 [3, h, w]: resized and normalised."""
    from torchvision import tv_tensors

    size = (picture.height, picture.width)
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size)
    target = Target(boxes=boxes, labels=torch.zeros(0), image_id=0, orig_size=size, size=size)
    image: Tensor
    image, _ = make_transforms(config, train=False)(tv_tensors.Image(picture), target)
    return image


def _as_image(picture: Any, index: int) -> Image.Image:
    if isinstance(picture, str | Path):
        return read_image(picture)
    if isinstance(picture, Image.Image):
        try:
            return to_rgb(ImageOps.exif_transpose(picture))
        except ValueError as error:
            raise ValueError(f"`pictures[{index}]` cannot be taken as RGB: {error}") from error
    kinds = "a path, a PIL image, or a uint8 array [h, w, 3] in RGB or [h, w]"
    if not isinstance(picture, np.ndarray):
        raise TypeError(f"`pictures[{index}]` must be {kinds}, got {type(picture).__name__}")
    if picture.dtype != np.uint8 or (picture.ndim, *picture.shape[2:]) not in ((2,), (3, 3)) or 0 in picture.shape:
        raise ValueError(f"`pictures[{index}]` must be {kinds}, got {picture.dtype} {list(picture.shape)}")
    return Image.fromarray(np.ascontiguousarray(picture)).convert("RGB")
