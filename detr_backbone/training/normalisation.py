"""Whether pictures are normalised as those were that the weights of a backbone were trained with."""

import math
import warnings

from detr_backbone.networks.pretraining import pretraining_of
from detr_backbone.training.config import TrainConfig

_TOLERANCE = 0.01
"""Of a value: three digits of it differ by less."""


def check_normalisation(config: TrainConfig) -> None:
    """Warn if `data.transforms` normalises otherwise than the weights of the backbone were trained; switch nothing."""
    backbone, transforms = config.detector.backbone, config.data.transforms
    pretraining = None if backbone.weights is None else pretraining_of(backbone.name, backbone.weights)
    if pretraining is None:
        return
    got, expected = transforms.mean + transforms.std, pretraining.mean + pretraining.std
    if not all(math.isclose(a, b, rel_tol=_TOLERANCE) for a, b in zip(got, expected, strict=True)):
        warnings.warn(
            "images are normalised otherwise than in pretraining | where: key=data.transforms | got mean "
            f"{list(transforms.mean)} std {list(transforms.std)} expected mean {list(pretraining.mean)} std "
            f"{list(pretraining.std)} of {backbone.name} ({pretraining.source}) | fix: set both, or name the "
            "weights that you have, as in timm/NAME.TAG",
            stacklevel=2,
        )
