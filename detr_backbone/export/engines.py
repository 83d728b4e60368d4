"""Engines that run an exported file on a CPU: arrays in, arrays out.

Each takes the file's bytes, so that no file that it names is read with it (an ONNX file can name others).
"""

import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from detr_backbone.errors import ExportError, unknown_name
from detr_backbone.export.metadata import KEY, ExportMetadata, metadata_from_json

EngineName: TypeAlias = Literal["onnxruntime", "openvino", "torch"]
EnginePrecision: TypeAlias = Literal["float32", "bf16"]
Run: TypeAlias = Callable[[Sequence[Tensor]], list[Tensor]]

ENGINES: dict[str, tuple[EngineName, ...]] = {
    ".onnx": ("onnxruntime", "openvino"),
    ".xml": ("openvino",),
    ".pt2": ("torch",),
}
"""File ending -> the engines that run such a file; the first is the default."""
_EXTRAS = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "openvino": "openvino", "nncf": "openvino"}


@dataclass(frozen=True)
class Engine:
    """A file that is ready to run: `run` takes the graph's inputs in order and returns its outputs in order."""

    run: Run
    metadata: ExportMetadata


def open_engine(
    path: Path, engine: EngineName | None, *, threads: int | None = None, precision: EnginePrecision = "float32"
) -> Engine:
    """Return an engine that runs a file; see `load_exported` for the arguments.

    Raises:
        ExportError: the engine does not run such files, is not installed, or an option does not fit it; the file has no
            metadata of this package.
        FileNotFoundError: there is no such file.
    """
    engines = ENGINES.get(path.suffix)
    if engines is None:
        raise ExportError(
            f"file is of no known format | where: file={path} | got {path.suffix!r} expected {', '.join(ENGINES)}"
        )
    engine = engines[0] if engine is None else engine
    if engine not in get_args(EngineName):
        raise ExportError(f"`engine` {unknown_name(engine, get_args(EngineName))}")
    if engine not in engines:
        raise ExportError(
            f"engine does not run this format | where: file={path} key=engine | got {engine} expected "
            f"{' or '.join(engines)}"
        )
    if threads is not None and threads < 1:
        raise ExportError(f"`threads` must be at least 1, got {threads}")
    if precision not in get_args(EnginePrecision):
        raise ExportError(f"`precision` {unknown_name(precision, get_args(EnginePrecision))}")
    if precision == "bf16" and engine != "openvino":
        raise ExportError(f"`precision` must be float32 for {engine}, got bf16; openvino computes in bf16")
    if not path.is_file():
        raise FileNotFoundError(f"no exported file at {path}")
    if engine == "onnxruntime":
        opened = _onnxruntime(path, threads)
    elif engine == "openvino":
        opened = _openvino(path, threads, precision)
    else:
        opened = _torch(path, threads)
    if reason := opened.metadata.failed_engines.get(engine):
        raise ExportError(
            f"engine does not give what the model gives | where: file={path} key=engine | got {engine}: {reason} "
            f"| fix: use {' or '.join(set(engines) - opened.metadata.failed_engines.keys())}"
        )
    return opened


def require(*modules: str) -> None:
    """Refuse to go on without libraries of an extra.

    Raises:
        ExportError: naming the first that is not installed, and the extra that brings it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ExportError(f'`{module}` is not installed | fix: pip install "detr_backbone[{_EXTRAS[module]}]"')


def _onnxruntime(path: Path, threads: int | None) -> Engine:
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many kinds, none of which names the file
        raise _unreadable(path, error) from error
    metadata = metadata_from_json(session.get_modelmeta().custom_metadata_map.get(KEY, ""), source=str(path))
    names = [entry.name for entry in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: tensor.contiguous().numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, feed)]

    return Engine(run, metadata)


def _openvino(path: Path, threads: int | None, precision: EnginePrecision) -> Engine:
    require("openvino")
    import openvino

    core = openvino.Core()
    try:
        if path.suffix == ".onnx":
            model = core.read_model(model=io.BytesIO(path.read_bytes()))
            place = ["framework", KEY]  # its reader of ONNX files keeps their metadata there
        else:
            model = core.read_model(str(path))
            place = [KEY]
    except Exception as error:
        raise _unreadable(path, error) from error
    text = str(model.get_rt_info(place).value) if model.has_rt_info(place) else ""
    metadata = metadata_from_json(text, source=str(path))
    return Engine(compile_openvino(core, model, threads, precision), metadata)


def compile_openvino(core: Any, model: Any, threads: int | None, precision: EnginePrecision) -> Run:
    """Return what runs an OpenVINO model; `threads` None for all cores."""
    # Without a hint it computes in bf16 on processors that can.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32" if precision == "float32" else "bf16"}
    settings["PERFORMANCE_HINT"] = "LATENCY"
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(model, "CPU", settings)
    count = len(compiled.outputs)

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        outputs = compiled([tensor.contiguous().numpy() for tensor in inputs])
        return [torch.from_numpy(outputs[index]) for index in range(count)]

    return run


def _torch(path: Path, threads: int | None) -> Engine:
    if threads is not None:
        raise ExportError(f"`threads` must be left out for torch, got {threads}; call torch.set_num_threads")
    files = {f"{KEY}.json": ""}
    try:
        module = torch.export.load(path, extra_files=files).module()
    except Exception as error:
        raise _unreadable(path, error) from error
    metadata = metadata_from_json(files[f"{KEY}.json"], source=str(path))

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(module(*inputs))

    return Engine(run, metadata)


def _unreadable(path: Path, error: Exception) -> ExportError:
    reason = " ".join(str(error).split())[:300]
    return ExportError(f"file cannot be read | where: file={path} | got {reason} | fix: export the model again")
