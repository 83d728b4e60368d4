"""The mean and std that a network was trained with are read from its library, and another normalisation is told."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torchvision.models import ResNet50_Weights

from detr_backbone import Backbone, BackboneConfig
from detr_backbone.coco.transforms import TransformConfig
from detr_backbone.detectors import DetectorConfig
from detr_backbone.errors import ConfigError
from detr_backbone.networks.build import build_network
from detr_backbone.networks.pretraining import pretraining_of
from detr_backbone.training import DataConfig, TrainConfig, check_normalisation

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # openai/CLIP, clip/clip.py


def config_of(name: str, weights: str | None = "w.pth", **transforms: Any) -> TrainConfig:
    return TrainConfig(
        detector=DetectorConfig(backbone=BackboneConfig(name=name, weights=weights)),
        data=DataConfig(transforms=replace(TransformConfig(), **transforms)),
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50", IMAGENET),
        ("timm/resnet18", IMAGENET),
        ("timm/vit_small_patch14_dinov2", IMAGENET),
        ("timm/vit_small_patch16_dinov3", IMAGENET),
        ("timm/tf_efficientnet_lite0", HALF),
        ("timm/vit_base_patch16_224", HALF),
        ("timm/vit_base_patch16_224.dino", IMAGENET),
        ("timm/vit_base_patch16_clip_224.openai", CLIP),
    ],
)
def test_mean_and_std_are_those_of_the_published_weights(name: str, expected: tuple[tuple[float, ...], ...]) -> None:
    pretraining = pretraining_of(name)

    assert pretraining is not None
    assert (pretraining.mean, pretraining.std) == expected


def test_weights_of_torchvision_say_their_own() -> None:
    transforms = ResNet50_Weights.IMAGENET1K_V2.transforms()
    pretraining = pretraining_of("resnet50", "IMAGENET1K_V2")

    assert pretraining is not None
    assert (list(pretraining.mean), list(pretraining.std)) == (transforms.mean, transforms.std)


def test_a_network_without_published_weights_says_none() -> None:
    assert pretraining_of("timm/coatnet_0_224") is None


def test_a_backbone_says_what_its_weights_were_trained_with() -> None:
    backbone = Backbone("resnet18", padding="zeros")

    assert (backbone.mean, backbone.std) == IMAGENET


def test_a_backbone_of_other_channels_knows_no_mean_and_std() -> None:
    backbone = Backbone("resnet18", in_channels=4, padding="zeros")

    assert (backbone.mean, backbone.std) == (None, None)


def test_a_tag_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"`name`.*resnet18\.a9_in1k.*resnet18\.a1_in1k"):
        build_network("timm/resnet18.a9_in1k")


@pytest.mark.parametrize(
    ("name", "transforms", "expected"),
    [
        ("timm/tf_efficientnet_lite0", {}, HALF),
        ("timm/tf_efficientnet_lite0", {"mean": HALF[0]}, HALF),
        ("resnet50", {"std": (1 / 255,) * 3}, IMAGENET),
    ],
)
def test_another_normalisation_is_told_once_with_the_key_and_all_values(
    name: str, transforms: dict[str, Any], expected: tuple[tuple[float, ...], ...]
) -> None:
    config = config_of(name, **transforms)
    with pytest.warns(UserWarning, match="normalised otherwise") as caught:
        check_normalisation(config)
    (message,) = (str(warning.message) for warning in caught)

    assert "key=data.transforms" in message
    assert f"mean {list(config.data.transforms.mean)} std {list(config.data.transforms.std)}" in message
    assert f"mean {list(expected[0])} std {list(expected[1])}" in message
    assert name in message


@pytest.mark.parametrize(
    "config",
    [
        config_of("resnet50"),
        config_of("timm/tf_efficientnet_lite0", mean=HALF[0], std=HALF[1]),
        config_of("timm/vit_base_patch16_clip_224.openai", mean=(0.481, 0.458, 0.408), std=(0.269, 0.261, 0.276)),
        config_of("timm/tf_efficientnet_lite0", None),
        config_of("timm/coatnet_0_224"),
    ],
    ids=["the same", "set", "three digits", "random weights", "not known"],
)
def test_nothing_is_told_where_nothing_is_known_to_differ(config: TrainConfig) -> None:
    check_normalisation(config)  # warnings are errors in the tests


def test_files_of_recipes_normalise_as_their_weights_were_trained() -> None:
    from detr_backbone.training import parse_config

    for file in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")):
        check_normalisation(parse_config(["--config", str(file)]))
