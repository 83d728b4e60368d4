"""The configuration of a backbone and of its position encoding."""

from dataclasses import dataclass, field

from detr_backbone.networks.norms import Norm
from detr_backbone.padding.exact import Padding
from detr_backbone.position_encoding import PositionEncodingConfig
from detr_backbone.pyramid import PyramidConfig


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
