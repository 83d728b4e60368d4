"""Networks take images of any number of channels, and pretrained weights of three."""

import pytest
import torch
import torchvision
from timm.models import adapt_input_conv

from detr_backbone import Backbone
from detr_backbone.errors import ConfigError
from detr_backbone.networks.input_channels import adapt_input_weight, first_convolution


@pytest.mark.parametrize("in_channels", [1, 2, 3, 4, 7, 13])
def test_weights_are_adapted_as_timm_adapts_them(in_channels: int) -> None:
    weight = torch.randn(8, 3, 5, 5)

    torch.testing.assert_close(adapt_input_weight(weight, in_channels), adapt_input_conv(in_channels, weight))


@pytest.mark.parametrize("name", ["resnet18", "timm/regnetx_002"])
@pytest.mark.parametrize("in_channels", [1, 4])
def test_a_network_takes_images_of_other_channels(name: str, in_channels: int) -> None:
    backbone = Backbone(name, in_channels=in_channels)

    assert backbone([torch.rand(in_channels, 64, 33), torch.rand(in_channels, 40, 64)])["0"].tensors.shape[2:] == (2, 2)


def test_a_grey_image_has_the_features_of_its_three_equal_channels(tmp_path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pth")
    grey = Backbone("resnet18", in_channels=1, weights=str(tmp_path / "weights.pth"))
    colour = Backbone("resnet18", weights=str(tmp_path / "weights.pth"))
    x = torch.rand(1, 1, 64, 64)

    expected = colour(x.expand(1, 3, 64, 64))["0"].tensors
    torch.testing.assert_close(grey(x)["0"].tensors, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_weights_of_as_many_channels_load_as_they_are(tmp_path) -> None:
    saved = Backbone("resnet18", in_channels=4)
    torch.save(saved.body.state_dict(), tmp_path / "weights.pth")
    loaded = Backbone("resnet18", in_channels=4, weights=str(tmp_path / "weights.pth"))

    assert torch.equal(loaded.body.conv1.weight, saved.body.conv1.weight)


@pytest.mark.parametrize("in_channels", [0, -1])
def test_no_channels_are_refused(in_channels: int) -> None:
    with pytest.raises(ConfigError, match=f"`in_channels` must be at least 1.*, got {in_channels} for conv1"):
        Backbone("resnet18", in_channels=in_channels)


def test_the_first_convolution_is_found_where_it_is_deep() -> None:
    assert first_convolution(torchvision.models.mobilenet_v2())[0] == "features.0.0"
