"""Frozen BatchNorm folded into the convolution before it: one pass over the feature map instead of two.

What is frozen is an affine map of each channel, so its scale goes into the convolution's weights and its shift into the
bias. In training the weights are scaled anew in every pass, which autograd sees through, unless they are more than the
values of the map; where nothing can change between two passes they are kept. Parameters, buffers and state-dict keys
stay those of the two layers.

Source: arXiv 2305.11624, section 3, for folding while training.
"""

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detr_backbone.frozen_batch_norm import FrozenBatchNorm2d
from detr_backbone.networks.dry_run import on_meta
from detr_backbone.weight_gradient import convolve


class FoldedConv2d(nn.Conv2d):
    """A convolution that also does the work of the FrozenBatchNorm2d behind it; made by `fold_frozen_batch_norm`."""

    norm: tuple[FrozenBatchNorm2d]
    """In a tuple, so that it is not a child of this layer too."""
    _kept: "_Kept | None"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name
        (norm,) = self.norm
        if not norm.folded:
            return self._convolve(input, self.weight, self.bias)
        if not torch.compiler.is_compiling():
            sources = self._sources()
            if all(map(_can_be_kept, sources)):
                return self._convolve(input, *self._keep(sources, _dtype_for(input, self.weight)))
            if self._has_more_weights_than_outputs(input):
                return norm.normalise(self._convolve(input, self.weight, self.bias))
        return self._convolve(input, *self._fold(_dtype_for(input, self.weight)))

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.groups > 1 or self.padding_mode != "zeros" or isinstance(self.padding, str):
            output: Tensor = self._conv_forward(x, weight, bias)
            return output
        geometry: Any = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return convolve(x, weight, bias, **geometry)

    def _has_more_weights_than_outputs(self, x: Tensor) -> bool:
        """Whether it is less work to scale what comes out than what it is computed from, one output channel each."""
        cells = x.numel() // (self.in_channels * self.stride[0] * self.stride[1])
        return cells < self.weight[0].numel()

    def _keep(self, sources: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        kept = self._kept
        if kept is None or not kept.is_of(sources, dtype):
            with torch.inference_mode(mode=False), torch.no_grad():
                kept = self._kept = _Kept(sources, *self._fold(dtype))
        return kept.weight, kept.bias

    def _sources(self) -> list[Tensor]:
        (norm,) = self.norm
        mine = [self.weight] if self.bias is None else [self.weight, self.bias]
        return [*mine, norm.weight, norm.bias, norm.running_mean, norm.running_var]

    def _fold(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scale, shift = self.norm[0].scale_and_shift()
        bias = shift if self.bias is None else shift + self.bias * scale
        return (self.weight * scale[:, None, None, None]).to(dtype), bias.to(dtype)

    def train(self, mode: bool = True) -> "FoldedConv2d":
        # Whoever writes through `.data`, which leaves no trace, does it between training and evaluation.
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_kept": None}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, folds FrozenBatchNorm2d"  # type: ignore[no-untyped-call]


class _Kept:
    """A folded weight and bias, and the state of the tensors that they were made of."""

    def __init__(self, sources: Sequence[Tensor], weight: Tensor, bias: Tensor) -> None:
        self.weight = weight
        self.bias = bias
        self._sources = sources
        self._states = [_state(source) for source in sources]

    def is_of(self, sources: Sequence[Tensor], dtype: torch.dtype) -> bool:
        same = len(sources) == len(self._sources) and all(map(operator.is_, sources, self._sources))
        return same and dtype == self.weight.dtype and list(map(_state, sources)) == self._states


def _dtype_for(x: Tensor, weight: Tensor) -> torch.dtype:
    """What a convolution computes in."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else weight.dtype


def _state(tensor: Tensor) -> tuple[int, int]:
    """Changes with whatever is written to a tensor, except through an alias of `tensor.data`."""
    return tensor._version, tensor.data_ptr()


def _can_be_kept(source: Tensor) -> bool:
    """Whether nothing is to be learned through this pass, and a later change of the tensor would show."""
    return not (source.requires_grad and torch.is_grad_enabled()) and not source.is_inference()


def fold_frozen_batch_norm(network: nn.Module) -> int:
    """Fold every FrozenBatchNorm2d of a network that alone reads a convolution's output; return how many.

    Which they are, a pass on the meta device shows: it computes nothing, and sees functional code too. A folded
    convolution returns what its norm returned before, and the norm returns what it is given. The weights that are kept
    for inference cost their memory a second time.

    Args:
        network: maps [B, C, H, W]; it is changed in place, `unfold_frozen_batch_norm` changes it back.
    """
    pairs = _pairs(network)
    for convolution, norm in pairs:
        convolution.__class__ = FoldedConv2d
        folded = cast(FoldedConv2d, convolution)
        folded.norm, folded._kept = (norm,), None
        norm.folded = True
    return len(pairs)


def unfold_frozen_batch_norm(network: nn.Module) -> int:
    """Give convolutions and their norms their own work back; return how many were folded."""
    folded = [module for module in network.modules() if isinstance(module, FoldedConv2d)]
    for convolution in folded:
        convolution.norm[0].folded = False
        del convolution.norm, convolution._kept
        cast(nn.Module, convolution).__class__ = nn.Conv2d
    return len(folded)


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts how often each tensor is read during a pass."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an id is one tensor's as long as that lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.counts[id(leaf)] = self.counts.get(id(leaf), 0) + 1
                self._alive.append(leaf)
        return func(*args, **(kwargs or {}))


def _pairs(network: nn.Module) -> list[tuple[nn.Conv2d, FrozenBatchNorm2d]]:
    """Each convolution with the norm that alone reads its output, where both are called once."""
    made: dict[int, nn.Conv2d] = {}  # the tensor that a convolution returned
    read: dict[FrozenBatchNorm2d, list[int]] = {}
    calls: dict[nn.Conv2d, list[Tensor]] = {}

    def returned(module: nn.Module, _: Any, output: Tensor) -> None:
        calls.setdefault(cast(nn.Conv2d, module), []).append(output)
        made[id(output)] = cast(nn.Conv2d, module)

    def takes(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read.setdefault(cast(FrozenBatchNorm2d, module), []).append(id(inputs[0]))

    handles = [
        module.register_forward_hook(returned)
        for module in network.modules()
        if type(module) is nn.Conv2d  # a subclass may do more than convolve
    ]
    handles += [
        module.register_forward_pre_hook(takes) for module in network.modules() if isinstance(module, FrozenBatchNorm2d)
    ]
    try:
        with _Uses() as uses:
            outputs = on_meta(network)
    finally:
        for handle in handles:
            handle.remove()
    for leaf in tree_leaves(outputs):  # what the network gives is read by its caller
        uses.counts[id(leaf)] = uses.counts.get(id(leaf), 0) + 1
    return [
        (made[inputs[0]], norm)
        for norm, inputs in read.items()
        if len(inputs) == 1
        and inputs[0] in made
        and len(calls[made[inputs[0]]]) == 1
        and uses.counts.get(inputs[0]) == 1
    ]
