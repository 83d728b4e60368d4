"""Weights written under the names of another library."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from detr_backbone.checkpoints.layouts import DetectorLayout, Names, find_detector_layout, from_original, to_original
from detr_backbone.errors import WeightsError
from detr_backbone.weights.resnet_keys import ResNetLayout, find_layout, from_torchvision, to_torchvision


def convert_weights(
    tensors: Mapping[str, Tensor], *, names: Names = "original", resnet: ResNetLayout = "torchvision"
) -> tuple[str, dict[str, Tensor]]:
    """Return the layout of some weights, and the weights under other names.

    Args:
        tensors: of a detector, or of a ResNet alone.
        names: the names wanted for a detector; a ResNet alone has only those of `resnet`.
        resnet: the names wanted for the ResNet.

    Raises:
        WeightsError: the names are those of no layout that is known.
    """
    try:
        layout = find_detector_layout(tensors)
    except WeightsError:
        resnet_layout = find_layout(tensors)
        renamed = to_torchvision(tensors, resnet_layout)
        if not any(re.search(r"(^|\.)layer1\.0\.conv1\.weight$", key) for key in renamed):
            raise WeightsError(
                f"weights must be of DETR, Deformable DETR or a ResNet under names that are known, got {len(tensors)} "
                f"tensors such as {next(iter(tensors), None)!r}"
            ) from None
        return f"{resnet_layout} names", from_torchvision(renamed, resnet)
    return str(layout), from_original(to_original(tensors, layout), DetectorLayout(names=names, resnet=resnet))


def write_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors into a file, as safetensors where it ends so; at every moment it is whole, old or new.

    Tensors that share memory are written once each, as safetensors wants them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    content = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(content, partial, metadata={"format": "pt"})
        else:
            torch.save(content, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
