"""Detections of a trained detector: over a dataset for COCO's numbers, or over any pictures."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors

from detr_backbone.coco.dataset import CocoDetection, Target
from detr_backbone.coco.evaluator import CocoEvaluator, CocoResult
from detr_backbone.coco.transforms import TransformConfig, make_transforms
from detr_backbone.detectors import PostProcess, build_detector
from detr_backbone.nested_tensor import nested_tensor_from_tensor_list
from detr_backbone.training.checkpoint import Checkpoint, load_model
from detr_backbone.training.config import DataConfig, TrainConfig, config_from_dict
from detr_backbone.training.data import Loader, eval_loader

Detections = dict[str, Tensor]
"""`scores` [M], `labels` [M] as the dataset's category ids, `boxes` [M, 4] xyxy in pixels of the original image."""


def detector_of(checkpoint: Checkpoint) -> tuple[nn.Module, TrainConfig]:
    """The trained detector of a checkpoint in eval mode, and the configuration it was trained with.

    Raises:
        CheckpointError: the weights are not those of the configuration.
    """
    config = config_from_dict(checkpoint.config)
    # The checkpoint holds every weight, so the pretrained file that training began with is not needed.
    backbone = replace(config.detector.backbone, weights=None)
    model = build_detector(replace(config.detector, backbone=backbone))
    load_model(checkpoint, model)
    return model.eval(), config


def evaluate(
    model: nn.Module, postprocess: PostProcess, dataset: CocoDetection, config: DataConfig, accelerator: Accelerator
) -> tuple[CocoResult, CocoEvaluator]:
    """COCO's numbers of a detector on a dataset, the same in every process, and the evaluator with all detections."""
    loader = eval_loader(dataset, config, world_size=accelerator.num_processes, rank=accelerator.process_index)
    evaluator = CocoEvaluator(dataset.annotations)
    rows = [torch.zeros(0, 7, dtype=torch.float64)]
    image_ids = [torch.zeros(0, 1, dtype=torch.float64)]
    for target, found in _detections(model, postprocess, loader, accelerator):
        image_id = torch.full((len(found["scores"]), 1), target["image_id"], dtype=torch.float64)
        columns = [image_id, found["labels"][:, None].cpu(), found["scores"][:, None].cpu(), found["boxes"].cpu()]
        rows.append(torch.cat([column.double() for column in columns], dim=1))
        image_ids.append(torch.tensor([[target["image_id"]]], dtype=torch.float64))
    everything = _gather(torch.cat(rows), accelerator)
    for image_id in _gather(torch.cat(image_ids), accelerator)[:, 0].tolist():
        mine = everything[everything[:, 0] == image_id]
        evaluator.update({int(image_id): {"labels": mine[:, 1].long(), "scores": mine[:, 2], "boxes": mine[:, 3:]}})
    return evaluator.compute(), evaluator


@torch.inference_mode()
def predict(
    model: nn.Module, postprocess: PostProcess, pictures: Iterable[Image.Image], config: TransformConfig
) -> Iterator[Detections]:
    """Detections of each picture, one picture at a time, on the detector's device."""
    transforms = make_transforms(config, train=False)
    device = next(model.parameters()).device
    for picture in pictures:
        size = (picture.height, picture.width)
        boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size)
        target = Target(boxes=boxes, labels=torch.zeros(0), image_id=0, orig_size=size, size=size)
        image, _ = transforms(tv_tensors.Image(picture), target)
        outputs = model(nested_tensor_from_tensor_list([image]).to(device))
        (found,) = postprocess(outputs, torch.tensor([size], device=device))
        yield {name: tensor.cpu() for name, tensor in found.items()}


@torch.inference_mode()
def _detections(
    model: nn.Module, postprocess: PostProcess, loader: Loader, accelerator: Accelerator
) -> Iterator[tuple[Target, Detections]]:
    model.eval()
    for images, targets in loader:
        with accelerator.autocast():
            outputs = model(images.to(accelerator.device, non_blocking=True))
        sizes = torch.tensor([target["orig_size"] for target in targets], device=accelerator.device)
        yield from zip(targets, postprocess(outputs, sizes), strict=True)


def _gather(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """The rows of all processes; float64 holds every id below 2^53 exactly."""
    if accelerator.num_processes == 1:
        return rows
    marked = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1).to(accelerator.device)
    padded = accelerator.pad_across_processes(marked, dim=0)
    gathered: Tensor = accelerator.gather(padded).cpu()
    return gathered[gathered[:, -1] == 1, :-1]


def picture_files(path: Path | str) -> list[Path]:
    """The pictures of a folder in the order of their names, or the one file itself.

    Raises:
        FileNotFoundError: there is no such file, or no picture in the folder.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    endings = Image.registered_extensions()
    files = sorted(file for file in path.glob("*") if file.suffix.lower() in endings)
    if not files:
        raise FileNotFoundError(f"no picture at {path}, expected a picture or a folder of pictures")
    return files
