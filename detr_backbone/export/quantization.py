"""Weights and activations in int8, calibrated on images, for OpenVINO."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from detr_backbone.errors import ExportError
from detr_backbone.export.engines import require
from detr_backbone.export.loading import load_exported
from detr_backbone.export.metadata import KEY, ExportMetadata, metadata_from_json
from detr_backbone.export.writing import files_of, library_versions, write_openvino


def quantize(
    source: Path | str,
    path: Path | str,
    images: Sequence[Tensor],
    *,
    measure: Callable[[nn.Module], Mapping[str, Any]],
    description: str,
) -> ExportMetadata:
    """Write an exported file in int8, with what that costs in its metadata, and return them.

    Ranges of activations are measured on `images` (post-training quantization, NNCF's `nncf.quantize` with
    `model_type=TRANSFORMER` and `preset=MIXED`): matrix products of attention stay as exact as they need, and
    activations that are not symmetric get ranges that are not. NNCF's defaults lose 8 AP on a small Deformable DETR.

    Args:
        source: a file of `export` for OpenVINO, .xml, in float32.
        path: .xml; the weights stand beside it in .bin.
        images: [C, h, w], normalised, as the model will see them; some hundred are enough.
        measure: takes what `load_exported` makes of the int8 file, and returns what the metadata are to say of its
            accuracy; where it raises, no file is left.
        description: of the images, for the metadata.

    Raises:
        ExportError: a file is no .xml, `source` is int8 already or takes masks, or a library is not installed.
    """
    source, path = Path(source), Path(path)
    for name, given in (("source", source), ("path", path)):
        if given.suffix != ".xml":
            raise ExportError(f"`{name}` must end in .xml for int8, which OpenVINO runs, got {given.name}")
    if not images:
        raise ExportError("`images` must hold at least one image for int8, got none")
    require("openvino", "nncf")
    import nncf
    import openvino

    model = openvino.Core().read_model(str(source))
    text = str(model.get_rt_info([KEY]).value) if model.has_rt_info([KEY]) else ""
    metadata = metadata_from_json(text, source=str(source))
    if metadata.precision != "float32" or metadata.masks:
        raise ExportError(
            f"`source` must be float32 without masks for int8, got {metadata.precision}, masks={metadata.masks}"
        )
    quantized = nncf.quantize(
        model,
        nncf.Dataset([image[None].contiguous().numpy() for image in images]),
        subset_size=len(images),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
    )
    calibration = {"images": len(images), "of": description, "nncf": nncf.__version__}
    metadata = replace(
        metadata, precision="int8", versions=library_versions(), quantization={"calibration": calibration}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        write_openvino(quantized, written, metadata)
        accuracy = dict(measure(load_exported(written)))
        metadata = replace(metadata, quantization={"calibration": calibration, "accuracy": accuracy})
        write_openvino(quantized, written, metadata)
        for file in files_of(written):
            file.replace(path.parent / file.name)
    return metadata
