"""Which models export to which formats, and how far a file is from its model: python benchmarks/export_matrix.py.

Every cell is the largest difference, relative to the larger of 1 and the output's largest value, over the six batches
of `export`'s self-check, or why there is no file. docs/deploy.md holds the table.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from detr_backbone import BackboneConfig, PositionEncodingConfig, build_backbone
from detr_backbone.commands.command_line import Command
from detr_backbone.detectors import DetectorConfig, build_detector
from detr_backbone.errors import DetrBackboneError
from detr_backbone.export import export
from detr_backbone.pyramid import PyramidConfig

STAGES = ("layer1", "layer2", "layer3", "layer4")
ENDINGS = {"onnxruntime": ".onnx", "openvino": ".xml", "torch": ".pt2"}
"""Engine -> the format that is written for it."""


def backbone(
    name: str, return_layers: tuple[str, ...] | None = None, pyramid: PyramidConfig | None = None
) -> Callable[[], nn.Module]:
    """Return what builds a Joiner with random weights."""
    config = BackboneConfig(name=name, return_layers=return_layers, train_layers=(), pyramid=pyramid)
    return lambda: build_backbone(config)


def detector(
    name: Literal["detr", "deformable_detr"],
    *,
    network: str = "resnet50",
    layers: int = 6,
    two_stage: bool = False,
    padding: Literal["exact", "zeros"] = "exact",
) -> Callable[[], nn.Module]:
    """Return what builds a detector with random weights, as published: two-stage with box refinement."""
    deformable = name == "deformable_detr"
    config = DetectorConfig(
        name=name,
        num_classes=91,
        enc_layers=layers,
        dec_layers=layers,
        num_queries=300 if deformable else 100,
        with_box_refine=two_stage,
        two_stage=two_stage,
        num_feature_levels=4 if deformable else None,
        backbone=BackboneConfig(
            name=network,
            padding=padding,
            return_layers=STAGES[1:] if deformable else STAGES[3:],
            position_encoding=PositionEncodingConfig(offset=-0.5 if deformable else 0.0),
        ),
    )
    return lambda: build_detector(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "ResNet-18, one level": (backbone("resnet18", STAGES[3:]), False),
    "ResNet-18, four levels": (backbone("resnet18", STAGES), False),
    "ResNet-50, one level": (backbone("resnet50", STAGES[3:]), False),
    "ResNet-50, four levels": (backbone("resnet50", STAGES), False),
    "ResNet-50, four levels, masks": (backbone("resnet50", STAGES), True),
    "ConvNeXt-T": (backbone("convnext_tiny"), False),
    "SE-ResNet-50 (timm)": (backbone("timm/seresnet50"), False),
    "ViT-S/16 (timm), a pyramid of four levels": (
        backbone("timm/vit_small_patch16_224", pyramid=PyramidConfig(strides=(8, 16, 32, 64))),
        False,
    ),
    "DETR, ResNet-50": (detector("detr"), False),
    "DETR, ResNet-50, masks": (detector("detr"), True),
    "DETR, ResNet-50, zeros as padding, masks": (detector("detr", padding="zeros"), True),
    "Deformable DETR, ResNet-50": (detector("deformable_detr"), False),
    "Deformable DETR, ResNet-50, masks": (detector("deformable_detr"), True),
    "Deformable DETR, ResNet-50, two-stage": (detector("deformable_detr", two_stage=True), False),
}
"""Row -> what builds the model, and whether its graph takes masks."""


def main(*, only: str = "", output: str | None = None) -> None:
    """Export every model to every format and write the largest differences as a Markdown table.

    Args:
        only: rows whose name contains this.
        output: the file of the table; printed only, if left out.
    """
    lines = [f"| model | {' | '.join(ENDINGS)} |", f"|---|{'---|' * len(ENDINGS)}"]
    print("\n".join(lines), flush=True)
    for name, (build, masks) in MODELS.items():
        if only in name:
            lines.append(f"| {name} | {' | '.join(cells(build, masks=masks))} |")
            print(lines[-1], flush=True)
            if output is not None:
                Path(output).write_text("\n".join(lines) + "\n", encoding="utf-8")


def cells(build: Callable[[], nn.Module], *, masks: bool) -> list[str]:
    """Return one row: for each engine the largest difference, or why there is no file."""
    torch.manual_seed(0)
    try:
        model = build()
    except DetrBackboneError as error:
        return [f"not built: {error}"] * len(ENDINGS)
    row = []
    with tempfile.TemporaryDirectory() as folder:
        for engine, ending in ENDINGS.items():
            try:
                differences = export(model, Path(folder) / f"model{ending}", masks=masks).differences
                row.append(f"{max(value for key, value in differences.items() if key.startswith(engine)):.1e}")
            except DetrBackboneError as error:
                row.append(f"refused: {error}".replace("|", "/"))
    return row


if __name__ == "__main__":
    EXAMPLE = "python benchmarks/export_matrix.py --only DETR"
    sys.exit(Command(name="python benchmarks/export_matrix.py", main=main, example=EXAMPLE).run(sys.argv[1:]))
