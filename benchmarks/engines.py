"""Deployed models as contenders: ours folded for inference, and our exported files in ONNX Runtime and OpenVINO.

A file is written once for each model, by the first process that needs it, into the folder that `exported_files` makes.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import torch
from peers import Case, Run, build_ours
from torch import nn

from detr_backbone import fold_for_inference
from detr_backbone.export import EngineName, EnginePrecision, export, load_exported, quantize

FOLDER = "DETR_BACKBONE_EXPORTED_FILES"
"""The environment variable that tells the processes of contenders where the files are."""


@contextmanager
def exported_files() -> Iterator[None]:
    """Within this context, processes that are started share their exported files, which are deleted in the end."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        try:
            yield
        finally:
            del os.environ[FOLDER]


def engine(case: Case, precision: str, *, name: EngineName) -> Run:
    """Return a run of our exported file, with as many threads as torch has here."""
    path = _file(case, int8=precision == "int8") if name == "openvino" else _file(case, ending=".onnx")
    computes: EnginePrecision = "bf16" if precision == "bf16" else "float32"
    loaded = load_exported(path, engine=name, threads=torch.get_num_threads(), precision=computes)
    return _inference(cast(nn.Module, loaded), case)


def folded(case: Case, precision: str) -> Run:
    """Return a run of ours in PyTorch, folded for inference in the precision."""
    model = fold_for_inference(build_ours(case), dtype=torch.bfloat16 if precision == "bf16" else None).to(case.device)
    return _inference(model.requires_grad_(False), case)  # torch's counter of operations asks for gradients otherwise


def _inference(model: nn.Module, case: Case) -> Run:
    images = case.batch()

    def run() -> None:
        with torch.inference_mode():
            model(images)

    return run


def _file(case: Case, *, ending: str = ".xml", int8: bool = False) -> Path:
    detector = case.kind if "detr" in case.kind else "backbone"
    stem = f"{detector}-{case.network}-{case.levels}"
    path = Path(os.environ[FOLDER]) / f"{stem}{'-int8' if int8 else ''}{ending}"
    if path.exists():
        return path
    if int8:  # speed does not depend on what it is calibrated on
        noise = [torch.randn(3, 256, 320) for _ in range(8)]
        quantize(_file(case), path, noise, measure=lambda _: {}, description="noise")
    else:
        export(build_ours(case), path)
    return path


ENGINES: dict[str, Callable[[Case, str], Run]] = {
    "ours, folded": folded,
    "onnxruntime": partial(engine, name="onnxruntime"),
    "openvino": partial(engine, name="openvino"),
}
PRECISIONS = {"onnxruntime": ("float32",), "openvino": ("float32", "bf16", "int8"), "matmul": ("float32", "bf16")}
"""What each of them, and the product of matrices, computes in; all other contenders compute in float32 and bf16."""
