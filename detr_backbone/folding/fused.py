"""Convolution and ReLU, also with a sum between them, as one primitive: one pass over the feature map instead of three.

A convolution gives back a Deferred, a tensor that is not computed yet. A ReLU computes it together with itself, a sum
waits for a ReLU, and anything else computes it as it is. So the code between the layers runs as it is written.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.utils._pytree import tree_map_only

from detr_backbone.folding.fold import compute_dtype, replace, retype
from detr_backbone.folding.fusions import ADDS, RELUS
from detr_backbone.folding.primitives import Kind, conv_add_relu, conv_relu, is_usable, kind_of
from detr_backbone.forward_pass import Pass, PerThread

_IN_PLACE = (torch.relu_, Tensor.relu_, Tensor.add_)


class FusedConv2d(nn.Conv2d):
    """A convolution that, within a pass of its backbone, runs together with the sum and the ReLU behind it.

    Attributes:
        fusing: its path in the backbone, whether it may write over what it is added to, and the backbone's passes.
    """

    fusing: tuple[str, bool, PerThread[Pass]]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name
        x = self._prepare(input) if self._is_in_pass() else None
        return super().forward(input) if x is None else Deferred.of(self, x)

    def compute(self, x: Tensor) -> Tensor:
        """Return the convolution alone."""
        return super().forward(x)

    def compute_with_relu(self, x: Tensor, other: Tensor | None) -> Tensor | None:
        """Return relu(conv(x) + other), or relu(conv(x)); None if that is no primitive for such a sum."""
        kind = cast(Kind, kind_of(self))
        if other is None:
            return conv_relu(kind, x, self.weight, self.bias)
        fits = other.shape == kind.output_shape(x.shape) and other.dtype == x.dtype and _is_plain(other)
        if not fits or not is_usable(kind, adds=True):
            return None
        _, may_overwrite, _ = self.fusing
        in_place = (
            may_overwrite and not torch.is_grad_enabled() and other.is_inference() == torch.is_inference_mode_enabled()
        )
        return conv_add_relu(kind, x, self.weight, self.bias, other, overwrite=in_place)

    def _is_in_pass(self) -> bool:
        _, _, passes = self.fusing
        running = passes.get()
        return running is not None and running.fuses

    def _prepare(self, x: Tensor) -> Tensor | None:
        """Return the input in the dtype that the convolution computes in; None if there is no primitive for it."""
        if not _is_plain(x) or x.shape[1] != self.in_channels or type(self.weight) is not nn.Parameter:
            return None
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            return None
        dtype = compute_dtype(x, self.weight)
        if any(parameter.dtype != dtype or parameter.device.type != "cpu" for parameter in parameters):
            return None
        if x.dtype != dtype:
            if not torch.is_autocast_enabled("cpu"):
                return None
            x = x.to(dtype)
        kind = kind_of(self)
        if kind is None or min(kind.output_shape(x.shape)) < 1:
            return None
        return x if is_usable(kind) else None


class Deferred(Tensor):
    """What a convolution, and a sum with it, will be: computed at the first function of torch that reads it.

    Its only reader is a sum or a ReLU, as a dry run has seen; whatever else reads it gets the same numbers. It has no
    memory of its own.
    """

    _convolution: FusedConv2d
    _input: Tensor
    _other: Tensor | None
    _computed: Tensor | None

    @classmethod
    def of(cls, convolution: FusedConv2d, x: Tensor, other: Tensor | None = None) -> Self:
        """Return conv(x), or conv(x) + other, without computing it."""
        deferred = torch.empty(0, device="meta").as_subclass(cls)
        vars(deferred).update(_convolution=convolution, _input=x, _other=other, _computed=None)
        return deferred

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ADDS and len(args) == 2 and not kwargs:
            total = _add(func, *args)
            if total is not None:
                return total
        if func in RELUS and args and isinstance(args[0], Deferred):
            rectified = _rectify(args[0])
            if rectified is not None:
                if func in _IN_PLACE or kwargs.get("inplace") or (len(args) > 1 and args[1]):
                    vars(args[0])["_computed"] = rectified
                return rectified
        args, kwargs = tree_map_only(Deferred, compute, (tuple(args), kwargs))
        return func(*args, **kwargs)


def compute(deferred: Deferred) -> Tensor:
    """Return what was deferred, computed as if it had not been."""
    state = vars(deferred)
    if state["_computed"] is None:
        convolved = state["_convolution"].compute(state["_input"])
        state["_computed"] = convolved if state["_other"] is None else convolved + state["_other"]
    return cast(Tensor, state["_computed"])


def _add(func: Callable[..., Any], first: Any, second: Any) -> Deferred | None:
    """Return a sum that waits for its ReLU; None if it has to be computed."""
    deferred, other = (first, second) if isinstance(first, Deferred) else (second, first)
    state = vars(deferred)
    if isinstance(other, Deferred):
        other = compute(other)
    if state["_computed"] is not None or state["_other"] is not None:
        return None
    if func in _IN_PLACE:
        if deferred is not first or type(other) is not Tensor:
            return None
        state["_other"] = other  # every name of it means the sum from now on
        return cast(Deferred, deferred)
    return Deferred.of(state["_convolution"], state["_input"], other) if type(other) is Tensor else None


def _rectify(deferred: Deferred) -> Tensor | None:
    state = vars(deferred)
    if state["_computed"] is not None:
        return None
    return cast(Tensor | None, state["_convolution"].compute_with_relu(state["_input"], state["_other"]))


def fuse(network: nn.Module, fusions: Mapping[str, bool], passes: PerThread[Pass]) -> None:
    """Let convolutions run together with the sums and ReLUs behind them, in the passes that say so.

    Args:
        network: it is changed in place; a convolution becomes a FusedConv2d with its parameters and hooks.
        fusions: as `find_fusions` gives them.
        passes: those of the backbone that runs the network.
    """
    for path, may_overwrite in fusions.items():
        convolution = network.get_submodule(path)
        if type(convolution) is nn.Conv2d and kind_of(convolution) is not None:
            fused = retype(convolution, FusedConv2d)
            fused.fusing = (path, may_overwrite, passes)
            replace(network, path, fused)


def _is_plain(x: Any) -> bool:
    """Return whether a value is a map [B, C, H, W] in torch.channels_last on the CPU that nothing differentiates."""
    return (
        type(x) is Tensor
        and x.ndim == 4
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and not (torch.is_grad_enabled() and x.requires_grad)
        and unpack_dual(x).tangent is None  # type: ignore[no-untyped-call]
        and x.is_contiguous(memory_format=torch.channels_last)
    )
