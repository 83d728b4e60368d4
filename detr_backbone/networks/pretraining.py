"""What the published weights of a network were trained with: the mean and std of their images."""

from collections.abc import Sequence
from dataclasses import dataclass

from detr_backbone.networks.build import TIMM

Channels = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """The images that weights were trained with.

    Attributes:
        mean, std: of each channel, red first, for values in 0 .. 1.
        source: of the weights: "torchvision", or timm's tag for them.
    """

    mean: Channels
    std: Channels
    source: str


def pretraining_of(name: str, weights: str | None = None) -> Pretraining | None:
    """Return what the published weights of a network were trained with; None if its library does not say.

    Networks of timm have several weights, and some of them were trained otherwise than the rest: the name says which,
    as in timm/vit_base_patch16_224.dino. Without a tag they are timm's default.

    Args:
        name: of a network that `build_network` builds.
        weights: the name of its weights in torchvision; anything else is taken for a copy of those.
    """
    if name.startswith(TIMM):
        import timm

        config = timm.get_pretrained_cfg(name.removeprefix(TIMM))
        if config is None or not config.has_weights or len(config.mean) != 3:
            return None
        return Pretraining(mean=_channels(config.mean), std=_channels(config.std), source=f"timm's {config.tag}")
    from torchvision.models import get_model_weights

    members = {member.name: member.transforms() for member in get_model_weights(name)}
    chosen = [members[weights]] if weights in members else list(members.values())
    found = {(_channels(transforms.mean), _channels(transforms.std)) for transforms in chosen}
    if len(found) != 1:
        return None
    ((mean, std),) = found
    return Pretraining(mean=mean, std=std, source="torchvision")


def _channels(values: Sequence[float]) -> Channels:
    red, green, blue = map(float, values)
    return red, green, blue
