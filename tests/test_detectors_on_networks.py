"""Networks of other families than ResNet carry positions, masks and both detectors, forwards and backwards."""

import math

import pytest
import torch
from torch import Tensor, nn

from detr_backbone import BackboneConfig, Joiner, build_backbone
from detr_backbone.detectors import DetectorConfig, build_criterion, build_detector

SMALL = {"num_classes": 3, "num_queries": 5, "nheads": 2, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 32}
TARGETS = [
    {"labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.6, 0.6, 0.3, 0.5]])},
    {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3]])},
]
SIZES = ((96, 75), (70, 128))
NETWORKS = {
    "mobilenet_v2": {"return_layers": ("features.13", "features.18")},
    "efficientnet_b0": {"return_layers": ("features.5", "features.8"), "padding": "zeros"},
    "regnet_x_400mf": {"return_layers": ("trunk_output.block3", "trunk_output.block4"), "in_channels": 1},
    "swin_t": {"return_layers": ("features.5", "permute"), "padding": "zeros"},
    "timm/convnext_atto": {"return_layers": ("stages.2", "stages.3"), "in_channels": 4},
    "timm/mobilenetv3_small_050": {"return_layers": ("blocks.3", "blocks.5"), "padding": "zeros"},
    "timm/tf_efficientnet_lite0": {"return_layers": ("blocks.4", "blocks.6"), "in_channels": 6},
    "timm/vit_tiny_patch16_224": {"padding": "zeros", "train_layers": ("blocks.10", "blocks.11"), "in_channels": 4},
}


def images(channels: int) -> list[Tensor]:
    return [torch.randn(channels, *size) for size in SIZES]


@pytest.mark.parametrize("name", NETWORKS)
def test_both_detectors_learn_on_a_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BackboneConfig(name=name, hidden_dim=32, **NETWORKS[name])
    joiner = build_backbone(config)
    monkeypatch.setattr("detr_backbone.detectors.build.build_backbone", lambda _: joiner)
    check_levels(joiner, config)

    for detector in ("detr", "deformable_detr"):
        model_config = DetectorConfig(name=detector, backbone=config, **SMALL)
        model, criterion = build_detector(model_config), build_criterion(model_config)
        outputs = model(images(config.in_channels))
        criterion.weighted_sum(criterion(outputs, TARGETS)).backward()

        assert outputs["pred_boxes"].shape == (2, 5, 4)
        assert outputs["pred_logits"].isfinite().all()
        check_gradients(model, joiner)


def check_levels(joiner: Joiner, config: BackboneConfig) -> None:
    """Levels, masks and positions have the cells that the strides say, finite numbers, and each image its own."""
    features, positions = joiner(images(config.in_channels))
    for level, position, stride, channels in zip(features, positions, joiner.strides, joiner.channels, strict=True):
        cells = (math.ceil(96 / stride), math.ceil(128 / stride))
        assert level.tensors.shape == (2, channels, *cells)
        assert position.shape == (2, config.hidden_dim, *cells)
        assert level.tensors.isfinite().all()
        assert position.isfinite().all()
        own = [math.ceil(h / stride) * math.ceil(w / stride) for h, w in SIZES]
        if config.padding == "exact":
            assert (~level.mask).flatten(1).sum(1).tolist() == own
        else:  # the mask resized to the nearest pixel: a row or column of partly padded cells may be missing
            assert all(0 < valid <= most for valid, most in zip((~level.mask).flatten(1).sum(1), own, strict=True))


def check_gradients(model: nn.Module, joiner: Joiner) -> None:
    """Every weight of the network that should train has a finite gradient."""
    trained = {name: p for name, p in joiner.named_parameters() if p.requires_grad}
    assert trained
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert sum(float(p.grad.abs().sum()) for p in trained.values() if p.grad is not None) > 0
    model.zero_grad()
