"""Networks for images of 1, 4 or any number of channels: grey, RGB with depth, satellite bands."""

import torch
from torch import Tensor, nn

from detr_backbone.errors import ConfigError


def first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d]:
    """Return the path of the convolution that takes the image, and the convolution.

    Raises:
        ConfigError: there is none.
    """
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            return path, module
    raise ConfigError("the network must begin with a convolution, got none")


def refuse_other_input(images: Tensor, first: nn.Conv2d) -> None:
    """Refuse a batch that a network cannot take, before its first convolution says so in its own words.

    Args:
        images: [B, C, H, W].
        first: the convolution that takes the images.

    Raises:
        ValueError: the number of channels is another one.
        TypeError: the dtype is another one, outside autocast.
    """
    if images.shape[1] != first.in_channels:
        hint = "; this looks like [h, w, C]: permute(2, 0, 1)" if images.shape[3] == first.in_channels else ""
        raise ValueError(
            f"images must have {first.in_channels} channels for this network, got {list(images.shape)}{hint}"
        )
    if images.dtype != first.weight.dtype and not torch.is_autocast_enabled(images.device.type):
        raise TypeError(
            f"images must have the dtype of the network, {first.weight.dtype}, got {images.dtype}: "
            f"images.to({first.weight.dtype})"
        )


def adapt_input(network: nn.Module, in_channels: int) -> None:
    """Give a network of 3 input channels another number of them, its first weights as `adapt_input_weight` says.

    Raises:
        ConfigError: the number is not positive, or the first convolution splits its channels into groups.
    """
    path, first = first_convolution(network)
    if in_channels < 1 or first.groups != 1:
        raise ConfigError(
            f"`in_channels` must be at least 1, for a first convolution of one group, got {in_channels} for {path} "
            f"({first})"
        )
    with torch.no_grad():
        first.weight = nn.Parameter(adapt_input_weight(first.weight, in_channels))
    first.in_channels = in_channels


def adapt_input_weight(weight: Tensor, in_channels: int) -> Tensor:
    """Return the weight of a first convolution, made for other channels than its own.

    One channel gets the sum over the old ones: a grey image, repeated, gives what it gave. More channels repeat the old
    ones in turn, and all are scaled by old / new, so that channels that are alike give the same sum as before.

    Source: `adapt_input_conv` of timm, timm/models/_manipulate.py (https://github.com/huggingface/pytorch-image-models).

    Args:
        weight: [O, C, h, w].
        in_channels: the channels wanted.

    >>> weight = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    >>> adapt_input_weight(weight, 1).flatten(), adapt_input_weight(weight, 6).flatten()
    (tensor([6.]), tensor([0.5000, 1.0000, 1.5000, 0.5000, 1.0000, 1.5000]))
    """
    channels = weight.shape[1]
    if in_channels == 1:
        return weight.sum(dim=1, keepdim=True)
    taken = torch.arange(in_channels, device=weight.device) % channels
    return weight[:, taken] * (channels / in_channels)
