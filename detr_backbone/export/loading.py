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
from detr_backbone.nested_tensor import Images, NestedTensor, Size, as_nested_tensor
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

    def _batch(self, images: Images, sizes: Sequence[Size] | None) -> NestedTensor:
        batch = as_nested_tensor(images, sizes)
        channels, device = batch.tensors.shape[1], batch.tensors.device
        if channels != self.metadata.in_channels:
            raise ValueError(f"`images` must have {self.metadata.in_channels} channels, got {channels}")
        if device.type != "cpu":
            raise ValueError(f"`images` must be on the CPU, where exported files run, got {device}")
        return batch

    def _run(self, batch: NestedTensor) -> list[Tensor]:
        """Return the outputs of one pass over a batch, which is not padded where the graph takes no mask."""
        for side, least, got in zip("HW", self.metadata.min_size, batch.tensors.shape[-2:], strict=True):
            if got < least:
                raise ValueError(f"`images` must be at least {least} pixels in {side} for this file, got {got}")
        images = batch.tensors.to(torch.float32)
        return self._run_engine([images, batch.mask] if self.metadata.masks else [images])


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

    def forward(self, images: Images, sizes: Sequence[Size] | None = None) -> dict[str, NestedTensor]:
        """Return levels [B, C, h, w] with their masks under "0", "1", …, finest first; h = ceil(H / stride)."""
        batch = self._batch(images, sizes)
        if self.padding == "zeros" or self.metadata.masks or not batch.is_padded:
            return self._levels(batch)
        from detr_backbone.padding.by_size import run_by_size  # it loads torch's compiler

        return run_by_size(self._levels, batch, self.strides, 1)

    def _levels(self, batch: NestedTensor) -> dict[str, NestedTensor]:
        return {
            str(index): feature_level(level, batch, stride=stride, padding=self.padding)
            for index, (level, stride) in enumerate(zip(self._run(batch), self.strides, strict=True))
        }


class ExportedDetector(_Exported):
    """An exported detector: images in, `pred_logits` and `pred_boxes` out.

    Attributes:
        metadata: what the file says of itself.
    """

    def forward(self, images: Images, sizes: Sequence[Size] | None = None) -> dict[str, Any]:
        """Return `pred_logits` [B, Q, K] and `pred_boxes` [B, Q, 4], cxcywh as fractions of the image."""
        batch = self._batch(images, sizes)
        outputs = self._run(batch) if self.metadata.masks or not batch.is_padded else self._run_by_size(batch)
        return dict(zip(self.metadata.outputs, outputs, strict=True))

    def _run_by_size(self, batch: NestedTensor) -> list[Tensor]:
        from detr_backbone.padding.by_size import group_by_size

        groups = group_by_size(batch, 1)
        order = torch.tensor([index for group in groups for index in group.indices]).argsort()
        return [torch.cat(part)[order] for part in zip(*(self._run(group.images) for group in groups), strict=True)]
