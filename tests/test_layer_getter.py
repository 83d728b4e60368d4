"""Named features out of the middle of a network."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models._utils import IntermediateLayerGetter as TorchvisionGetter

from detr_backbone import IntermediateLayerGetter


def test_the_example_of_torchvision_gives_its_shapes() -> None:
    getter = IntermediateLayerGetter(resnet18(), {"layer1": "feat1", "layer3": "feat2"})

    outputs = getter(torch.rand(1, 3, 224, 224))

    assert [(name, tuple(x.shape)) for name, x in outputs.items()] == [
        ("feat1", (1, 64, 56, 56)),
        ("feat2", (1, 256, 14, 14)),
    ]


def test_outputs_and_keys_equal_torchvisions() -> None:
    model = resnet18().eval()
    layers = {"layer3": "c", "layer1": "a", "layer2": "b"}
    ours, theirs = IntermediateLayerGetter(model, layers), TorchvisionGetter(model, layers)
    x = torch.rand(1, 3, 32, 32)

    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(ours(x)) == list(theirs(x)) == ["a", "b", "c"]
    assert all(torch.equal(ours(x)[name], theirs(x)[name]) for name in "abc")


def test_nothing_after_the_last_layer_asked_for_is_kept() -> None:
    getter = IntermediateLayerGetter(resnet18(), {"layer2": "features"})

    assert list(getter) == ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "at least one layer, got none; there are first, second"),
        ({"secnd": "x"}, "got 'secnd', expected one of first, second; did you mean 'second'"),
        ({"first": "x", "second": "x"}, "a name of its own"),
    ],
)
def test_a_bad_request_says_what_exists(layers: dict[str, str], message: str) -> None:
    model = nn.Sequential()
    model.add_module("first", nn.ReLU())
    model.add_module("second", nn.ReLU())

    with pytest.raises(ValueError, match=message):
        IntermediateLayerGetter(model, layers)
