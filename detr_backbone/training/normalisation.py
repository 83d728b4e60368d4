"""Whether pictures are normalised as those were that the weights of a backbone were trained with."""

import math
import warnings
from typing import TypeAlias

from detr_backbone.coco.transforms import TransformConfig
from detr_backbone.networks.pretraining import Pretraining, pretraining_of
from detr_backbone.training.config import TrainConfig

_TOLERANCE = 0.01
"""Of a value: three digits of it differ by less."""

_Normalisation: TypeAlias = TransformConfig | Pretraining


def check_normalisation(config: TrainConfig, *, trained: TrainConfig | None = None) -> None:
    """Warn if `data.transforms` normalises otherwise than the weights were trained; switch nothing.

    Args:
        config: how pictures are normalised now.
        trained: the configuration of the run that the detector comes from; None for one that starts from the published
            weights of its backbone.
    """
    got = config.data.transforms
    if trained is not None and not _is_close(got, trained.data.transforms):
        _warn(got, trained.data.transforms, "training", "as in the checkpoint", "leave both out")
        return
    backbone = config.detector.backbone
    pretraining = None if backbone.weights is None else pretraining_of(backbone.name, backbone.weights)
    if pretraining is not None and not _is_close(got, pretraining):
        source = f"of {backbone.name} ({pretraining.source})"
        _warn(
            got, pretraining, "pretraining", source, "set both, or name the weights that you have, as in timm/NAME.TAG"
        )


def _is_close(first: _Normalisation, second: _Normalisation) -> bool:
    pairs = zip((*first.mean, *first.std), (*second.mean, *second.std), strict=True)
    return all(math.isclose(a, b, rel_tol=_TOLERANCE) for a, b in pairs)


def _warn(got: _Normalisation, expected: _Normalisation, when: str, source: str, fix: str) -> None:
    warnings.warn(
        f"images are normalised otherwise than in {when} | where: key=data.transforms | got mean {list(got.mean)} std "
        f"{list(got.std)} expected mean {list(expected.mean)} std {list(expected.std)} {source} | fix: {fix}",
        stacklevel=3,
    )
