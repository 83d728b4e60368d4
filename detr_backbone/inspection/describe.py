"""Outputs of every layer of a network: shape, stride, statistics, time; a table to look at before trusting a backbone.

The network runs as it is, with hooks that are gone afterwards: once to read the values, then to take the time.
"""

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from detr_backbone.backbone import BackboneBase, Joiner
from detr_backbone.errors import ConfigError, unknown_name
from detr_backbone.forward_pass import evaluating, hooked
from detr_backbone.inspection.table import Description, LayerDescription
from detr_backbone.inspection.tensor_use import TensorUse
from detr_backbone.layer_getter.strategies import OpenedModule
from detr_backbone.nested_tensor import NestedTensor, Size, as_nested_tensor

_Images: TypeAlias = NestedTensor | Tensor
_Call: TypeAlias = tuple[str, int]  # path, and how often the layer was called up to then

_CONTAINERS = (Joiner, OpenedModule, nn.ModuleList, nn.ModuleDict)
"""Without a row: never called themselves, or giving what their children give."""


@torch.no_grad()
def describe(
    model: nn.Module, images: Size | _Images | Sequence[Tensor], *, layers: Sequence[str] | int = 1, passes: int = 3
) -> Description:
    """Return what the layers of a network give for some images, in evaluation mode and without gradients.

    The model stays as it is: its hooks, modes, gradients and torch's random numbers are afterwards what they were, also
    where its forward raises. Values are read when a layer returns, before a later one may change them in place.

    Args:
        model: a backbone, a detector, or any other network that takes one input.
        images: what it takes; or a size (h, w), for one image of random normal numbers with as many channels as the
            first convolution takes.
        layers: paths as in `named_modules()`, of any depth; or a depth: 1 describes the children of the network, 2
            their children too, and so on. A BackboneBase, Joiner, ModuleList or ModuleDict does not count as a depth.
        passes: passes whose time is taken, after one that warms up and reads the values.

    Raises:
        ConfigError: a path does not exist, a number is below 1, or `images` is a size where no convolution tells the
            channels.

    >>> from torchvision.models import resnet18
    >>> description = describe(resnet18(), (64, 96), layers=["layer1", "layer2.0.bn1"])
    >>> [(row.path, row.shape, row.stride, row.parameters) for row in description.rows]
    [('layer1', (1, 64, 16, 24), 4, 147968), ('layer2.0.bn1', (1, 128, 8, 12), 8, 256)]
    """
    if passes < 1:
        raise ConfigError(f"`passes` must be at least 1, got {passes}")
    modules = {path: model.get_submodule(path) for path in _paths(model, layers)}
    batch = _batch(model, images)
    values = batch.tensors if isinstance(batch, NestedTensor) else batch
    device = values.device
    first = _Recorder(values)
    timed: list[_Recorder] = []
    whole: list[float] = []
    with evaluating(model), _whole_batches(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        with first.watching(modules), TensorUse(model) as use:
            model(batch)
        for _ in range(passes):
            start = _now(device)
            model(batch)
            whole.append(_now(device) - start)
            timed.append(_Recorder(values, reads_values=False))
            with timed[-1].watching(modules):
                model(batch)
    rows = []
    for (path, call), outputs in first.outputs.items():
        seconds = [recorder.seconds[path, call] for recorder in timed if (path, call) in recorder.seconds]
        milliseconds = 1000 * statistics.median(seconds) if seconds else None
        about = {"path": path, "call": call, "milliseconds": milliseconds, **_about(modules[path])}
        rows += [LayerDescription(**about, **output) for output in outputs]
    called = {row.path for row in rows}
    rows += [
        LayerDescription(path=path, used=use.of((*module.parameters(), *module.buffers())), **_about(module))
        for path, module in modules.items()
        if path not in called
    ]
    backbone = next(_backbones(model), None)
    return Description(
        rows=tuple(rows),
        input_shape=tuple(values.shape),
        device=str(device),
        milliseconds=1000 * statistics.median(whole),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        batching=None if backbone is None else backbone.batching,
        leak=None if backbone is None else backbone.leak,
    )


class _Recorder:
    """Outputs and seconds of each call of a layer during one pass."""

    def __init__(self, images: Tensor, *, reads_values: bool = True) -> None:
        self.outputs: dict[_Call, list[dict[str, Any]]] = {}
        self.seconds: dict[_Call, float] = {}
        self._images = images
        self._reads_values = reads_values
        self._calls: Counter[str] = Counter()
        self._starts: defaultdict[str, list[tuple[_Call, float]]] = defaultdict(list)  # a module may have two paths

    def watching(self, modules: Mapping[str, nn.Module]) -> AbstractContextManager[None]:
        """Return a context in which calls of these modules are recorded."""
        # Before all other hooks: theirs may be part of what a layer does, or leave the forward.
        return hooked(modules, before=self._enter, after=self._leave, first=True)

    def _enter(self, path: str, *_: Any) -> None:
        self._calls[path] += 1
        call = path, self._calls[path]
        self.outputs[call] = []
        self._starts[path].append((call, _now(self._images.device)))

    def _leave(self, path: str, _: nn.Module, __: Any, output: Any) -> None:
        now = _now(self._images.device)
        call, start = self._starts[path].pop()
        self.seconds[call] = now - start
        if self._reads_values:
            self.outputs[call] = [
                {"output": name, **_geometry(tensor, self._images), **_statistics(tensor)}
                for name, tensor in _tensors(output)
            ]


def _now(device: torch.device) -> float:
    """Seconds on a clock, when the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@contextmanager
def _whole_batches(model: nn.Module) -> Iterator[None]:
    """Within this context, backbones run the whole batch in one pass: a layer has one output."""
    backbones = list(_backbones(model))
    try:
        for backbone in backbones:
            vars(backbone)["forward"] = backbone.forward_whole_batch
        yield
    finally:
        for backbone in backbones:
            del vars(backbone)["forward"]


def _backbones(model: nn.Module) -> Iterator[BackboneBase]:
    return (module for module in model.modules() if isinstance(module, BackboneBase))


def _paths(model: nn.Module, layers: Sequence[str] | int) -> list[str]:
    if isinstance(layers, int):
        if layers < 1:
            raise ConfigError(f"`layers` must be paths, or a depth of at least 1, got {layers}")
        return [*([""] if isinstance(model, BackboneBase) else []), *_to_depth(model, layers, "")]
    known = dict(model.named_modules(remove_duplicate=False))
    for path in layers:
        if path not in known:
            what = unknown_name(path, [name for name, _ in model.named_children()], also=known)
            inner = next((f"; there is {name!r}" for name in known if name.endswith(f".{path}")), "")
            raise ConfigError(f"`layers` must name layers of the model: {what}{inner}")
    return list(layers)


def _to_depth(module: nn.Module, depth: int, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        opened = isinstance(child, _CONTAINERS)
        if not opened:
            yield prefix + name
        below = depth if opened or isinstance(child, BackboneBase) else depth - 1
        if below:
            yield from _to_depth(child, below, f"{prefix}{name}.")


def _batch(model: nn.Module, images: Size | _Images | Sequence[Tensor]) -> _Images:
    if isinstance(images, Tensor | NestedTensor):
        return images
    if not all(isinstance(side, int) for side in images):
        return as_nested_tensor(cast(Sequence[Tensor], images))
    # A detector has convolutions of its own, registered before those of its backbone.
    network = next(_backbones(model), model)
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ConfigError(f"`images` must be tensors for a network without a convolution, got the size {images}")
    height, width = cast(Size, images)
    noise = torch.randn(1, first.in_channels, height, width, generator=torch.Generator().manual_seed(0))
    return noise.to(first.weight)


def _about(module: nn.Module) -> dict[str, Any]:
    parameters = list(module.parameters())
    return {
        "type": type(module).__name__,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    }


def _tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a layer's output with their path in it; masks are left out."""
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, NestedTensor):
        yield f"{name}.tensors", output.tensors
    else:
        parts: Iterable[tuple[str, Any]] = ()
        if isinstance(output, Mapping):
            parts = ((f"[{key!r}]", value) for key, value in output.items())
        elif isinstance(output, tuple) and hasattr(output, "_fields"):
            parts = ((f".{field}", getattr(output, field)) for field in output._fields)
        elif isinstance(output, tuple | list):
            parts = ((f"[{index}]", value) for index, value in enumerate(output))
        elif is_dataclass(output):
            parts = ((f".{field.name}", getattr(output, field.name)) for field in fields(output))
        for part, value in parts:
            yield from _tensors(value, name + part)


def _geometry(tensor: Tensor, images: Tensor) -> dict[str, Any]:
    shape = tuple(tensor.shape)
    channels = stride = None
    if len(shape) == images.ndim == 4:
        channels, stride = shape[1], _stride(images.shape[2:], shape[2:])
        if stride is None and (stride := _stride(images.shape[2:], shape[1:3])):
            channels = shape[3]
    dtype = str(tensor.dtype).removeprefix("torch.")
    size = tensor.numel() * tensor.element_size()
    return {"shape": shape, "dtype": dtype, "channels": channels, "stride": stride, "bytes": size}


def _stride(pixels: Sequence[int], cells: Sequence[int]) -> int | None:
    """Return the s for which every axis has ceil(pixels / s) cells; of several a power of two, or else the smallest.

    None where there is no such s, or only one cell.

    >>> _stride((97, 131), (4, 5)), _stride((224, 224), (55, 55))
    (32, None)
    """
    if max(cells) < 2:
        return None
    fits = [s for s in range(1, max(pixels) + 1) if all(-(-p // s) == c for p, c in zip(pixels, cells, strict=True))]
    return next((s for s in fits if s & (s - 1) == 0), fits[0] if fits else None)


def _statistics(tensor: Tensor) -> dict[str, Any]:
    values = tensor.abs() if tensor.is_complex() else tensor
    values = values.to(
        torch.promote_types(values.dtype, torch.float32) if values.is_floating_point() else torch.float64
    )
    finite = values[values.isfinite()]
    counts = {"nan": int(values.isnan().sum()), "inf": int(values.isinf().sum())}
    if not finite.numel():
        return counts
    std, mean = torch.std_mean(finite, correction=0)
    return counts | {
        "mean": mean.item(),
        "std": std.item(),
        "min": finite.min().item(),
        "max": finite.max().item(),
        "zeros": int((values == 0).sum()) / values.numel(),
    }
