"""Statistics of frozen BatchNorm from data, for a network without pretrained weights.

The statistics (0, 1) of a new FrozenBatchNorm2d describe no network at all: a residual network then grows from block to
block and does not train.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_backbone.backbone import BackboneBase, Joiner
from detr_backbone.errors import ConfigError, NumericsError
from detr_backbone.forward_pass import hooked
from detr_backbone.frozen_batch_norm import FrozenBatchNorm2d
from detr_backbone.nested_tensor import Images


@torch.no_grad()
def calibrate_frozen_batch_norm(backbone: BackboneBase | Joiner, batches: Iterable[Images]) -> int:
    """Give every FrozenBatchNorm2d of a backbone the statistics of data, in one pass, and return the images it took.

    Each layer normalises a batch by the batch's own statistics, as BatchNorm2d does in training, so that the layers
    after it see what they will see later; the statistics kept are the mean over the batches (BatchNorm2d with
    `momentum=None`). Padded cells do not count. The whole batch shares a pass, also where the backbone runs images by
    size: statistics of one image would say little about the others.

    Args:
        backbone: as built; its weights stay as they are.
        batches: batches of images as the backbone takes them; a few dozen images are enough.

    Raises:
        ConfigError: a batch gives a layer fewer than two cells.
        ValueError: no batch came, or the backbone has no frozen BatchNorm.
        NumericsError: a layer's statistics are not finite; the message names the layer.
    """
    base = backbone[0] if isinstance(backbone, Joiner) else backbone
    assert isinstance(base, BackboneBase)
    layers = {path: module for path, module in base.body.named_modules() if isinstance(module, FrozenBatchNorm2d)}
    if not layers:
        raise ValueError("`backbone` must hold a FrozenBatchNorm2d to calibrate, got none")
    sums = {path: torch.zeros(2, len(layer.weight), device=layer.weight.device) for path, layer in layers.items()}
    images = count = 0
    for batch in batches:
        padded = base.pad(batch)
        count += 1
        images += len(padded)
        # What has no stride is no map of the image, and has no padded cells.
        strides = base.input_strides if padded.is_padded else {}
        masks = {path: padded.at_stride(strides[path])[0] for path in layers if path in strides}
        with hooked(layers, after=partial(_normalise_by_batch, sums, masks)):
            base.forward_whole_batch(padded, folds=False)
    if not count:
        raise ValueError("`batches` must hold at least one batch, got none")
    _check_finite(sums)
    for path, layer in layers.items():
        mean, variance = sums[path] / count
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
    return images


def _normalise_by_batch(
    sums: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    path: str,
    layer: nn.Module,
    inputs: tuple[Any, ...],
    _: Any,
) -> Tensor:
    assert isinstance(layer, FrozenBatchNorm2d)
    (x,) = inputs
    channels_first = x.float().transpose(0, 1)
    cells = channels_first[:, ~masks[path]] if path in masks and x.ndim == 4 else channels_first.flatten(1)
    count = cells.shape[1]
    if count < 2:
        raise ConfigError(
            f"a batch must give a layer at least two valid cells to take statistics from, got {count}; calibrate with "
            "larger batches or images"
        )
    variance, mean = torch.var_mean(cells, dim=1)
    sums[path].add_(torch.stack([mean, variance]))
    biased = variance * ((count - 1) / count)  # BatchNorm normalises by the biased variance and keeps the unbiased one
    weight, bias = layer.weight.float(), layer.bias.float()
    return layer.activate(F.batch_norm(x, mean, biased, weight, bias, training=False, eps=layer.eps))


def _check_finite(sums: Mapping[str, Tensor]) -> None:
    for path, sum_ in sums.items():
        if not sum_.isfinite().all():
            raise NumericsError(f"statistics of {path!r} must be finite, got NaN or infinity: look at the images")
