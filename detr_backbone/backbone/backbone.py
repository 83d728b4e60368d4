"""The backbone of a detector by the name of its network."""

import logging
from collections.abc import Sequence

from detr_backbone.backbone.base import TRAINED_STAGES, BackboneBase
from detr_backbone.errors import ConfigError
from detr_backbone.networks.build import build_network
from detr_backbone.networks.layer_paths import expand_paths
from detr_backbone.networks.norms import Norm, set_norm
from detr_backbone.networks.pretraining import Channels, pretraining_of
from detr_backbone.networks.stages import NetworkStages
from detr_backbone.padding.exact import Padding
from detr_backbone.pyramid import PyramidConfig
from detr_backbone.weights.load import WeightsReport, load_weights

logger = logging.getLogger(__name__)


class Backbone(BackboneBase):
    """A classification network of torchvision or timm without its head, with frozen BatchNorm where it has BatchNorm.

    Args:
        name: of a model of torchvision, such as "resnet50", or of timm, such as "timm/tf_efficientnet_lite0".
        weights: None (random), a file, or the name of weights such as "IMAGENET1K_V1", as `locate_weights` takes them.
            DEFAULT is no such name: what it means changes with torchvision.
        in_channels: C of the images; weights of 3 channels are adapted as `adapt_input_weight` says.
        dilation: keep the resolution of layer3 in layer4 (DC5); only ResNets of Bottleneck blocks can.
        norm: what stands where the network has BatchNorm; see BackboneConfig.
        return_interm_layers: return the last layer of every resolution of stride 4 and more, not only of the last.
        return_layers: see BackboneBase; None for the last layer, or all that `return_interm_layers` says.
        train_layers: see BackboneBase; None for all but the stem and the first stage.
        padding, channels_last, checkpointed_layers, pyramid: see BackboneBase.

    Attributes:
        weights: the report of what was loaded; None if nothing was.
        mean, std: of each channel of the images that the network's published weights were trained with, as
            `pretraining_of` gives them; None where that is not known, or `in_channels` is not 3: then they are yours to
            choose.

    >>> backbone = Backbone("resnet18", return_interm_layers=True)
    >>> backbone.strides, backbone.channels
    ((4, 8, 16, 32), (64, 128, 256, 512))
    """

    weights: WeightsReport | None
    mean: Channels | None
    std: Channels | None

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
        pyramid: PyramidConfig | None = None,
    ) -> None:
        from torchvision.models.resnet import ResNet

        network = build_network(name, dilation=dilation, in_channels=in_channels)
        stages = NetworkStages(network)
        return_layers = stages.levels(return_layers, return_interm_layers=return_interm_layers)
        if train_layers is None and isinstance(network, ResNet):
            train_layers = TRAINED_STAGES
        elif train_layers is not None:
            train_layers = expand_paths(network, train_layers, option="train_layers")
        trained = stages.after_first_stage(return_layers) if train_layers is None else train_layers
        if norm == "group" and weights is not None:
            raise ConfigError(
                f"`norm` must not be 'group' with `weights`, got {weights}: GroupNorm does not hold their statistics"
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
            pyramid=pyramid,
            stages=stages,
        )
        pretraining = pretraining_of(name, weights) if in_channels == 3 else None
        self.mean, self.std = (None, None) if pretraining is None else (pretraining.mean, pretraining.std)
        self.weights = None
        if weights is not None:
            self.weights = load_weights(self.body, weights, name=name)
            logger.info("%s: %s", name, self.weights)
