"""A model as a graph: tensors in, tensors out, traced once for every batch size, height and width."""

import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from detr_backbone.backbone import BackboneBase, Joiner, fold_for_inference
from detr_backbone.errors import ExportError
from detr_backbone.export.metadata import Kind
from detr_backbone.nested_tensor import NestedTensor, Size

DETECTIONS = ("pred_logits", "pred_boxes")


class Graph(nn.Module):
    """The inference graph of a model: a copy of it, folded, that takes `images` and returns a tuple of tensors.

    Args:
        model: a BackboneBase, a Joiner, or a detector: a module with a Joiner in `backbone` that returns a dict with
            `pred_logits` and `pred_boxes`. It is not changed.
        masks: the graph takes `mask` [B, H, W], True on padding, too.

    Attributes:
        model: the copy in eval mode; of a Joiner, its backbone.
        kind: what the graph gives.
        outputs: names of its outputs: `level0`, … or those of a detector.

    Raises:
        ExportError: the model is none of these, or `masks` do not fit its padding.
    """

    def __init__(self, model: nn.Module, *, masks: bool) -> None:
        super().__init__()
        self.kind, backbone = _kind_of(model)
        _check_masks(self.kind, backbone, masks=masks)
        copied: Any = fold_for_inference(inference_copy(model))
        if getattr(copied, "aux_loss", False):
            copied.aux_loss = False  # predictions of earlier decoder layers are for training
        self.model: Any = copied[0] if isinstance(copied, Joiner) else copied
        self.masks = masks
        levels = tuple(f"level{index}" for index in range(len(backbone.strides)))
        self.outputs = DETECTIONS if self.kind == "detector" else levels

    @property
    def backbone(self) -> BackboneBase:
        """The BackboneBase in the copy."""
        return _kind_of(self.model)[1]

    def forward(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return levels [B, C, h, w], or `pred_logits` and `pred_boxes`, of `images` [B, C, H, W]."""
        results: Mapping[str, Any] = self.model(NestedTensor(images, mask))
        if self.kind == "detector":
            return tuple(results[name] for name in self.outputs)
        return tuple(level.tensors for level in results.values())


def inference_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model for inference in float32 on the CPU."""
    return copy.deepcopy(model).cpu().float().eval().requires_grad_(requires_grad=False)


def trace(graph: Graph, size: Size, in_channels: int) -> "torch.export.ExportedProgram":
    """Return the graph as torch.export gives it, for any batch size, height and width.

    Args:
        graph: what is traced.
        size: (H, W) of the example; no guard may hold for it alone.
        in_channels: C of the images.

    Raises:
        ExportError: the model's code does something that depends on the values of tensors, or serves some sizes only.
    """
    dynamic = torch.export.Dim.DYNAMIC
    inputs: dict[str, Tensor] = {"images": torch.randn(2, in_channels, *size)}
    shapes: dict[str, dict[int, Any]] = {"images": {0: dynamic, 2: dynamic, 3: dynamic}}
    if graph.masks:
        inputs["mask"] = torch.zeros(2, *size, dtype=torch.bool)
        inputs["mask"][1, :, size[1] * 3 // 4 :] = True
        shapes["mask"] = {0: dynamic, 1: dynamic, 2: dynamic}
    try:
        with torch.no_grad():
            return torch.export.export(graph, tuple(inputs.values()), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # of many kinds
        raise ExportError(
            f"model cannot be traced for every size | where: key=torch.export | got {first_line(error)} | fix: this "
            "network's own code computes with sizes in a way that torch.export does not follow; use it in PyTorch"
        ) from error


def sizes_against_guards(
    program: "torch.export.ExportedProgram", *, unit: int, in_channels: int, masks: bool
) -> list[tuple[int, int, int]]:
    """Return numbers and sizes of images (B, H, W) that break what torch.export took for granted of the example's.

    A .pt2 file refuses them; an ONNX file does not know of it, so that it must be tried. Images with one cell at the
    coarsest level are left out.

    Args:
        program: the traced graph.
        unit: pixels per cell of the coarsest level.
        in_channels: C of the images.
        masks: whether it takes masks.
    """
    guards = dict(program.module().named_children()).get("_guards_fn")
    if guards is None:
        return []
    sides = [unit + 1, 2 * unit - 1, 2 * unit, 3 * unit + 1, 8 * unit, 43 * unit - 1]
    against = []
    for batch, height, width in sorted(itertools.product((1, 2, 5), sides, sides), key=math.prod):
        inputs = [torch.empty(batch, in_channels, height, width, device="meta")]
        if masks:
            inputs.append(torch.empty(batch, height, width, dtype=torch.bool, device="meta"))
        try:
            guards(*inputs)
        except AssertionError:
            against.append((batch, height, width))
    return against


def least_size(program: "torch.export.ExportedProgram") -> Size:
    """Return the least (H, W) that a traced graph takes."""
    placeholder = next(node for node in program.graph.nodes if node.op == "placeholder" and node.name == "images")
    _, _, *sides = placeholder.meta["val"].shape
    ranges = program.range_constraints
    height, width = (int(ranges[side.node.expr].lower) if side.node.expr in ranges else 1 for side in sides)
    return height, width


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something, at most 300 characters, after its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" =")]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def _kind_of(model: nn.Module) -> tuple[Kind, BackboneBase]:
    if isinstance(model, BackboneBase):
        return "backbone", model
    kind: Kind = "joiner" if isinstance(model, Joiner) else "detector"
    joiner = model if isinstance(model, Joiner) else getattr(model, "backbone", None)
    if isinstance(joiner, Joiner) and isinstance(joiner[0], BackboneBase):
        return kind, joiner[0]
    raise ExportError(
        "`model` must be a BackboneBase, a Joiner or a detector with a Joiner as `backbone`, got "
        f"{type(model).__name__}"
    )


def _check_masks(kind: Kind, backbone: BackboneBase, *, masks: bool) -> None:
    if kind == "detector" and backbone.padding == "zeros" and not masks:
        raise ExportError(
            "`masks` must be True for a detector with padding='zeros', got False: an image's detections depend on the "
            "padding of its batch"
        )
    if masks and kind != "detector" and backbone.padding == "zeros":
        raise ExportError("`masks` must be False for a backbone with padding='zeros', got True: it reads no mask")
    if masks and backbone.batching == "by_size":
        raise ExportError(
            f"`masks` must be False for this network, got True: only images of one size are exact together: "
            f"{backbone.leak}"
        )
