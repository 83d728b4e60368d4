"""A backbone and a position encoding, joined as a transformer takes them, and the configuration of both."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from detr_backbone.backbone.backbone import Backbone
from detr_backbone.backbone.base import BackboneBase
from detr_backbone.nested_tensor import (
    Images,
    NestedTensor,
    Size,
)
from detr_backbone.networks.norms import Norm
from detr_backbone.padding.exact import Padding
from detr_backbone.position_encoding import PositionEncodingConfig, build_position_encoding
from detr_backbone.pyramid import PyramidConfig


class Joiner(nn.Sequential):
    """A backbone and a position encoding, joined: levels and their positions, as a transformer takes them.

    `joiner[0]` is the backbone, `joiner[1]` the position encoding; keys are published checkpoints' (`0.body.*`),
    and `0.pyramid.*` for a pyramid.

    Attributes:
        strides, channels: one entry per level, finest first.
        num_channels: channels of the coarsest level; a detector with one level reads it, and it may be assigned.
        padding: how the backbone treats padding; a detector that convolves its levels further keeps to it.

    >>> import torch
    >>> joiner = build_backbone(BackboneConfig(name="resnet18", return_layers=("layer3", "layer4")))
    >>> features, positions = joiner([torch.zeros(3, 64, 96), torch.zeros(3, 33, 47)])
    >>> [level.tensors.shape for level in features], features[0].sizes
    ([torch.Size([2, 256, 4, 6]), torch.Size([2, 512, 2, 3])], ((4, 6), (3, 3)))
    >>> [position.shape for position in positions]
    [torch.Size([2, 256, 4, 6]), torch.Size([2, 256, 2, 3])]
    """

    def __init__(self, backbone: BackboneBase, position_embedding: nn.Module) -> None:
        super().__init__(backbone, position_embedding)
        self.strides = backbone.strides
        self.channels = backbone.channels
        self.num_channels = backbone.num_channels
        self.padding = backbone.padding

    def forward(self, images: Images, sizes: Sequence[Size] | None = None) -> tuple[list[NestedTensor], list[Tensor]]:
        """Return levels and positions [B, hidden_dim, h, w] in the levels' dtype, finest first; see BackboneBase."""
        features = list(cast(dict[str, NestedTensor], self[0](images, sizes)).values())
        return features, [self[1](level).to(level.tensors.dtype) for level in features]


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Configuration of a backbone and its position encoding.

    Args:
        name: a model of torchvision, such as resnet50, or of timm, such as timm/tf_efficientnet_lite0.
        weights: null (random); a local file; a weights name of torchvision such as IMAGENET1K_V1, or of timm such as
            pretrained; a published detector such as detr_r50; or hf-hub:OWNER/NAME@REVISION.
        in_channels: channels of the images; pretrained weights of 3 are summed for 1, repeated and scaled for more.
        return_layers: the layers that become levels, by path; null for the last stage ([layer4] of a ResNet, the final
            norm of a ViT). In every path, [8-11] stands for these numbers and * for any one name: "blocks.[8-11]".
        train_layers: the layers that train; [] freezes the whole backbone; null for all but the stem and the first
            stage ([layer2, layer3, layer4] of a ResNet).
        norm: what stands where the network has BatchNorm. frozen: its statistics and affine parameters, for ever.
            batch, sync: it learns, on each device or across them, in the layers that train. group: GroupNorm of 32
            groups, for training without pretrained weights. batch and sync need `padding: zeros`.
        dilation: DC5, layer4 at the resolution of layer3; only for ResNets of Bottleneck blocks.
        padding: exact, or zeros as in the original code, where an image's features depend on its batch.
        channels_last: the memory format of convolutions, faster on most devices than the other.
        checkpointed_layers: layers whose inner activations are computed again in the backward pass, to save memory.
        pyramid: levels of several strides from a network that has one, such as a ViT; null for the network's own.
        position_encoding: how positions are encoded.
        hidden_dim: channels of the position encodings, and of the detector that reads them.
    """

    name: str = "resnet50"
    weights: str | None = None
    in_channels: int = 3
    return_layers: tuple[str, ...] | None = None
    train_layers: tuple[str, ...] | None = None
    norm: Norm = "frozen"
    dilation: bool = False
    padding: Padding = "exact"
    channels_last: bool = True
    checkpointed_layers: tuple[str, ...] = ()
    pyramid: PyramidConfig | None = None
    position_encoding: PositionEncodingConfig = field(default_factory=PositionEncodingConfig)
    hidden_dim: int = 256


def build_backbone(config: BackboneConfig) -> Joiner:
    """Return the backbone that `config` describes.

    Raises:
        TypeError: `config` is no BackboneConfig.
        ConfigError: an unknown name, or options that contradict each other.
        WeightsError: the weights cannot be loaded completely.
    """
    if not isinstance(config, BackboneConfig):
        raise TypeError(f"`config` must be a BackboneConfig, such as BackboneConfig(name='resnet50'), got {config!r}")
    position_encoding = build_position_encoding(config.position_encoding, config.hidden_dim)
    backbone = Backbone(
        config.name,
        weights=config.weights,
        in_channels=config.in_channels,
        norm=config.norm,
        dilation=config.dilation,
        return_layers=config.return_layers,
        train_layers=config.train_layers,
        padding=config.padding,
        channels_last=config.channels_last,
        checkpointed_layers=config.checkpointed_layers,
        pyramid=config.pyramid,
    )
    return Joiner(backbone, position_encoding)
