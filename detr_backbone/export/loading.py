"""Exported files behind the interface of the models that they were made from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from detr_backbone.backbone import BackboneBase, Joiner
from detr_backbone.errors import ExportError
from detr_backbone.export.engines import Engine, EngineName, EnginePrecision, open_engine
from detr_backbone.export.metadata import position_encoding_from_dict
from detr_backbone.nested_tensor import NestedTensor, Size, as_nested_tensor
from detr_backbone.padding.exact import feature_level


def load_exported(
    path: Path | str,
    *,
    engine: EngineName | None = None,
    threads: int | None = None,
    precision: EnginePrecision = "float32",
) -> "Joiner | ExportedBackbone | ExportedDetector":
    """Return what a file of `export` holds, with the interface of the model that it was made from.

    Args:
        path: a file of `export`, ending in .onnx, .xml or .pt2. Load only files that you trust.
        engine: "onnxruntime" runs .onnx, "openvino" .xml and .onnx, "torch" .pt2; None takes the first that fits.
        threads: threads that one pass uses; None for what the engine takes by itself, in general one for each core.
        precision: "bf16" lets OpenVINO compute in bfloat16, on a processor that has instructions for it.

    Returns:
        A Joiner (`features, positions = joiner(images)`), a backbone (levels under "0", "1", …), or a detector (a dict
        with `pred_logits`, `pred_boxes`), for inference on the CPU. Its `.metadata` say what it was made from; those of
        a Joiner are its backbone's, `joiner[0].metadata`.

    Raises:
        ExportError: the engine does not run such files or is not installed, an option does not fit it, or the file is
            damaged or none of `export`'s.
        FileNotFoundError: there is no such file.
    """
    opened = open_engine(Path(path), engine, threads=threads, precision=precision)
    if opened.metadata.kind == "detector":
        return ExportedDetector(opened)
    backbone = ExportedBackbone(opened)
    encoding = opened.metadata.position_encoding
    if encoding is None:
        return backbone
    return Joiner(cast(BackboneBase, backbone), position_encoding_from_dict(encoding)).eval()


class _Exported(nn.Module):
    """What backbones and detectors share: which images go through the graph together."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.metadata = engine.metadata
        self._run_engine = engine.run
        self.eval()

    def train(self, mode: bool = True) -> "_Exported":
        """Stay in eval mode.

        Raises:
            ExportError: `mode` is True; an exported graph cannot be trained.
        """
        if mode:
            raise ExportError("an exported file is for inference, got train(True); train the model and export it again")
        return super().train(mode=False)

    def _batch(self, images: NestedTensor | Sequence[Tensor] | Tensor) -> NestedTensor:
        batch = as_nested_tensor(images)
        channels, device = batch.tensors.shape[1], batch.tensors.device
        if channels != self.metadata.in_channels:
            raise ValueError(f"`images` must have {self.metadata.in_channels} channels, got {channels}")
        if device.type != "cpu":
            raise ValueError(f"`images` must be on the CPU, where exported files run, got {device}")
        return batch

    def _run(self, images: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Outputs of one pass over `images` [B, C, H, W], which have one size where there is no `mask`."""
        for side, least, got in zip("HW", self.metadata.min_size, images.shape[-2:], strict=True):
            if got < least:
                raise ValueError(f"`images` must be at least {least} pixels in {side} for this file, got {got}")
        images = images.to(torch.float32)
        return self._run_engine([images] if mask is None else [images, mask])


class ExportedBackbone(_Exported):
    """An exported backbone: images in, feature levels with masks out, as `BackboneBase` gives them.

    Where padding is exact and the graph takes no mask, images of equal size go through it together, without padding.

    Attributes:
        metadata: what the file says of itself.
        strides, channels: one entry per level, finest first.
        num_channels: channels of the coarsest level.
        padding: "exact" or "zeros".
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.strides = self.metadata.strides
        self.channels = self.metadata.channels
        self.num_channels = self.channels[-1]
        self.padding = self.metadata.padding

    def forward(self, images: NestedTensor | Sequence[Tensor] | Tensor) -> dict[str, NestedTensor]:
        """Return levels [B, C, h, w] with their masks under "0", "1", …, finest first; h = ceil(H / stride)."""
        batch = self._batch(images)
        if self.metadata.masks:
            maps = self._run(batch.tensors, batch.mask)
        elif self.padding == "zeros" or not batch.is_padded:
            maps = self._run(batch.tensors)
        else:
            maps = self._run_by_size(batch)
        return {
            str(index): feature_level(level, batch, stride=stride, padding=self.padding)
            for index, (level, stride) in enumerate(zip(maps, self.strides, strict=True))
        }

    def _run_by_size(self, batch: NestedTensor) -> list[Tensor]:
        height, width = batch.tensors.shape[-2:]
        maps = [
            torch.zeros(len(batch), channels, -(-height // stride), -(-width // stride))
            for channels, stride in zip(self.channels, self.strides, strict=True)
        ]
        for (h, w), indices in indices_by_size(batch.sizes).items():
            for level, own in zip(maps, self._run(batch.tensors[indices, :, :h, :w]), strict=True):
                level[indices, :, : own.shape[2], : own.shape[3]] = own
        return maps


class ExportedDetector(_Exported):
    """An exported detector: images in, `pred_logits` and `pred_boxes` out.

    Attributes:
        metadata: what the file says of itself.
    """

    def forward(self, images: NestedTensor | Sequence[Tensor] | Tensor) -> dict[str, Any]:
        """Return `pred_logits` [B, Q, K] and `pred_boxes` [B, Q, 4], cxcywh as fractions of the image."""
        batch = self._batch(images)
        if self.metadata.masks:
            outputs = self._run(batch.tensors, batch.mask)
        elif not batch.is_padded:
            outputs = self._run(batch.tensors)
        else:
            outputs = self._run_by_size(batch)
        return dict(zip(self.metadata.outputs, outputs, strict=True))

    def _run_by_size(self, batch: NestedTensor) -> list[Tensor]:
        groups = indices_by_size(batch.sizes)
        parts = [self._run(batch.tensors[indices, :, :h, :w]) for (h, w), indices in groups.items()]
        order = torch.tensor([index for indices in groups.values() for index in indices]).argsort()
        return [torch.cat(part)[order] for part in zip(*parts, strict=True)]


def indices_by_size(sizes: Sequence[Size]) -> dict[Size, list[int]]:
    """Return the indices of the images of each size.

    >>> indices_by_size([(64, 96), (80, 80), (64, 96)])
    {(64, 96): [0, 2], (80, 80): [1]}
    """
    groups: dict[Size, list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    return groups
