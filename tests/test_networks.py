"""Networks by name: what every family of torchvision and timm gives as a backbone.

The marker `sweep` selects the test of all families, whose table stands in docs/networks.md: `pytest -m sweep`. It is
printed by `python -m tests.test_networks`.
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
from detr_backbone.networks import after_first_stage, build_network, stages

PAGE = Path(__file__).parents[1] / "docs" / "networks.md"
SMALL = (
    "mobilenet_v2",
    "regnet_y_400mf",
    "timm/convnext_atto",
    "timm/mobilenetv3_small_050",
    "timm/regnetx_002",
    "timm/resnet10t",
    "timm/tf_efficientnet_lite0",
    "timm/vit_tiny_patch16_224",
)
TORCHVISION = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18"),
    *("resnet152", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11"),
    *("vgg11_bn", "vit_b_32", "wide_resnet50_2"),
)
TIMM = (
    *("convnext_atto", "convnextv2_atto", "cspresnet50", "darknet53", "davit_tiny", "deit3_small_patch16_224"),
    *("densenet121", "dla34", "ecaresnet26t", "edgenext_xx_small", "efficientformer_l1", "efficientnet_b0"),
    *("ese_vovnet19b_dw", "fastvit_t8", "focalnet_tiny_srf", "ghostnet_050", "hrnet_w18_small"),
    *("inception_next_atto", "lcnet_050", "levit_128s", "maxvit_pico_rw_256", "mixnet_s", "mobilenetv3_small_050"),
    *("mobilenetv4_conv_small", "mobileone_s0", "mobilevit_xxs", "mvitv2_tiny", "nextvit_small", "nf_resnet26"),
    *("poolformer_s12", "pvt_v2_b0", "regnetx_002", "regnety_002", "repvgg_a0", "res2net50_26w_4s", "resnest14d"),
    *("resnet10t", "resnetv2_50x1_bit", "rexnet_100", "selecsls42b", "seresnet18", "skresnet18", "starnet_s1"),
    *("swin_tiny_patch4_window7_224", "swinv2_cr_tiny_ns_224", "tf_efficientnet_lite0", "tf_efficientnetv2_b0"),
    *("twins_svt_small", "vgg11_bn", "vit_tiny_patch16_224", "xcit_nano_12_p16_224"),
)


@dataclass
class Seen:
    """What a network is as a backbone, after all of it was checked; `refused` says why it is none."""

    name: str
    backbone: Backbone | None = None
    exact: str = "yes"
    refused: str = ""

    def row(self) -> str:
        if self.backbone is None:
            return f"| {self.name} | — | — | — | — | {self.refused} |"
        levels = ", ".join(f"`{path}`" for path in self.backbone.body.return_layers)
        strides, channels = (", ".join(map(str, v)) for v in (self.backbone.strides, self.backbone.channels))
        return f"| {self.name} | {levels} | {strides} | {channels} | {self.backbone.body.strategy} | {self.exact} |"


def seen(name: str) -> Seen:
    """A network as a backbone: exact where it can be, with all its levels, and all claims about it checked."""
    try:
        network = build_network(name)
        options: dict[str, Any] = {"return_interm_layers": True}
        stages(network)
        try:
            after_first_stage(network, [])
        except ConfigError:
            options["train_layers"] = ["blocks"]
        with patch("detr_backbone.backbone.build_network", lambda *_, **__: copy.deepcopy(network)):  # drawn once
            backbone, exact = exact_if_it_can_be(name, **options)
    except ConfigError as error:
        return Seen(name, refused=f"refused: {str(error).splitlines()[0]}")
    draw_statistics(backbone)
    check_geometry(backbone)
    check_trained_layers(backbone)
    check_frozen_equals_eval(network, backbone)
    if exact == "yes":
        check_exact(backbone)
    return Seen(name, backbone, exact)


def exact_if_it_can_be(name: str, **options: Any) -> tuple[Backbone, str]:
    """A backbone, and whether it is exact: "yes", or "no" with the first layer where padding shows."""
    try:
        return Backbone(name, **options), "yes"
    except ConfigError as error:
        reason = str(error).partition("got 'exact': ")[2]
        if not reason:
            raise
    where = re.search(r"^it fails|(\S+) \(", reason)
    seen_in = where[1] if where else None
    exact = f"no: `{seen_in}`" if seen_in else "no: it fails in a batch of two sizes"
    return Backbone(name, padding="zeros", **options), exact


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
def check_exact(backbone: Backbone) -> None:
    small, large = torch.randn(3, 45, 66), torch.randn(3, 128, 160)
    together = backbone([small, large])
    for name, level in backbone([small]).items():
        alone = level.tensors[0]
        difference = (together[name].tensors[0, :, : alone.shape[1], : alone.shape[2]] - alone).abs().max()
        # sums in another order: float32 has 1e-7
        assert difference <= 1e-5 * alone.abs().max(), name


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
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    network(images)
    for output, path in zip(backbone.body(images).values(), backbone.body.return_layers, strict=True):
        difference = (output - expected[path]).abs().max()
        assert difference <= 1e-9 * expected[path].abs().max(), path
    backbone.float()


@pytest.mark.parametrize("name", SMALL)
def test_a_network_gives_what_its_library_computes_and_what_the_page_says(name: str) -> None:
    assert seen(name).row() in PAGE.read_text(encoding="utf-8")


@pytest.mark.sweep
@pytest.mark.parametrize("name", [*TORCHVISION, *(f"timm/{name}" for name in TIMM)])
def test_every_family_gives_what_its_library_computes_and_what_the_page_says(name: str) -> None:
    assert seen(name).row() in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    for network_name in sys.argv[1:] or [*TORCHVISION, *(f"timm/{name}" for name in TIMM)]:
        torch.manual_seed(0)
        print(seen(network_name).row(), flush=True)
