"""A pass without numbers gives every layer the shapes that a pass with numbers gives it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr_backbone.errors import ConfigError
from detr_backbone.networks.build import build_network
from detr_backbone.networks.dry_run import on_meta

SIZE = (64, 96)


def geometries(network: nn.Module, run: Callable[[], Any]) -> dict[str, tuple[Any, ...]]:
    """Shape and dtype of what each layer takes and gives, by path."""
    seen: dict[str, tuple[Any, ...]] = {}

    def keep(path: str, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [tensor for tensor in (*inputs, output) if isinstance(tensor, Tensor)]
        seen[path] = tuple((*tensor.shape, tensor.dtype) for tensor in tensors)

    handles = [module.register_forward_hook(partial(keep, path)) for path, module in network.named_modules()]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["swin_t", "mobilenet_v3_small", "timm/convnext_atto", "timm/vit_tiny_patch16_224"])
def test_every_layer_gives_what_it_gives_with_numbers(name: str, dtype: torch.dtype) -> None:
    network = build_network(name).eval().to(dtype)
    with torch.no_grad():
        expected = geometries(network, lambda: network(torch.rand(1, 3, *SIZE, dtype=dtype)))

    assert geometries(network, lambda: on_meta(network, SIZE)) == expected


def test_values_in_other_orders_of_axes_keep_what_torch_makes_of_them() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.layers = nn.ModuleList([nn.LayerNorm(8), nn.Linear(8, 4), nn.GELU(), nn.ReLU()])

        def forward(self, x: Tensor) -> list[Tensor]:
            turned = self.conv(x).permute(0, 2, 3, 1)
            return [layer(values) for values in (turned, turned[:, ::2]) for layer in self.layers]

    network = Turned().eval()
    real = network(torch.rand(1, 3, *SIZE))

    for without, with_numbers in zip(on_meta(network, SIZE), real, strict=True):
        assert (without.shape, without.stride()) == (with_numbers.shape, with_numbers.stride())


def test_a_linear_layer_of_another_width_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(95, 4))

    with pytest.raises(ConfigError, match="must take images of any size, got for 64 x 96 pixels"):
        on_meta(network, SIZE)
