"""Patterns stand for paths of layers, wherever a backbone takes paths."""

from functools import partial

import pytest
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from detr_backbone import BackboneBase
from detr_backbone.errors import ConfigError
from detr_backbone.networks.layer_paths import expand_paths

vit = partial(
    VisionTransformer, patch_size=16, embed_dim=8, depth=12, num_heads=1, num_classes=0, dynamic_img_size=True
)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return vit()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("blocks.[8-11]", ["blocks.8", "blocks.9", "blocks.10", "blocks.11"]),
        ("blocks.[9-10].attn", ["blocks.9.attn", "blocks.10.attn"]),
        ("blocks.[3-3]", ["blocks.3"]),
        ("*_embed", ["patch_embed"]),
        ("blocks.11.mlp.fc*", ["blocks.11.mlp.fc1", "blocks.11.mlp.fc2"]),
        ("blocks.[10-11].norm*", ["blocks.10.norm1", "blocks.10.norm2", "blocks.11.norm1", "blocks.11.norm2"]),
        ("norm", ["norm"]),
    ],
)
def test_a_pattern_stands_for_numbers_and_names(network: nn.Module, pattern: str, expected: list[str]) -> None:
    assert expand_paths(network, [pattern], option="train_layers") == expected


def test_a_star_stands_for_one_name_and_not_for_what_is_inside_of_it(network: nn.Module) -> None:
    assert expand_paths(network, ["blocks.*"], option="train_layers") == [f"blocks.{index}" for index in range(12)]


@pytest.mark.parametrize("pattern", ["stages.*", "blocks.[3-5].conv*"])
def test_a_pattern_that_fits_nothing_is_refused(network: nn.Module, pattern: str) -> None:
    with pytest.raises(ConfigError) as error:
        expand_paths(network, ["norm", pattern], option="return_layers")

    assert "`return_layers`" in str(error.value)
    assert repr(pattern) in str(error.value)


@pytest.mark.parametrize("pattern", ["blocks.[11-8]", "blocks.[8,11]", "blocks.[8", "blocks.[a-c]"])
def test_brackets_without_ascending_numbers_are_refused(network: nn.Module, pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"`train_layers`.*\[8-11\]"):
        expand_paths(network, [pattern], option="train_layers")


def test_numbers_beyond_the_last_layer_are_refused_and_not_cut() -> None:
    with pytest.raises(ConfigError, match=r"`train_layers`.*blocks\.12"):
        BackboneBase(vit(), train_layers=["blocks.[8-12]"], padding="zeros")


def test_a_backbone_trains_returns_and_checkpoints_layers_by_pattern() -> None:
    backbone = BackboneBase(
        vit(),
        train_layers=["blocks.[10-11].attn"],
        return_layers=["blocks.[9-11]"],
        checkpointed_layers=["blocks.[10-11]"],
        padding="zeros",
    )
    trained = {name.partition(".attn.")[0] for name, p in backbone.body.named_parameters() if p.requires_grad}

    assert list(backbone.body.return_layers) == ["blocks.9", "blocks.10", "blocks.11"]
    assert trained == {"blocks.10", "blocks.11"}
