"""BatchNorm whose statistics and affine parameters are fixed, and how to give it statistics from data.

Detectors train with a few images per device, too few for batch statistics, so a pretrained backbone keeps the ones that
it was trained with. Without pretrained weights the statistics (0, 1) describe no network at all: a residual network
then grows from block to block and does not train. `calibrate_frozen_batch_norm` estimates them from a few batches.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_backbone.errors import ConfigError, NumericsError
from detr_backbone.nested_tensor import NestedTensor

if TYPE_CHECKING:
    from detr_backbone.backbone import BackboneBase, Joiner


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with fixed statistics and affine parameters: BatchNorm2d in eval mode, for ever.

    Its four buffers have BatchNorm2d's names, so weights of a BatchNorm2d load as they are; their `num_batches_tracked`
    is dropped. Scale and shift are folded in float32 at least, and the output has the input's dtype.

    Args:
        num_features: channels C of the input [B, C, H, W]; axes after C may be any, as of tokens [B, C, N].
        eps: added to the variance, in float32.

    Attributes:
        folded: the convolution before does this layer's work, which then passes its input on; see `folding`.

    >>> FrozenBatchNorm2d(8)(torch.zeros(2, 8, 4, 4, dtype=torch.bfloat16)).dtype
    torch.bfloat16
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.folded = False
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.then(x if self.folded else self.normalise(x))

    def normalise(self, x: Tensor) -> Tensor:
        """The input with every channel scaled and shifted."""
        # batch_norm reads parameters of its input's dtype or of float32, and folds them in float32 in both cases.
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """What a channel is multiplied by, and what is added then: two tensors [C], in float32 at least."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        scale = self.weight.to(dtype) * (self.running_var.to(dtype) + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def then(self, x: Tensor) -> Tensor:
        """What a subclass does with the normalised values: nothing here."""
        return x

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


@torch.no_grad()
def calibrate_frozen_batch_norm(
    backbone: "BackboneBase | Joiner", batches: Iterable[NestedTensor | Tensor | Sequence[Tensor]]
) -> int:
    """Give every FrozenBatchNorm2d of a backbone the statistics of data, in one pass, and return the images it took.

    Each layer normalises a batch by the batch's own statistics, as BatchNorm2d does in training, so that the layers
    after it see what they will see later; the statistics kept are the mean over the batches (BatchNorm2d with
    `momentum=None`). Padded cells do not count.

    Args:
        backbone: as built; its weights stay as they are.
        batches: batches of images as the backbone takes them; a few dozen images are enough.

    Raises:
        ConfigError: a batch gives a layer fewer than two cells.
        ValueError: no batch came, or the backbone has no frozen BatchNorm.
        NumericsError: a layer's statistics are not finite; the message names the layer.
    """
    base = cast("BackboneBase", backbone[0] if isinstance(backbone, nn.Sequential) else backbone)
    layers = {path: module for path, module in base.body.named_modules() if isinstance(module, FrozenBatchNorm2d)}
    if not layers:
        raise ValueError("`backbone` must hold a FrozenBatchNorm2d to calibrate, got none")
    folded = [layer for layer in layers.values() if layer.folded]
    sums = {path: torch.zeros(2, len(layer.weight), device=layer.weight.device) for path, layer in layers.items()}
    images = count = 0
    for batch in batches:
        nested = base.prepared(batch)
        count += 1
        images += len(nested)
        hooks = [
            layer.register_forward_hook(partial(_normalise_by_batch, sums[path], _mask_of(nested, base, path)))
            for path, layer in layers.items()
        ]
        try:
            for layer in folded:
                layer.folded = False
            base(nested)
        finally:
            for layer in folded:
                layer.folded = True
            for hook in hooks:
                hook.remove()
    if not count:
        raise ValueError("`batches` must hold at least one batch, got none")
    _check_finite(sums)
    for path, layer in layers.items():
        mean, variance = sums[path] / count
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
    return images


def _mask_of(images: NestedTensor, backbone: "BackboneBase", path: str) -> Tensor | None:
    stride = backbone.input_strides.get(path)  # what has none is no map of the image, and has no padded cells
    return images.mask[:, ::stride, ::stride] if stride and images.is_padded else None


def _normalise_by_batch(
    sums: Tensor, mask: Tensor | None, layer: FrozenBatchNorm2d, inputs: tuple[Tensor], _: Tensor
) -> Tensor:
    x = inputs[0]
    channels_first = x.float().transpose(0, 1)
    cells = channels_first.flatten(1) if mask is None or x.ndim != 4 else channels_first[:, ~mask]
    count = cells.shape[1]
    if count < 2:
        raise ConfigError(
            f"a batch must give a layer at least two valid cells to take statistics from, got {count}; calibrate with "
            "larger batches or images"
        )
    variance, mean = torch.var_mean(cells, dim=1)
    sums += torch.stack([mean, variance])
    biased = variance * ((count - 1) / count)  # BatchNorm normalises by the biased variance and keeps the unbiased one
    weight, bias = layer.weight.float(), layer.bias.float()
    return layer.then(F.batch_norm(x, mean, biased, weight, bias, training=False, eps=layer.eps))


def _check_finite(sums: Mapping[str, Tensor]) -> None:
    for path, sum_ in sums.items():
        if not sum_.isfinite().all():
            raise NumericsError(f"statistics of {path!r} must be finite, got NaN or infinity: look at the images")
