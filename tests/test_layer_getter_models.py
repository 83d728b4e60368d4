"""What the layer getter returns from torchvision's classification models is what plain forward hooks catch.

The marker `sweep` selects the test of all models: `pytest -m sweep`.
"""

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from detr_backbone import IntermediateLayerGetter

PAGE = (Path(__file__).parents[1] / "docs" / "layer_getter.md").read_text(encoding="utf-8")
# one small model of each family -> the strategies for its children and for layers inside them
FAMILIES = {
    "alexnet": ("sequential", "graph"),
    "convnext_tiny": ("sequential", "graph"),
    "densenet121": ("sequential", "graph"),
    "efficientnet_b0": ("sequential", "graph"),
    "efficientnet_v2_s": ("sequential", "graph"),
    "googlenet": ("hooks", "hooks"),
    "inception_v3": ("hooks", "hooks"),
    "maxvit_t": ("sequential", "graph"),
    "mnasnet0_5": ("sequential", "graph"),
    "mobilenet_v2": ("sequential", "graph"),
    "mobilenet_v3_small": ("sequential", "graph"),
    "regnet_x_400mf": ("sequential", "graph"),
    "regnet_y_400mf": ("sequential", "graph"),
    "resnet18": ("sequential", "graph"),
    "resnext50_32x4d": ("sequential", "graph"),
    "shufflenet_v2_x0_5": ("sequential", "graph"),
    "squeezenet1_0": ("sequential", "graph"),
    "swin_t": ("sequential", "graph"),
    "swin_v2_t": ("sequential", "hooks"),
    "vgg11": ("sequential", "graph"),
    "vit_b_32": ("graph", "graph"),
    "wide_resnet50_2": ("sequential", "graph"),
}
OPTIONS: dict[str, dict[str, Any]] = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
SIDES = {"maxvit_t": 224, "inception_v3": 96}


def model_and_images(name: str) -> tuple[nn.Module, Tensor]:
    side = SIDES.get(name, 56 if name == "vit_h_14" else 64)
    options = {"image_size": side} if name.startswith("vit") else OPTIONS.get(name, {})
    return torchvision.models.get_model(name, weights=None, **options).eval(), torch.rand(1, 3, side, side)


def hooked(model: nn.Module, x: Tensor, hook: Callable[[str, Any], None]) -> None:
    """One forward of the model, with `hook` called with the path and the output of each inner module that returns."""
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, path=path: hook(path, output))
        for path, module in model.named_modules()
        if path
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()


def children_and_inner_layers(model: nn.Module, x: Tensor) -> tuple[list[str], list[str]]:
    """All called children but the last, which classifies; and a few layers inside of children, with the last block."""
    order: list[str] = []
    hooked(model, x, lambda path, _: order.append(path))
    called = list(dict.fromkeys(order))
    inner = [path for path in called if "." in path]
    blocks = [path for path in inner if len(list(model.get_submodule(path).children())) > 1]
    quarters = [inner[len(inner) * quarter // 4] for quarter in (1, 2, 3)]
    return [path for path in called if "." not in path][:-1], list(dict.fromkeys([*quarters, *blocks[-1:]]))


def caught(model: nn.Module, x: Tensor, paths: list[str]) -> dict[str, Any]:
    """What the layers had returned when the last of them returned; later ones may change it in place."""
    outputs: dict[str, Any] = {}
    copies: dict[str, Any] = {}

    def catch(path: str, output: Any) -> None:
        if path in paths:
            outputs.setdefault(path, output)
            if len(outputs) == len(paths) and not copies:
                copies.update(copy.deepcopy(outputs))

    hooked(model, x, catch)
    return copies


def strategies_checked(name: str) -> tuple[str, str]:
    """The strategies for a model's children and for layers inside of them, after comparing all outputs."""
    model, x = model_and_images(name)
    strategies = []
    for paths in children_and_inner_layers(model, x):
        expected = caught(model, x, paths)
        getter = IntermediateLayerGetter(model, paths)
        with torch.no_grad():
            outputs = getter(x)
        assert list(outputs) == list(expected), name
        torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
        assert getter.state_dict().keys() <= model.state_dict().keys(), name
        strategies.append(getter.strategy)
    return strategies[0], strategies[1]


@pytest.mark.parametrize(("name", "strategies"), FAMILIES.items())
def test_each_family_returns_what_plain_hooks_catch(name: str, strategies: tuple[str, str]) -> None:
    assert strategies_checked(name) == strategies


@pytest.mark.sweep
def test_every_model_returns_what_plain_hooks_catch_by_the_strategies_that_the_page_counts() -> None:
    names = torchvision.models.list_models(torchvision.models)

    children, inner = zip(*(strategies_checked(name) for name in names), strict=True)

    for request, chosen in {"all children but the classifier": children, "layers inside of children": inner}.items():
        count = Counter(chosen)
        row = f"| {request} | {count['sequential']} | {count['graph']} | {count['hooks']} |"
        assert row in PAGE, f"{len(names)} models: {row}"
