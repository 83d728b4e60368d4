"""The backbone of a detector: a frozen-BN ResNet, its feature levels with their masks, and their position encodings."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from detr_backbone.activation_checkpointing import checkpoint_layers
from detr_backbone.errors import ConfigError
from detr_backbone.folding import fold_frozen_batch_norm
from detr_backbone.layer_getter import IntermediateLayerGetter
from detr_backbone.nested_tensor import NestedTensor, as_nested_tensor, pad_to_multiple, size_of, valid_sizes
from detr_backbone.networks.build import build_network, train_only
from detr_backbone.networks.geometry import as_map, measure
from detr_backbone.networks.norms import Norm, set_norm
from detr_backbone.networks.stages import Survey
from detr_backbone.networks.weights import WeightsReport, load_weights
from detr_backbone.padding.by_size import each_image, is_faster_image_by_image, together
from detr_backbone.padding.exact import ExactPadding, Padding, feature_level, refuse_leaky_layers
from detr_backbone.padding.trial import find_leak, is_plain_resnet
from detr_backbone.position_encoding import PositionEncodingConfig, build_position_encoding

logger = logging.getLogger(__name__)

TRAINED_STAGES = ("layer2", "layer3", "layer4")
"""What DETR trains; the stem and the first stage stay as pretrained (arXiv 2005.12872, section A.4)."""


class BackboneBase(nn.Module):
    """Feature levels with their masks, finest first, of a network.

    Args:
        backbone: the network, with FrozenBatchNorm2d where it normalises.
        return_interm_layers: return the last layer of every resolution of stride 4 and more, not only of the last.
        return_layers: the general form: any layers by path, in any order; contradicts `return_interm_layers`.
        train_layers: paths of the layers whose parameters train; all others are frozen. Empty freezes all.
        padding: "exact" makes an image's features independent of who shares its batch, and refuses a network for which
            it cannot; "zeros" reproduces the original code (facebookresearch/detr), where padding leaks into the image.
        channels_last: compute with the channels of a cell side by side in memory, which convolutions are faster with.
        checkpointed_layers: paths of layers whose inner activations are computed again in the backward pass.

    Attributes:
        body: the IntermediateLayerGetter, with frozen BatchNorms folded (see `folding`); state-dict keys are `body.*`.
        strides, channels: one entry per level, measured, finest level first.
        num_channels: channels of the coarsest level.
        input_strides: pixels per cell of what each inner layer takes, by path.
        size_divisor: a batch is padded to sides that it divides before it runs through the network; 1 for a ResNet, the
            coarsest stride for a network that would round sizes down, or whose windows follow the size of the image.

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
        checkpointed_layers: Sequence[str] = (),
    ) -> None:
        super().__init__()
        return_layers = Survey(backbone).levels(return_layers, return_interm_layers=return_interm_layers)
        if padding not in ("exact", "zeros"):
            raise ConfigError(f"`padding` must be 'exact' or 'zeros', got {padding!r}")
        if len(set(return_layers)) < len(return_layers):
            raise ConfigError(f"`return_layers` must name each layer once, got {list(return_layers)}")
        train_only(backbone, train_layers)
        prefix_tokens = int(getattr(backbone, "num_prefix_tokens", 0))
        tried = padding == "exact" and not is_plain_resnet(backbone)
        depth = {path: index for index, (path, _) in enumerate(backbone.named_modules())}
        ordered = sorted(return_layers, key=lambda path: depth.get(path, len(depth)))
        try:
            self.body = IntermediateLayerGetter(backbone, {name: str(level) for level, name in enumerate(ordered)})
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if train_layers and not any(parameter.requires_grad for parameter in self.body.parameters()):
            raise ConfigError(
                f"`train_layers` must name none or layers that lead to {list(return_layers)}, got {list(train_layers)}"
            )
        if padding == "exact":
            refuse_leaky_layers(self.body, all_run=self.body.strategy != "hooks")
        measured = measure(self.body, prefix_tokens=prefix_tokens)
        self.strides = tuple(measured.strides.values())
        self.channels = tuple(measured.channels.values())
        self.num_channels = self.channels[-1]
        self.input_strides = measured.input_strides
        self.padding = padding
        self.size_divisor = 1 if measured.rounds_up else measured.coarsest
        self._layouts = tuple(measured.layouts.values())
        self._exact_padding = ExactPadding(self.body, measured.input_strides) if padding == "exact" else None
        self._memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.body.to(memory_format=self._memory_format)
        if (leak := tried and find_leak(self.forward, self.body)) and self.size_divisor == 1:
            self.size_divisor = measured.coarsest  # windows that follow the size of the image find it always even
            leak = find_leak(self.forward, self.body)
        if leak:
            raise ConfigError(f"`padding` must be 'zeros' for this network, got 'exact': {leak}")
        fold_frozen_batch_norm(self.body)
        checkpoint_layers(self.body, checkpointed_layers, self._exact_padding)

    def prepared(self, images: NestedTensor | Tensor | Sequence[Tensor]) -> NestedTensor:
        """What `forward` takes, as the batch that runs through the network: with sides that `size_divisor` divides."""
        return pad_to_multiple(as_nested_tensor(images), self.size_divisor)

    def forward(self, images: NestedTensor | Tensor | Sequence[Tensor]) -> dict[str, NestedTensor]:
        """Levels [B, C, h, w] with their masks under "0", "1", …, finest first; h = ceil(H / stride).

        Args:
            images: a NestedTensor; or what makes one: images [C, h, w] of any sizes, or a batch [B, C, H, W].
        """
        images = as_nested_tensor(images)
        exact = self._exact_padding
        if exact and self.size_divisor == 1 and is_faster_image_by_image(images) and not exact.is_watched(self.body):
            return together([BackboneBase.forward(self, image) for image in each_image(images)], images, self.strides)
        batch = self.prepared(images)
        with exact.around(batch) if exact else nullcontext():
            outputs = self.body(batch.tensors.to(memory_format=self._memory_format))
        levels = {}
        for (name, output), layout in zip(outputs.items(), self._layouts, strict=True):
            cells = as_map(output, layout, size_of(batch.tensors))
            ((h, w),) = valid_sizes([size_of(images.tensors)], layout.stride)
            levels[name] = feature_level(cells[:, :, :h, :w], images, stride=layout.stride, padding=self.padding)
        return levels


class Backbone(BackboneBase):
    """A classification network of torchvision or timm without its head, with frozen BatchNorm where it has BatchNorm.

    Args:
        name: of a model of torchvision, such as "resnet50", or of timm, such as "timm/tf_efficientnet_lite0".
        weights: None (random), the name of torchvision weights such as "IMAGENET1K_V1", or the path of a local file,
            as `load_weights` takes them. DEFAULT is no such name: what it means changes with torchvision.
        in_channels: C of the images; weights of 3 channels are adapted as `adapt_input_weight` says.
        dilation: keep the resolution of layer3 in layer4 (DC5); only ResNets of Bottleneck blocks can.
        norm: what stands where the network has BatchNorm; see BackboneConfig.
        return_interm_layers: return the last layer of every resolution of stride 4 and more, not only of the last.
        return_layers: see BackboneBase; None for the last layer, or all that `return_interm_layers` says.
        train_layers: see BackboneBase; None for all but the stem and the first stage.
        padding, channels_last, checkpointed_layers: see BackboneBase.

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
        in_channels: int = 3,
        dilation: bool = False,
        norm: Norm = "frozen",
        return_interm_layers: bool = False,
        return_layers: Sequence[str] | None = None,
        train_layers: Sequence[str] | None = None,
        padding: Padding = "exact",
        channels_last: bool = True,
        checkpointed_layers: Sequence[str] = (),
    ) -> None:
        from torchvision.models.resnet import ResNet

        network = build_network(name, dilation=dilation, in_channels=in_channels)
        survey = Survey(network)
        return_layers = survey.levels(return_layers, return_interm_layers=return_interm_layers)
        if train_layers is None and isinstance(network, ResNet):
            train_layers = TRAINED_STAGES
        trained = survey.after_first_stage(return_layers) if train_layers is None else train_layers
        if norm == "group" and weights is not None:
            raise ConfigError(
                f"`norm` must not be 'group' with `weights`, got {weights}: GroupNorm has no place for their statistics"
            )
        set_norm(network, norm, train_layers=trained)
        if train_layers is None:  # frozen norms have nothing to train
            train_layers = [path for path in trained if any(True for _ in network.get_submodule(path).parameters())]
        super().__init__(
            network,
            return_layers=return_layers,
            train_layers=train_layers,
            padding=padding,
            channels_last=channels_last,
            checkpointed_layers=checkpointed_layers,
        )
        self.weights = None
        if weights is not None:
            self.weights = load_weights(self.body, weights, name=name)
            logger.info("%s: %s", name, self.weights)


class Joiner(nn.Sequential):
    """A backbone and a position encoding, joined: levels and their positions, as a transformer takes them.

    `joiner[0]` is the backbone, `joiner[1]` the position encoding; keys are published checkpoints' (`0.body.*`).

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
        name: a model of torchvision, such as resnet50, or of timm, such as timm/tf_efficientnet_lite0.
        weights: null (random), a torchvision weights name such as IMAGENET1K_V1, or the path of a local file; a network
            of timm takes files only.
        in_channels: channels of the images; pretrained weights of 3 are summed for 1, repeated and scaled for more.
        return_layers: the layers that become levels, by path; null for the last stage ([layer4] of a ResNet).
        train_layers: the layers that train; [] freezes the whole backbone; null for all but the stem and the first
            stage ([layer2, layer3, layer4] of a ResNet).
        norm: what stands where the network has BatchNorm. frozen: its statistics and affine parameters, for ever.
            batch, sync: it learns, on each device or across them, in the layers that train. group: GroupNorm of 32
            groups, for training without pretrained weights. The last three need `padding: zeros`.
        dilation: DC5, layer4 at the resolution of layer3; only for ResNets of Bottleneck blocks.
        padding: exact, or zeros as in the original code, where an image's features depend on its batch.
        channels_last: the memory format of convolutions, faster on most devices than the other.
        checkpointed_layers: layers whose inner activations are computed again in the backward pass, to save memory.
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
        in_channels=config.in_channels,
        norm=config.norm,
        dilation=config.dilation,
        return_layers=config.return_layers,
        train_layers=config.train_layers,
        padding=config.padding,
        channels_last=config.channels_last,
        checkpointed_layers=config.checkpointed_layers,
    )
    return Joiner(backbone, position_encoding)
