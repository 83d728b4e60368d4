"""The backbone of a detector: a frozen-BN ResNet, its feature levels with their masks, and their position encodings."""

import logging
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
import torchvision
from torch import Tensor, nn

from detr_backbone.errors import ConfigError
from detr_backbone.folding import fold_frozen_batch_norm
from detr_backbone.frozen_batch_norm import FrozenBatchNorm2d
from detr_backbone.layer_getter import IntermediateLayerGetter, unknown_name
from detr_backbone.nested_tensor import NestedTensor, as_nested_tensor
from detr_backbone.padding import ExactPadding, Padding, feature_level, measure
from detr_backbone.position_encoding import PositionEncodingConfig, build_position_encoding
from detr_backbone.weights import WeightsReport, load_weights

logger = logging.getLogger(__name__)

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
STAGES = ("layer1", "layer2", "layer3", "layer4")
TRAINED_STAGES = ("layer2", "layer3", "layer4")
"""What DETR trains; the stem and the first stage stay as pretrained (arXiv 2005.12872, section A.4)."""


class BackboneBase(nn.Module):
    """Feature levels with their masks, finest first, of a network.

    Args:
        backbone: the network, with FrozenBatchNorm2d where it normalises.
        return_interm_layers: return all four stages of a ResNet instead of the last.
        return_layers: the general form: any layers by path, in any order; contradicts `return_interm_layers`.
        train_layers: paths of the layers whose parameters train; all others are frozen. Empty freezes all.
        padding: "exact" makes an image's features independent of who shares its batch, and refuses a network for which
            it cannot; "zeros" reproduces the original code (facebookresearch/detr), where padding leaks into the image.
        channels_last: compute with the channels of a cell side by side in memory, which convolutions are faster with.

    Attributes:
        body: the IntermediateLayerGetter; state-dict keys are `body.*`. Its frozen BatchNorms are folded into the
            convolutions before them, whose outputs are then the norms'; see `folding`.
        strides, channels: one entry per level, measured, finest level first.
        num_channels: channels of the coarsest level.
        input_strides: pixels per cell of what each inner layer takes, by path.

    Raises:
        ConfigError: a layer does not exist, an entry of `train_layers` has no parameters, nothing that is left trains,
            options contradict, or the network cannot be exact.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        return_interm_layers: bool = False,
        return_layers: Sequence[str] | None = None,
        train_layers: Sequence[str] = TRAINED_STAGES,
        padding: Padding = "exact",
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if return_layers is not None and return_interm_layers:
            raise ConfigError(f"give `return_interm_layers` or `return_layers`, got both: {list(return_layers)}")
        if return_layers is None:
            return_layers = STAGES if return_interm_layers else STAGES[-1:]
        if padding not in ("exact", "zeros"):
            raise ConfigError(f"`padding` must be 'exact' or 'zeros', got {padding!r}")
        if len(set(return_layers)) < len(return_layers):
            raise ConfigError(f"`return_layers` must name each layer once, got {list(return_layers)}")
        _train_only(backbone, train_layers)
        depth = {path: index for index, (path, _) in enumerate(backbone.named_modules())}
        ordered = sorted(return_layers, key=lambda path: depth.get(path, len(depth)))
        try:
            self.body = IntermediateLayerGetter(backbone, {name: str(level) for level, name in enumerate(ordered)})
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if train_layers and not any(parameter.requires_grad for parameter in self.body.parameters()):
            raise ConfigError(
                f"`train_layers` must name a layer that leads to {list(return_layers)}, got {list(train_layers)}; to "
                "train nothing, give none"
            )
        measured = measure(self.body)
        self.strides = tuple(measured.strides.values())
        self.channels = tuple(measured.channels.values())
        self.num_channels = self.channels[-1]
        self.input_strides = measured.input_strides
        self.padding = padding
        self._exact_padding = ExactPadding(self.body, measured.input_strides) if padding == "exact" else None
        fold_frozen_batch_norm(self.body, except_for=[backbone.get_submodule(path) for path in ordered])
        self._memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.body.to(memory_format=self._memory_format)

    def forward(self, images: NestedTensor | Tensor | Sequence[Tensor]) -> dict[str, NestedTensor]:
        """Levels [B, C, h, w] with their masks under "0", "1", …, finest first.

        Args:
            images: a NestedTensor; or what makes one: images [C, h, w] of any sizes, or a batch [B, C, H, W].
        """
        images = as_nested_tensor(images)
        with nullcontext() if self._exact_padding is None else self._exact_padding.around(images):
            features = self.body(images.tensors.to(memory_format=self._memory_format))
        return {
            name: feature_level(tensors, images, stride=stride, padding=self.padding)
            for (name, tensors), stride in zip(features.items(), self.strides, strict=True)
        }


class Backbone(BackboneBase):
    """A ResNet of torchvision with frozen BatchNorm.

    Args:
        name: one of resnet18, resnet34, resnet50, resnet101.
        weights: None (random), the name of torchvision weights such as "IMAGENET1K_V1", or the path of a local file,
            as `load_weights` takes them. DEFAULT is no such name: what it means changes with torchvision.
        dilation: keep the resolution of layer3 in layer4 (DC5); only networks of Bottleneck blocks can.
        return_interm_layers, return_layers, train_layers, padding, channels_last: see BackboneBase.

    Attributes:
        weights: the report of what was loaded; None if nothing was.

    >>> backbone = Backbone("resnet18", return_interm_layers=True)
    >>> backbone.strides, backbone.channels
    ((4, 8, 16, 32), (64, 128, 256, 512))
    """

    weights: WeightsReport | None

    def __init__(
        self,
        name: str,
        *,
        weights: str | None = None,
        dilation: bool = False,
        return_interm_layers: bool = False,
        return_layers: Sequence[str] | None = None,
        train_layers: Sequence[str] = TRAINED_STAGES,
        padding: Padding = "exact",
        channels_last: bool = True,
    ) -> None:
        if name not in RESNETS:
            raise ConfigError(f"`name` must be a ResNet: {unknown_name(name, RESNETS)}")
        if dilation and name in ("resnet18", "resnet34"):
            raise ConfigError(f"`dilation` needs Bottleneck blocks, which {name} lacks; use resnet50 or resnet101")
        network = torchvision.models.get_model(
            name,
            weights=None,
            norm_layer=FrozenBatchNorm2d,
            replace_stride_with_dilation=[False, False, dilation],
        )
        super().__init__(
            network,
            return_interm_layers=return_interm_layers,
            return_layers=return_layers,
            train_layers=train_layers,
            padding=padding,
            channels_last=channels_last,
        )
        self.weights = None
        if weights is not None:
            self.weights = load_weights(self.body, weights, name=name)
            logger.info("%s: %s", name, self.weights)


class Joiner(nn.Sequential):
    """A backbone and a position encoding, joined: levels and their positions, as a transformer takes them.

    It is an nn.Sequential, so that `joiner[0]` is the backbone, `joiner[1]` the position encoding, and state-dict keys
    are those of published checkpoints (`0.body.*`).

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

    def forward(self, images: NestedTensor | Tensor | Sequence[Tensor]) -> tuple[list[NestedTensor], list[Tensor]]:
        """Levels and positions [B, hidden_dim, h, w] in the levels' dtype, finest first."""
        features = list(cast(dict[str, NestedTensor], self[0](images)).values())
        return features, [self[1](level).to(level.tensors.dtype) for level in features]


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A backbone by name.

    Args:
        name: resnet18, resnet34, resnet50 or resnet101.
        weights: null (random), a torchvision weights name such as IMAGENET1K_V1, or the path of a local file.
        return_layers: the stages that become levels: [layer4], all four, or any subset.
        train_layers: the stages that train; [] freezes the whole backbone.
        dilation: DC5, layer4 at the resolution of layer3; not for resnet18 and resnet34.
        padding: exact, or zeros as in the original code, where an image's features depend on its batch.
        channels_last: the memory format of convolutions, faster on most devices than the other.
        position_encoding: how positions are encoded.
        hidden_dim: channels of the position encodings, and of the detector that reads them.
    """

    name: str = "resnet50"
    weights: str | None = None
    return_layers: tuple[str, ...] = ("layer4",)
    train_layers: tuple[str, ...] = TRAINED_STAGES
    dilation: bool = False
    padding: Padding = "exact"
    channels_last: bool = True
    position_encoding: PositionEncodingConfig = field(default_factory=PositionEncodingConfig)
    hidden_dim: int = 256


def build_backbone(config: BackboneConfig) -> Joiner:
    """The backbone that `config` describes.

    Raises:
        ConfigError: an unknown name, or options that contradict each other.
        WeightsError: the weights cannot be loaded completely.
    """
    position_encoding = build_position_encoding(config.position_encoding, config.hidden_dim)
    backbone = Backbone(
        config.name,
        weights=config.weights,
        dilation=config.dilation,
        return_layers=config.return_layers,
        train_layers=config.train_layers,
        padding=config.padding,
        channels_last=config.channels_last,
    )
    return Joiner(backbone, position_encoding)


def _train_only(network: nn.Module, train_layers: Iterable[str]) -> None:
    network.requires_grad_(requires_grad=False)
    for path in train_layers:
        parameters = [p for name, p in network.named_parameters() if f"{name}.".startswith(f"{path}.")]
        if not parameters:
            known = [name for name, child in network.named_children() if any(True for _ in child.parameters())]
            raise ConfigError(f"`train_layers` must name layers with parameters: {unknown_name(path, known)}")
        for parameter in parameters:
            parameter.requires_grad_()
