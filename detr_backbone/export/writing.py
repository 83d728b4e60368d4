"""Exporting: trace, write, run what was written beside the model, and keep it only if both agree."""

import contextlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detr_backbone.errors import ExportError
from detr_backbone.export.engines import ENGINES, require
from detr_backbone.export.graph import Graph, first_line, inference_copy, least_size, sizes_against_guards, trace
from detr_backbone.export.loading import load_exported
from detr_backbone.export.metadata import KEY, ExportMetadata, hash_of_weights, position_encoding_to_dict
from detr_backbone.export.self_check import largest_differences, smallest_scale
from detr_backbone.networks.input_channels import first_convolution

OPSET = 20
"""Of ONNX files: ONNX Runtime 1.17 and OpenVINO 2024.0 read it."""
TOLERANCE = 1e-4
_MOST_TRIED = 4  # sizes beside those of every check


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote and how it was checked.

    Attributes:
        path: the file.
        metadata: what it says of itself.
        differences: engine and batch -> the largest difference from the model, relative to the larger of 1 and the
            output's largest value.
    """

    path: Path
    metadata: ExportMetadata
    differences: Mapping[str, float]

    def __str__(self) -> str:
        """Return the report as lines of text."""
        size = sum(file.stat().st_size for file in files_of(self.path)) / 2**20
        lines = [f"{self.path}: {self.metadata.kind}, {size:.1f} MiB, difference from the model"]
        lines += [f"  {value:.1e}  {name}" for name, value in self.differences.items()]
        lines += [f"  refused  {engine}: {reason}" for engine, reason in self.metadata.failed_engines.items()]
        return "\n".join(lines)


def export(
    model: nn.Module,
    path: Path | str,
    *,
    masks: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    categories: Mapping[int, str] | None = None,
    config: Mapping[str, Any] | None = None,
    opset_version: int = OPSET,
    tolerance: float = TOLERANCE,
) -> ExportReport:
    """Write a model for inference without this package's code, check the file, and return the report.

    The graph takes `images` [B, C, H, W], float32 and normalised, of any batch size, height and width, and returns
    `level0`, `level1`, … [B, C, h, w], finest first, or a detector's `pred_logits` [B, Q, K] and `pred_boxes`
    [B, Q, 4], cxcywh as fractions of the image. Masks and position encodings of a Joiner are left to `load_exported`.

    The written file runs in each engine that is installed for it, through `load_exported`, on six batches (one image
    and several, odd sides, padded). Where a value differs from the model's by more than `tolerance`, the file is
    refused in that engine; where no engine agrees with the model, no file is left.

    Args:
        model: a BackboneBase, a Joiner, or a detector: a module with a Joiner as `backbone` whose outputs are a dict
            with `pred_logits` and `pred_boxes`. It is not changed.
        path: .onnx (needs `detr_backbone[onnx]`), .xml for OpenVINO (`detr_backbone[openvino]`; the weights stand
            beside it in .bin), or .pt2 of torch.export. An existing file is replaced.
        masks: the graph takes `mask` [B, H, W] too, True on padding, and whole padded batches. Without it, images of
            one size go through it together; where padding is exact, that gives the same and is faster.
        mean: of each channel, what images are normalised with.
        std: likewise.
        categories: id -> name of each label of a detector, in their order.
        config: what the model was built from, as plain dicts, lists, numbers and strings.
        opset_version: of ONNX.
        tolerance: largest difference from the model, divided by the larger of 1 and the output's largest value.

    Raises:
        ExportError: the file would not give what the model gives, the model cannot be traced, an option does not fit
            it, or a library is not installed.
    """
    path = Path(path)
    if path.suffix not in ENGINES:
        raise ExportError(f"`path` must end in {', '.join(ENGINES)}, got {path.name}")
    if path.suffix != ".pt2":
        require(
            "onnxruntime" if path.suffix == ".onnx" else "openvino", "onnx", "onnxscript"
        )  # an extra may bring more
    graph = Graph(model, masks=masks)
    in_channels = first_convolution(graph.backbone.body)[1].in_channels
    encoding = position_encoding_to_dict(model[1]) if graph.kind == "joiner" else None  # type: ignore[index]
    reference = inference_copy(model)
    stride = max(getattr(model, "strides", graph.backbone.strides))
    unit = stride * smallest_scale(reference, unit=stride, in_channels=in_channels)
    program = trace(graph, (3 * unit + 1, 4 * unit + 3), in_channels)
    against = sizes_against_guards(program, unit=unit, in_channels=in_channels, masks=masks)
    if against and path.suffix == ".pt2":
        batch, height, width = against[0]
        raise ExportError(
            f"graph serves some sizes only | where: file={path} key=torch.export | got a refusal of {batch} x {height} "
            f"x {width} | fix: export to .onnx, where such sizes are tried, or use the model in PyTorch"
        )
    metadata = ExportMetadata(
        kind=graph.kind,
        outputs=graph.outputs,
        masks=masks,
        padding=graph.backbone.padding,
        in_channels=in_channels,
        min_size=least_size(program) if path.suffix == ".pt2" else (1, 1),
        strides=graph.backbone.strides,
        channels=graph.backbone.channels,
        position_encoding=encoding,
        mean=None if mean is None else tuple(mean),
        std=None if std is None else tuple(std),
        categories=dict(categories or {}),
        config=config,
        opset=opset_version if path.suffix != ".pt2" else None,
        versions=library_versions(),
        weights_sha256=hash_of_weights(model),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        _write(program, written, metadata)
        differences, failed = _check(
            written,
            reference,
            unit=unit,
            in_channels=in_channels,
            tolerance=tolerance,
            others=against[:_MOST_TRIED],
        )
        if not differences:
            reasons = "; ".join(f"{engine}: {reason}" for engine, reason in failed.items())
            raise ExportError(
                f"exported file differs from the model, and is not kept | where: file={path} | got {reasons} "
                f"expected a difference of at most {tolerance:.1e} | fix: use another format, or the model in "
                "PyTorch"
            )
        if failed:
            metadata = replace(metadata, failed_engines=failed)
            _write(program, written, metadata)
        for file in files_of(written):
            file.replace(path.parent / file.name)
    return ExportReport(path, metadata, differences)


def write_openvino(model: Any, path: Path, metadata: ExportMetadata) -> None:
    """Write an OpenVINO model with its metadata, in float32, as .xml and .bin."""
    import openvino

    model.set_rt_info(metadata.to_json(), [KEY])
    openvino.save_model(model, str(path), compress_to_fp16=False)


def _write(program: "torch.export.ExportedProgram", path: Path, metadata: ExportMetadata) -> None:
    if path.suffix == ".pt2":
        with warnings.catch_warnings():  # of weights in channels_last, of devices other than the CPU
            warnings.filterwarnings("ignore", message="No complete tensor found in the group")
            torch.export.save(program, path, extra_files={f"{KEY}.json": metadata.to_json()})
        return
    onnx = path.with_suffix(".onnx")
    _write_onnx(program, onnx, metadata)
    if path.suffix == ".xml":
        import openvino

        write_openvino(openvino.Core().read_model(str(onnx)), path, metadata)
        onnx.unlink()


def _write_onnx(program: "torch.export.ExportedProgram", path: Path, metadata: ExportMetadata) -> None:
    inputs = ["images", "mask"] if metadata.masks else ["images"]
    optimizer = logging.getLogger("onnxscript.optimizer")  # it warns of every operator that it leaves as it is
    level = optimizer.level
    try:
        optimizer.setLevel(logging.ERROR)
        onnx: Any = torch.onnx.export(
            program,
            dynamo=True,
            input_names=inputs,
            output_names=list(metadata.outputs),
            opset_version=metadata.opset,
            verbose=False,
        )
    except Exception as error:  # of many kinds
        raise ExportError(
            f"model cannot be written as ONNX | where: key=torch.onnx.export | got {first_line(error)} | fix: export "
            "to .pt2, or use the model in PyTorch"
        ) from error
    finally:
        optimizer.setLevel(level)
    onnx.model.metadata_props[KEY] = metadata.to_json()
    onnx.save(str(path), external_data=False)


def _check(
    path: Path,
    reference: nn.Module,
    *,
    unit: int,
    in_channels: int,
    tolerance: float,
    others: Sequence[tuple[int, int, int]],
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the differences of the engines that agree with the model, and why each other one does not."""
    agreed: dict[str, float] = {}
    failed: dict[str, str] = {}
    for engine in ENGINES[path.suffix]:
        if importlib.util.find_spec(engine) is None:
            continue
        try:
            exported = load_exported(path, engine=engine)
            differences = largest_differences(reference, exported, unit=unit, in_channels=in_channels, others=others)
        except Exception as error:  # of many kinds
            failed[engine] = first_line(error)
            continue
        worst = max(differences, key=differences.__getitem__)
        if differences[worst] > tolerance:
            failed[engine] = f"{differences[worst]:.1e} in {worst}"
        else:
            agreed |= {f"{engine}, {batch}": value for batch, value in differences.items()}
    return agreed, failed


def files_of(path: Path) -> list[Path]:
    """Return the files that make up an exported file; the one to load comes last."""
    return [path.with_suffix(".bin"), path] if path.suffix == ".xml" else [path]


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that take part in an export, of those that are installed."""
    versions = {}
    for name in ("detr_backbone", "torch", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
