"""Networks by name: what every family of torchvision and timm gives as a backbone.

One network of each family runs by default, others and larger ones with `pytest -m sweep`. Their table stands in
benchmarks/networks.md; `python -m tests.test_networks` prints it.
"""

import copy
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from detr_backbone import Backbone, FrozenBatchNorm2d
from detr_backbone.errors import ConfigError
from detr_backbone.networks.build import build_network

PAGE = Path(__file__).parents[1] / "benchmarks" / "networks.md"
# one network of every family of torchvision, and of more of timm's than most use, small ones
FAMILIES = (
    *("alexnet", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t"),
    *("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18"),
    *("shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "vgg11_bn", "vit_b_32", "timm/convnextv2_atto"),
    *("timm/convnext_atto", "timm/dla34", "timm/ecaresnet26t", "timm/edgenext_xx_small", "timm/efficientformer_l1"),
    *("timm/ese_vovnet19b_dw", "timm/fastvit_t8", "timm/ghostnet_050", "timm/hgnetv2_b0"),
    *("timm/hrnet_w18_small", "timm/inception_next_atto", "timm/lcnet_050", "timm/levit_128s"),
    *("timm/mobilenetv4_conv_small", "timm/mobilevit_xxs", "timm/nextvit_small"),
    *("timm/poolformer_s12", "timm/pvt_v2_b0", "timm/repvgg_a0", "timm/resnest14d", "timm/seresnet18"),
    *("timm/starnet_s1", "timm/tf_efficientnet_lite0", "timm/vit_tiny_patch16_224"),
    "timm/xcit_nano_12_p16_224",
)
MORE = (
    *("convnext_tiny", "efficientnet_v2_s", "resnet152", "resnext50_32x4d", "swin_v2_t", "vgg11", "wide_resnet50_2"),
    *("timm/cspresnet50", "timm/darknet53", "timm/davit_tiny", "timm/maxvit_pico_rw_256"),
    *("timm/deit3_small_patch16_224", "timm/densenet121", "timm/efficientnet_b0", "timm/focalnet_tiny_srf"),
    *("timm/mixnet_s", "timm/mobilenetv3_small_050", "timm/mobileone_s0", "timm/mvitv2_tiny"),
    *("timm/nf_resnet26", "timm/regnetx_002", "timm/regnety_002", "timm/res2net50_26w_4s", "timm/resnet10t"),
    *("timm/resnetv2_50x1_bit", "timm/rexnet_100", "timm/selecsls42b", "timm/skresnet18"),
    *("timm/swin_tiny_patch4_window7_224", "timm/swinv2_cr_tiny_ns_224", "timm/tf_efficientnetv2_b0"),
    *("timm/twins_svt_small", "timm/vgg11_bn"),
)


@dataclass
class Seen:
    """What a network is as a backbone, after all of it was checked; `refused` says why it is none."""

    name: str
    backbone: Backbone | None = None
    refused: str = ""

    def row(self) -> str:
        if self.backbone is None:
            return f"| {self.name} | — | — | — | — | {self.refused} |"
        levels = ", ".join(f"`{path}`" for path in self.backbone.body.return_layers)
        strides, channels = (", ".join(map(str, v)) for v in (self.backbone.strides, self.backbone.channels))
        where = re.search(r"(\S+) \(", self.backbone.leak or "")
        why = f": `{where[1]}`" if where else f": {self.backbone.leak}" if self.backbone.leak else ""
        plan = f"{self.backbone.batching.replace('_', ' ')}{why}"
        return f"| {self.name} | {levels} | {strides} | {channels} | {self.backbone.body.strategy} | {plan} |"


def seen(name: str) -> Seen:
    """A network as an exact backbone with all its levels, and all claims about it checked."""
    try:
        network = build_network(name)
        backbone = with_all_levels(network, name)
    except ConfigError as error:
        return Seen(name, refused=f"refused: {str(error).splitlines()[0]}")
    draw_statistics(backbone)
    check_geometry(backbone)
    check_trained_layers(backbone)
    check_frozen_equals_eval(network, backbone)
    check_exact(backbone, torch.float64, 1e-9)
    check_exact(backbone, torch.float32, 1e-5)  # sums in another order: float32 has 1e-7
    return Seen(name, backbone)


def with_all_levels(network: nn.Module, name: str) -> Backbone:
    drawn = copy.deepcopy(network)
    with patch("detr_backbone.backbone.backbone.build_network", lambda *_, **__: drawn):  # drawing weights takes long
        try:
            return Backbone(name, return_interm_layers=True)
        except ConfigError as error:
            if "`train_layers` must be given" not in str(error):
                raise
            return Backbone(name, return_interm_layers=True, train_layers=["blocks"])


def draw_statistics(backbone: Backbone) -> None:
    """Statistics as training leaves them, instead of (0, 1)."""
    generator = torch.Generator().manual_seed(0)
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.3, 0.6),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    backbone.eval()


@torch.no_grad()
def check_geometry(backbone: Backbone) -> None:
    levels = backbone(torch.rand(1, 3, 64, 96)).values()

    assert [level.tensors.shape[1] for level in levels] == list(backbone.channels)
    assert [level.tensors.shape[-2:] for level in levels] == [(-(-64 // s), -(-96 // s)) for s in backbone.strides]


@torch.no_grad()
def check_exact(backbone: Backbone, dtype: torch.dtype, tolerance: float) -> None:
    """Every image of a batch has the features that it has alone, also where the divisor of the network divides all."""
    backbone.to(dtype)
    for sizes in (((45, 66), (96, 128)), ((32, 64), (64, 96), (32, 64))):
        images = [torch.randn(3, *size, dtype=dtype) for size in sizes]
        batch = backbone(images)
        for index, image in enumerate(images):
            for name, level in backbone([image]).items():
                (alone,), ((h, w),) = level.tensors, level.sizes
                difference = (batch[name].tensors[index, :, :h, :w] - alone[:, :h, :w]).abs().max()
                assert difference <= tolerance * alone.abs().max(), (sizes, index, name)


def check_trained_layers(backbone: Backbone) -> None:
    sum(level.tensors.square().sum() for level in backbone(torch.rand(1, 3, 64, 96)).values()).backward()
    reached = {name for name, p in backbone.named_parameters() if p.grad is not None}
    backbone.zero_grad()

    assert reached == {name for name, p in backbone.named_parameters() if p.requires_grad}


@torch.no_grad()
def check_frozen_equals_eval(network: nn.Module, backbone: Backbone) -> None:
    """In float64, the levels are what plain hooks catch in the library's own network in eval mode."""
    own = network.state_dict()
    for key, tensor in backbone.body.state_dict().items():
        own[key].copy_(tensor)
    network.eval().double()
    backbone.double()
    expected: dict[str, Tensor] = {}

    def catch(path: str) -> None:
        def keep(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            expected.setdefault(path, output.clone())

        network.get_submodule(path).register_forward_hook(keep)

    for path in backbone.body.return_layers:
        catch(path)
    images = backbone.pad(torch.rand(1, 3, 64, 96, dtype=torch.float64)).tensors
    network(images)
    for output, path in zip(backbone.body(images).values(), backbone.body.return_layers, strict=True):
        difference = (output - expected[path]).abs().max()
        assert difference <= 1e-9 * expected[path].abs().max(), path


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.sweep) for name in MORE)])
def test_a_family_gives_what_its_library_computes_and_what_the_page_says(name: str) -> None:
    assert seen(name).row() in PAGE.read_text(encoding="utf-8")


def test_the_page_shows_the_networks_that_are_tested_and_no_others() -> None:
    rows = re.findall(r"^\| (\S+) \| (?:—|`)", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)

    assert rows == sorted([*FAMILIES, *MORE], key=lambda name: (name.startswith("timm/"), name))


if __name__ == "__main__":
    for network_name in sys.argv[1:] or sorted([*FAMILIES, *MORE], key=lambda name: (name.startswith("timm/"), name)):
        torch.manual_seed(0)
        print(seen(network_name).row(), flush=True)
