"""A dry run sees the shapes that a forward has, and which layer reads what."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr_backbone.errors import ConfigError
from detr_backbone.networks.build import build_network
from detr_backbone.networks.dry_run import DryRun
from detr_backbone.networks.geometry import measure, probe

SIZE = (64, 96)


def shapes(network: nn.Module, run: Callable[[], Any]) -> dict[str, tuple[Any, ...]]:
    """Shape of what each layer takes and gives, by path."""
    seen: dict[str, tuple[Any, ...]] = {}

    def keep(path: str, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen.setdefault(path, (tuple(inputs[0].shape), tuple(output.shape)))

    handles = [module.register_forward_hook(partial(keep, path)) for path, module in network.named_modules() if path]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["swin_t", "mobilenet_v3_small", "timm/convnext_atto", "timm/vit_tiny_patch16_224"])
def test_every_layer_has_the_shapes_that_it_has_in_a_forward(name: str) -> None:
    network = build_network(name).eval()
    with torch.no_grad():
        expected = shapes(network, lambda: network(torch.rand(1, 3, *SIZE)))
    calls = DryRun(network, SIZE).calls

    assert {path: (call.input_shape, call.output_shape) for path, call in calls.items()} == expected


def test_a_network_stays_as_it_is() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).eval()).train()
    network[1].eval()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in network.state_dict().items()}
    DryRun(network)

    assert [module.training for module in network.modules()] == [True, True, False]
    assert all(tensor.data_ptr() == before[name][0] for name, tensor in network.state_dict().items())
    assert all(torch.equal(tensor, before[name][1]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


class Reads(nn.Module):
    """`a` is read by `b` alone, `b` by `c` and the sum, `d` by a function, `e` by the caller; `twice` runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.twice, self.f = (nn.Conv2d(3, 3, 1) for _ in range(7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        x = self.d(x + self.c(x)).relu()
        return self.e(self.twice(self.f(self.twice(x))))


def test_a_layer_is_named_that_alone_reads_what_another_gives() -> None:
    run = DryRun(Reads())

    assert run.sole_readers(()) == {"a": "b"}
    assert run.sole_readers(["a"]) == {}
    assert {path: call.count for path, call in run.calls.items() if call.count > 1} == {"twice": 2}


def test_a_forward_that_fails_after_the_layers_asked_for_is_measured_all_the_same() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(95, 4))
    run = probe(network)
    assert run.error is not None
    geometry = measure(network, run, ["1"])

    assert (geometry.strides, geometry.channels, geometry.divisor) == ((2,), (8,), 1)
    with pytest.raises(ConfigError, match="must take images of any size, got for 256 x 320 pixels"):
        measure(network, run, ["2"])


def test_a_window_whose_maps_have_no_whole_stride_is_known() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.window, self.last = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 2), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.window(nn.functional.pad(self.stem(x), (0, 1, 0, 1))))

    network = Padded()
    geometry = measure(network, probe(network), ["last"])

    assert geometry.without_stride == {"window"}
    assert geometry.input_strides == {"stem": 1, "last": 2}


def test_a_network_of_another_granularity_is_run_with_another_image() -> None:
    pytest.importorskip("timm")
    network = build_network("timm/vit_small_patch14_dinov2")
    run = probe(network)
    geometry = measure(network, run, ["blocks.11"])

    assert run.size == (448, 672)
    assert (geometry.strides, geometry.divisor) == ((14,), 14)
