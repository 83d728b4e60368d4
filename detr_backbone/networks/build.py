"""Networks by name, from torchvision and timm, and where in them the resolution changes.

Nothing about a network is typed into a table: layers, strides and channels are seen in a dry run.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from torch import nn

from detr_backbone.errors import ConfigError, refuse_single_name, unknown_name
from detr_backbone.networks.input_channels import adapt_input

TIMM = "timm/"
"""Prefix of the names of timm's models."""
_SLOW_TO_DRAW = ("googlenet", "inception_v3")  # torchvision announces that it will not draw their weights as it does


def build_network(name: str, *, dilation: bool = False, in_channels: int = 3) -> nn.Module:
    """Return a classification network with random weights, as its library builds it.

    Args:
        name: of a model of torchvision, such as "resnet50", or of timm, such as "timm/tf_efficientnet_lite0", which is
            built for images of any size where it can be, and without its classifier. The tag of its weights may follow
            (timm/vit_base_patch16_224.dino): it tells the mean and std of their images.
        dilation: keep the resolution of layer3 in layer4 (DC5); only torchvision's ResNets of Bottleneck blocks can.
        in_channels: C of the images; the first convolution is adapted as `adapt_input_weight` says.

    Raises:
        ConfigError: there is no such model, timm is not installed, or the network cannot have an option.
    """
    from torchvision.models import get_model
    from torchvision.models.resnet import Bottleneck, ResNet

    network = _timm_network(name.removeprefix(TIMM)) if name.startswith(TIMM) else _torchvision_network(name)
    if dilation:
        if not isinstance(network, ResNet) or not isinstance(network.layer4[0], Bottleneck):
            raise ConfigError(f"`dilation` needs Bottleneck blocks, which {name} lacks; use a ResNet from resnet50 on")
        network = get_model(name, weights=None, replace_stride_with_dilation=[False, False, True])
    if in_channels != 3:
        adapt_input(network, in_channels)
    return network


def _torchvision_network(name: str) -> nn.Module:
    from torchvision import models

    known = models.list_models(models)
    if name not in known:
        raise ConfigError(f"`name` must be a model of torchvision, or timm/NAME: {_unknown_model(name, known)}")
    options: dict[str, Any] = {"init_weights": False} if name in _SLOW_TO_DRAW else {}
    return cast(nn.Module, models.get_model(name, weights=None, **options))


def _timm_network(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"timm/{name} needs timm: pip install 'detr_backbone[timm]'") from error
    if not timm.is_model(name):
        raise ConfigError(f"`name` must be timm/ and a model of timm: {_unknown_model(name, timm.list_models())}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
        raise ConfigError(f"`name` must be timm/ and a model of timm: {unknown_name(name, known)}") from error
    refused: TypeError | None = None
    create: Callable[..., nn.Module] = timm.create_model
    for options in ({"dynamic_img_size": True}, {"strict_img_size": False}, {}):  # the first two for transformers
        try:
            return create(name, pretrained=False, num_classes=0, **options)
        except TypeError as error:  # the constructor does not take the option
            refused = error
    raise ConfigError(f"timm cannot build {name}: {refused}") from refused


def _unknown_model(name: str, known: Sequence[str]) -> str:
    """Return what to tell a user who asked for a model that does not exist: those of its family, not all thousand."""
    letters = re.match("[a-z]*", name)
    family = [other for other in known if letters and other.startswith(letters[0])][:20]
    return unknown_name(name, family or [known[0], "…", known[-1]], also=known)


def train_only(network: nn.Module, train_layers: Iterable[str]) -> None:
    """Let the parameters of these layers train, by path, and freeze all others.

    Args:
        network: all of it that trains are these layers afterwards.
        train_layers: paths, as `expand_paths` gives them.

    Raises:
        ConfigError: a layer does not exist or has no parameters.
    """
    refuse_single_name("train_layers", train_layers)
    network.requires_grad_(requires_grad=False)
    for path in train_layers:
        parameters = [p for name, p in network.named_parameters() if f"{name}.".startswith(f"{path}.")]
        if not parameters:
            known = [name for name, child in network.named_children() if any(True for _ in child.parameters())]
            raise ConfigError(f"`train_layers` must name layers with parameters: {unknown_name(path, known)}")
        for parameter in parameters:
            parameter.requires_grad_()
