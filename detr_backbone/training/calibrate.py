"""What the backbone of a new run starts from."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from detr_backbone.calibration import calibrate_frozen_batch_norm
from detr_backbone.coco.dataset import CocoDetection
from detr_backbone.detectors import DETR, DeformableDETR
from detr_backbone.frozen_batch_norm import FrozenBatchNorm2d
from detr_backbone.nested_tensor import NestedTensor
from detr_backbone.training.config import TrainConfig
from detr_backbone.training.data import train_loader

MOST_AT_ONCE = 16


def needs_calibration(model: DETR | DeformableDETR) -> bool:
    """Return whether the backbone has frozen BatchNorm without the statistics of pretrained weights."""
    has_frozen = any(isinstance(module, FrozenBatchNorm2d) for module in model.backbone.modules())
    return has_frozen and model.backbone[0].weights is None


def calibrate(
    model: DETR | DeformableDETR, config: TrainConfig, dataset: CocoDetection, *, images_per_step: int
) -> int:
    """Give frozen BatchNorm the statistics of training images, and return how many it took.

    Every process takes the same images in the same batches, so that their number changes nothing.

    Args:
        model: the detector.
        config: of the run.
        dataset: the training split.
        images_per_step: images of one step over all processes; as many share a batch here, but at most 16.
    """
    one_process = replace(config.data, batch_size=min(images_per_step, MOST_AT_ONCE))
    loader, batches = train_loader(dataset, one_process, seed=config.seed)
    batches.start(epoch=0)

    def images() -> Iterator[NestedTensor]:
        device, left = next(model.parameters()).device, config.calibration_images
        for batch, _ in loader:
            yield batch.to(device)
            left -= len(batch)
            if left <= 0:
                return

    torch.manual_seed(config.seed)
    return calibrate_frozen_batch_norm(model.backbone, images())


def describe_start(model: DETR | DeformableDETR, *, calibrated: int) -> str:
    """Return what the backbone of a new run starts from, in one line."""
    if model.backbone[0].weights is not None:
        return f"backbone: {model.backbone[0].weights}"
    if calibrated:
        return f"backbone: random weights, frozen BatchNorm took its statistics from {calibrated} training images"
    if needs_calibration(model):
        return "backbone: random weights, and frozen BatchNorm without statistics: expect it not to train"
    return "backbone: random weights"
