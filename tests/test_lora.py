"""A backbone adapted by LoRA, as docs/networks.md shows it, with the library that is in use for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from detr_backbone import Backbone, BackboneBase, FrozenBatchNorm2d, PyramidConfig

peft = pytest.importorskip("peft", reason="peft needs transformers, which is too heavy for every run")

SIZES = ((45, 66), (96, 64))


def vit() -> BackboneBase:
    network = VisionTransformer(
        img_size=112, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=0, dynamic_img_size=True
    )
    return BackboneBase(network, train_layers=(), pyramid=PyramidConfig(strides=(8, 16, 32), channels=8))


def resnet() -> BackboneBase:
    backbone = Backbone("resnet18", return_layers=("layer1", "layer2"), train_layers=())
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):  # a scale of one would hide how folding scales what is adapted
            module.weight.uniform_(0.3, 0.6)
    return backbone


NETWORKS = {"vit": (vit, ["qkv", "fc1", "fc2"]), "resnet": (resnet, ["conv1", "conv2"])}


def levels(backbone: nn.Module, images: list[Tensor]) -> list[Tensor]:
    return [level.tensors.detach().clone() for level in backbone(images).values()]


@pytest.fixture(params=NETWORKS)
def adapted(request: pytest.FixtureRequest) -> tuple[BackboneBase, Any, list[Tensor], list[Tensor]]:
    build, layers = NETWORKS[request.param]
    backbone, images = build(), [torch.randn(3, *size) for size in SIZES]
    before = levels(backbone, images)
    return backbone, peft.get_peft_model(backbone.body, peft.LoraConfig(target_modules=layers)), images, before


def trained(backbone: BackboneBase) -> set[str]:
    return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}


def test_a_fresh_adapter_changes_no_level(adapted: tuple[BackboneBase, Any, list[Tensor], list[Tensor]]) -> None:
    backbone, _, images, before = adapted

    # convolution and frozen BatchNorm one after the other: float32 rounds otherwise than folded
    torch.testing.assert_close(levels(backbone, images), before, rtol=1e-4, atol=1e-4)


def test_only_adapters_and_the_pyramid_train(adapted: tuple[BackboneBase, Any, list[Tensor], list[Tensor]]) -> None:
    backbone, _, images, _ = adapted
    torch.stack([level.tensors.square().mean() for level in backbone(images).values()]).sum().backward()

    assert all(".lora_" in name or name.startswith("pyramid.") for name in trained(backbone))
    assert {name for name, p in backbone.named_parameters() if p.grad is not None} == trained(backbone)


def test_merged_adapters_give_what_they_gave_beside_the_weights(
    adapted: tuple[BackboneBase, Any, list[Tensor], list[Tensor]], tmp_path: Path
) -> None:
    backbone, adapter, images, before = adapted
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.05)
    expected = levels(backbone, images)
    adapter.save_pretrained(tmp_path)
    adapter.merge_and_unload()
    merged = levels(backbone, images)

    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not any(".lora_" in key for key in backbone.state_dict())
    for got, wanted, old in zip(merged, expected, before, strict=True):
        scale = wanted.abs().max()
        assert (got - wanted).abs().max() <= 1e-4 * scale  # weights are rounded once more
        assert (got - old).abs().max() > 1e-2 * scale
