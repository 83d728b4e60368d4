"""What is no image, or no list of layers, is refused with one error that says what came and what is expected."""

import math

import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from detr_backbone import Backbone, BackboneConfig, IntermediateLayerGetter, build_backbone
from detr_backbone.activation_checkpointing import checkpoint_layers
from detr_backbone.errors import ConfigError
from detr_backbone.forward_pass import PerThread
from detr_backbone.networks.build import train_only

IMAGE = torch.zeros(3, 32, 32)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone("resnet18", return_layers=["layer1"], train_layers=[])


REFUSED = {
    "0 to 255": ([IMAGE + 200], r"images\[0\] must be normalised, .* got 200 to 200"),
    "0 to 255, as a batch": (IMAGE[None] + 200, r"images\[0\] must be normalised"),
    "NaN": ([IMAGE, IMAGE + math.nan], r"images\[1\] must be finite, got values from nan to nan"),
    "infinity": ([IMAGE - math.inf], r"images\[0\] must be finite, got values from -inf"),
    "[h, w, C]": ([torch.zeros(32, 40, 3)], r"must have 3 channels .* got \[1, 32, 40, 3\]; .* permute\(2, 0, 1\)"),
    "[h, w, C], two sizes": ([torch.zeros(32, 40, 3), torch.zeros(48, 40, 3)], r"channels .* 32, got 48; .* permute"),
    "another number of channels": ([torch.zeros(4, 32, 32)], r"must have 3 channels .* got \[1, 4, 32, 32\]$"),
    "float64": ([IMAGE.double()], r"dtype of the network, torch\.float32, got torch\.float64"),
    "float64 beside float32": ([IMAGE, IMAGE.double()], r"images\[1\] must have the dtype of images\[0\]"),
    "uint8": ([IMAGE.to(torch.uint8)], r"images\[0\] must be floating point, normalised, got torch\.uint8"),
    "an array": (np.zeros((3, 32, 32)), "must be a list of tensors .* got ndarray"),
}


@pytest.mark.parametrize(("images", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_image_is_refused(backbone: Backbone, images: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        backbone(images)


@pytest.mark.parametrize("image", [IMAGE + 1, IMAGE - 120, torch.linspace(-123, 151, 3 * 32 * 32).view(3, 32, 32)])
def test_images_in_the_range_of_some_weights_are_taken(backbone: Backbone, image: torch.Tensor) -> None:
    assert backbone([image])["0"].tensors.shape == (1, 64, 8, 8)


def test_float32_images_are_taken_under_autocast(backbone: Backbone) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert backbone([IMAGE])["0"].tensors.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "option"),
    [
        (lambda: Backbone("resnet18", return_layers="layer4"), "return_layers"),
        (lambda: build_backbone(BackboneConfig(name="resnet18", return_layers="layer4")), "return_layers"),
        (lambda: IntermediateLayerGetter(resnet18(), "layer4"), "return_layers"),
        (lambda: train_only(resnet18(), "layer4"), "train_layers"),
        (lambda: checkpoint_layers(resnet18(), "layer4", PerThread()), "checkpointed_layers"),
    ],
)
def test_one_name_where_a_list_is_expected_shows_the_list(call, option: str) -> None:
    with pytest.raises(ConfigError, match=rf"`{option}` must be a list of names, such as \['layer4'\], got 'layer4'"):
        call()


def test_a_name_is_no_configuration() -> None:
    with pytest.raises(TypeError, match=r"`config` must be a BackboneConfig, .*name=.*, got 'resnet18'"):
        build_backbone("resnet18")
