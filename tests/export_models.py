"""Small models that are exported, and what they are given."""

from typing import Any

import torch
from torch import Tensor, nn

from detr_backbone import FrozenBatchNorm2d, Joiner, PositionEmbeddingSine
from detr_backbone.backbone import BackboneBase
from detr_backbone.detectors import DETR
from detr_backbone.detectors.transformer import Transformer

TOLERANCE = 1e-4
"""What `export` promises; two engines add up in different orders."""
LEVELS = ("layer1", "layer2")


class Network(nn.Module):
    """A stem and two stages, of strides 2, 4 and 8, with frozen BatchNorm."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 2, padding=1, bias=False), FrozenBatchNorm2d(width)
        self.layer1 = nn.Sequential(nn.Conv2d(width, width, 3, 2, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x)))))


def build_joiner(network: nn.Module | None = None, encoding: nn.Module | None = None, **options: Any) -> Joiner:
    network = Network() if network is None else network
    for module in network.modules():
        if isinstance(module, FrozenBatchNorm2d):  # as after training; their defaults change nothing
            module.running_mean.normal_()
            module.weight.uniform_(0.5, 2)
    backbone = BackboneBase(network, return_layers=LEVELS, train_layers=(), **options)
    return Joiner(backbone, encoding or PositionEmbeddingSine(8, normalize=True)).eval()


def build_tiny_detr(**options: Any) -> DETR:
    transformer = Transformer(
        d_model=16, nhead=2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=16, dropout=0.0
    )
    return DETR(build_joiner(**options), transformer, num_classes=3, num_queries=5).eval()


def images() -> list[Tensor]:
    """Images of three sizes, of which one comes twice, apart."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, *size, generator=generator) for size in ((37, 53), (64, 40), (37, 53), (21, 64))]


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
