"""The names that libraries give to the layers of a ResNet, to torchvision's and back."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from detr_backbone import Backbone
from detr_backbone.weights.resnet_keys import ResNetLayout, find_layout, from_torchvision, to_torchvision

# Recorded from checkpoints of each library: layout -> its name -> torchvision's, or timm's for ResNet-D.
RECORDED: dict[ResNetLayout, dict[str, str]] = {
    "detectron2": {
        "backbone.bottom_up.stem.conv1.weight": "backbone.bottom_up.conv1.weight",
        "backbone.stem.conv1.norm.running_mean": "backbone.bn1.running_mean",
        "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
        "res2.0.shortcut.norm.bias": "layer1.0.downsample.1.bias",
        "res4.22.conv3.norm.weight": "layer3.22.bn3.weight",
        "res5.2.conv1.weight": "layer4.2.conv1.weight",
    },
    "huggingface": {
        "resnet.embedder.embedder.convolution.weight": "resnet.conv1.weight",
        "embedder.embedder.normalization.num_batches_tracked": "bn1.num_batches_tracked",
        "encoder.stages.0.layers.0.shortcut.convolution.weight": "layer1.0.downsample.0.weight",
        "encoder.stages.0.layers.0.shortcut.normalization.running_var": "layer1.0.downsample.1.running_var",
        "encoder.stages.3.layers.2.layer.1.convolution.weight": "layer4.2.conv2.weight",
        "encoder.stages.2.layers.10.layer.2.normalization.bias": "layer3.10.bn3.bias",
    },
    "presnet": {
        "backbone.conv1.conv1_1.conv.weight": "backbone.conv1.0.weight",
        "conv1.conv1_1.norm.bias": "conv1.1.bias",
        "conv1.conv1_2.conv.weight": "conv1.3.weight",
        "conv1.conv1_3.conv.weight": "conv1.6.weight",
        "conv1.conv1_3.norm.running_mean": "bn1.running_mean",
        "res_layers.0.blocks.0.short.conv.weight": "layer1.0.downsample.1.weight",
        "res_layers.0.blocks.0.short.norm.weight": "layer1.0.downsample.2.weight",
        "res_layers.1.blocks.0.short.conv.conv.weight": "layer2.0.downsample.1.weight",
        "res_layers.1.blocks.0.short.conv.norm.weight": "layer2.0.downsample.2.weight",
        "res_layers.3.blocks.2.branch2b.conv.weight": "layer4.2.conv2.weight",
        "res_layers.2.blocks.5.branch2c.norm.running_var": "layer3.5.bn3.running_var",
    },
    "torchvision": {"backbone.0.body.layer1.0.bn1.weight": "backbone.0.body.layer1.0.bn1.weight"},
}
PAIRS = [(layout, theirs, ours) for layout, names in RECORDED.items() for theirs, ours in names.items()]


@pytest.mark.parametrize(("layout", "theirs", "ours"), PAIRS)
def test_a_recorded_name_is_translated_both_ways(layout: ResNetLayout, theirs: str, ours: str) -> None:
    tensor = torch.ones(1)

    assert list(to_torchvision({theirs: tensor}, layout)) == [ours]
    assert list(from_torchvision({ours: tensor}, layout)) == [theirs]


@pytest.mark.parametrize("layout", RECORDED)
def test_the_layout_shows_in_the_keys(layout: ResNetLayout) -> None:
    assert find_layout(RECORDED[layout]) == layout


def keys_of(network: nn.Module) -> dict[str, Tensor]:
    """A network's keys, each with a tensor of its own."""
    return {key: torch.tensor(index) for index, key in enumerate(network.state_dict())}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("resnet18", "detectron2"),
        ("resnet50", "detectron2"),
        ("resnet18", "huggingface"),
        ("resnet50", "huggingface"),
        ("timm/resnet50d", "presnet"),
    ],
)
def test_every_tensor_of_a_network_makes_the_round_trip(name: str, layout: ResNetLayout) -> None:
    with torch.device("meta"):
        network = timm.create_model("resnet50d") if "/" in name else torchvision.models.get_model(name)
    state = {f"backbone.0.body.{key}": tensor for key, tensor in keys_of(network).items()}
    theirs = from_torchvision(state, layout)

    assert len(theirs) == len(state)
    assert not {key for key in theirs if key in state and "fc." not in key}
    assert find_layout(theirs) == layout
    assert to_torchvision(theirs, layout) == state


@pytest.mark.parametrize("layout", ["detectron2", "huggingface"])
def test_a_backbone_loads_from_every_layout_and_says_which(tmp_path: Path, layout: ResNetLayout) -> None:
    state = torchvision.models.resnet18().state_dict()
    torch.save({f"model.{key}": t for key, t in from_torchvision(state, layout).items()}, tmp_path / "weights.pth")
    backbone = Backbone("resnet18", weights=str(tmp_path / "weights.pth"), return_layers=["layer1"], train_layers=[])

    assert all(torch.equal(tensor, state[key]) for key, tensor in backbone.body.state_dict().items())
    assert backbone.weights is not None
    assert (backbone.weights.layout, backbone.weights.inside) == (layout, "model")


def test_a_backbone_loads_from_a_checkpoint_of_rt_detr(tmp_path: Path) -> None:
    state = timm.create_model("resnet50d", num_classes=0).state_dict()
    module = {f"backbone.{key}": tensor for key, tensor in from_torchvision(state, "presnet").items()}
    module["decoder.dec_score_head.0.bias"] = torch.ones(2)
    torch.save({"last_epoch": 71, "ema": {"module": module, "updates": 7}}, tmp_path / "weights.pth")
    weights = str(tmp_path / "weights.pth")
    backbone = Backbone("timm/resnet50d", weights=weights, return_layers=["layer1"], train_layers=[])

    assert all(torch.equal(tensor, state[key]) for key, tensor in backbone.body.state_dict().items())
    assert backbone.weights is not None
    assert (backbone.weights.layout, backbone.weights.inside) == ("presnet", "ema.module.backbone")


@torch.no_grad()
def test_transformers_own_resnet_gives_the_same_features(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")  # too large for every test run
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"
    )
    theirs = transformers.ResNetModel(config).eval()
    theirs.save_pretrained(tmp_path)
    backbone = Backbone("resnet18", weights=str(tmp_path), padding="zeros").eval()
    images = torch.randn(2, 3, 64, 96)

    torch.testing.assert_close(backbone(images)["0"].tensors, theirs(images).last_hidden_state, rtol=1e-5, atol=1e-5)
