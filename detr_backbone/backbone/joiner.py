"""A backbone and a position encoding, joined as a transformer takes them."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from detr_backbone.backbone.backbone import Backbone
from detr_backbone.backbone.base import BackboneBase
from detr_backbone.backbone.config import BackboneConfig
from detr_backbone.nested_tensor import Images, NestedTensor, Size
from detr_backbone.position_encoding import build_position_encoding


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
