"""Frozen BatchNorm folded into the convolution before it: one pass over the feature map instead of two.

Frozen BatchNorm is an affine map of each channel, so its scale goes into the convolution's weights and its shift into
the bias. Within a backbone the weights are scaled anew in every pass, in training and in inference: whatever writes to
them, nothing can be stale, and autograd sees through it. Parameters, buffers and state-dict keys stay those of the two
layers. A pair that a hook reaches into is not folded, so that hooks see what each layer gives. `fold_for_inference`
folds once, for good.

Source: arXiv 2305.11624, section 3, for folding while training.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from detr_backbone.errors import ConfigError
from detr_backbone.forward_pass import FoldedNorm, Pass, PerThread
from detr_backbone.frozen_batch_norm import FrozenBatchNorm2d, scale_and_shift

Layer = TypeVar("Layer", bound=nn.Module)


class FoldedConv2d(nn.Conv2d):
    """A convolution that, within a pass of its backbone, also does the work of the FrozenBatchNorm2d behind it.

    Attributes:
        folding: path of the norm in the backbone, and the backbone's passes; None for a convolution that others make
            of this class, as adapters do.
    """

    folding: tuple[str, PerThread[Pass]] | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name
        if self.folding is None:
            return super().forward(input)
        norm_path, passes = self.folding
        running = passes.get()
        norm = None if running is None else running.norms.get(norm_path)
        if norm is None:
            return super().forward(input)
        if self._has_more_weights_than_outputs(input):
            # The weights stay as they are: not scaled, nor brought into the memory format of the input.
            assert isinstance(norm.module, FrozenBatchNorm2d)
            return norm.module.normalise(super().forward(input.contiguous()))
        weight, bias = fold(self, norm.scale, norm.shift)
        dtype = compute_dtype(input, self.weight)
        return self._conv_forward(input, weight.to(dtype), bias.to(dtype))

    def _has_more_weights_than_outputs(self, x: Tensor) -> bool:
        """Return whether an output channel has fewer cells than weights: then a CPU has less work with the cells.

        Were all weights scaled, a forward of ResNet-50 with one image of 224 x 224 would take 1.13 times as long in
        float32 and 1.08 in bf16, a training step 1.27 and 1.08 (two cores with AVX-512).
        """
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        cells = x.numel() // (self.in_channels * self.stride[0] * self.stride[1])
        return cells < self.weight[0].numel()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, folds FrozenBatchNorm2d"  # type: ignore[no-untyped-call]


def prepare_folding(network: nn.Module, readers: Mapping[str, str], passes: PerThread[Pass]) -> dict[str, str]:
    """Let the convolutions of a network fold the FrozenBatchNorm2d behind them, in the passes that say so.

    A convolution is replaced in its parent by a FoldedConv2d with its parameters and hooks. A subclass of nn.Conv2d,
    and a layer that got a `forward` of its own, as accelerate's hooks give it, are left: they may do more.

    Args:
        network: it is changed in place.
        readers: path of each layer whose output only one other layer reads -> path of that one, as a dry run gives it.
        passes: those of the backbone that runs the network.

    Returns:
        Path of each such norm -> path of its convolution.
    """
    modules = dict(network.named_modules())
    folded = {}
    for path, norm_path in readers.items():
        convolution, norm = modules.get(path), modules.get(norm_path)
        if type(convolution) is not nn.Conv2d or not isinstance(norm, FrozenBatchNorm2d):
            continue
        if "forward" not in vars(convolution) and "forward" not in vars(norm):
            replacement = retype(convolution, FoldedConv2d)
            replacement.folding = norm.folding = (norm_path, passes)
            replace(network, path, replacement)
            folded[norm_path] = path
    return folded


def scale_and_shift_together(norms: Mapping[str, FrozenBatchNorm2d]) -> dict[str, FoldedNorm]:
    """Return scale and shift of many norms, by path: computed in one tensor, as launching a kernel for each takes long.

    Under autocast the shifts have its dtype, as a convolution's bias then must.
    """
    alike: dict[tuple[Any, ...], list[str]] = {}
    for path, norm in norms.items():
        alike.setdefault((norm.weight.device, norm.weight.dtype, norm.eps), []).append(path)
    folded: dict[str, FoldedNorm] = {}
    for (device, _, eps), paths in alike.items():
        modules = [norms[path] for path in paths]
        scale, shift = scale_and_shift(
            torch.cat([norm.weight for norm in modules]),
            torch.cat([norm.bias for norm in modules]),
            torch.cat([norm.running_mean for norm in modules]),
            torch.cat([norm.running_var for norm in modules]),
            eps,
        )
        if _autocasts(device):
            shift = shift.to(torch.get_autocast_dtype(device.type))
        lengths = [norm.weight.shape[0] for norm in modules]
        scales, shifts = torch.split(scale, lengths), torch.split(shift, lengths)
        folded.update(zip(paths, map(FoldedNorm, modules, scales, shifts), strict=True))
    return folded


def fold(convolution: nn.Conv2d, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the one convolution that also scales and shifts, in the weight's dtype or float32."""
    bias = shift if convolution.bias is None else shift + convolution.bias * scale
    weight = convolution.weight
    if convolution.kernel_size == (1, 1):
        # As a matrix, whose gradient has the strides of the parameter: DistributedDataParallel warns of those that a
        # channels_last gradient has along axes of one entry, though the memory is the same.
        return (weight.flatten(1) * scale.view(-1, 1)).view_as(weight), bias
    return weight * scale.view(-1, 1, 1, 1), bias


@torch.no_grad()
def fold_pairs(network: nn.Module, folded: Mapping[str, str], *, dtype: torch.dtype | None) -> None:
    """Replace the pairs that `prepare_folding` made by plain convolutions with folded weights that do not train.

    Args:
        network: it is changed in place; norms become what follows them.
        folded: path of each norm -> path of its convolution.
        dtype: of the folded weights; None for that of the convolution.

    Raises:
        ConfigError: a weight is no parameter, since a hook computes it; nothing is changed.
    """
    for path in folded.values():
        if "weight" not in network.get_submodule(path)._parameters:
            raise ConfigError(
                f"`fold_for_inference` must find weights that are parameters, got that of {path}, which a hook "
                "computes | fix: make it one, as remove_weight_norm and prune.remove do"
            )
    for norm_path, path in folded.items():
        convolution, norm = network.get_submodule(path), network.get_submodule(norm_path)
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(norm, FrozenBatchNorm2d)
        weight, bias = fold(convolution, *norm.scale_and_shift())
        target = dtype or convolution.weight.dtype
        plain = retype(convolution, nn.Conv2d)
        del plain.folding
        plain._parameters = {
            "weight": nn.Parameter(weight.to(target, memory_format=torch.channels_last), requires_grad=False),
            "bias": nn.Parameter(bias.to(target), requires_grad=False),
        }
        follows = retype(norm, nn.Sequential if norm._modules else nn.Identity)
        follows._buffers = {}
        replace(network, path, plain)
        replace(network, norm_path, follows)


def retype(module: nn.Module, cls: type[Layer]) -> Layer:
    """Return a module of another class with all that this one holds: parameters, hooks, mode."""
    retyped = cls.__new__(cls)
    vars(retyped).update(vars(module))
    return retyped


def replace(network: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the one at a path."""
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype that a convolution computes in."""
    return torch.get_autocast_dtype(x.device.type) if _autocasts(x.device) else weight.dtype


def _autocasts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
