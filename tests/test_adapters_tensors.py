"""The backbone as programs take it that want tensors: each written here from what they call and read."""

import copy
import inspect
import io
import pickle
from abc import ABCMeta
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

from detr_backbone import Backbone, BackboneBase, PyramidConfig, fold_for_inference
from detr_backbone.adapters.adapter import Adapter
from detr_backbone.adapters.detectron2 import DictBackbone
from detr_backbone.adapters.tensors import ListBackbone, TupleBackbone
from detr_backbone.errors import ConfigError

IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
SIZES = [(64, 96), (40, 50)]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """torchvision's network with statistics that training would leave."""
    torch.manual_seed(0)
    network = resnet18(norm_layer=FrozenBatchNorm2d)
    for name, buffer in network.named_buffers():
        if name.endswith(("bias", "running_mean")):
            nn.init.normal_(buffer, std=0.1)
    return network.eval()


@pytest.fixture(scope="module")
def expected(network: nn.Module) -> dict[str, Tensor]:
    """What the network computes, by its stages."""
    stages = {}
    with torch.no_grad():
        x = IMAGES
        for name, child in list(network.named_children())[:8]:
            stages[name] = x = child(x)
    return stages


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value: what float32 leaves, for maps of any scale."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


def load(adapter: nn.Module, network: nn.Module, prefix: str = "") -> None:
    """Load the network's weights under its own names, strictly."""
    state = {prefix + key: t for key, t in network.state_dict().items() if not key.startswith("fc.")}
    assert list(adapter.state_dict()) == list(state)
    adapter.load_state_dict(state)


def create(cls: type, options: dict[str, Any]) -> Any:
    """Build a class as the registries of RT-DETR and D-FINE do: from the positional arguments with defaults."""
    spec = inspect.getfullargspec(cls.__init__)
    names = [name for name in spec.args if name != "self"]
    schema = dict(zip(names, spec.defaults or (), strict=True)) | options
    return cls(**{name: schema[name] for name in names})


@torch.no_grad()
def test_a_registry_that_reads_positional_options_builds_a_list_of_tensors(
    network: nn.Module, expected: dict[str, Tensor]
) -> None:
    backbone = create(ListBackbone, {"name": "resnet18", "return_layers": ["layer3", "layer4"]})
    load(backbone, network)
    levels = backbone(IMAGES)

    assert isinstance(levels, list)
    for level, stage in zip(levels, ("layer3", "layer4"), strict=True):
        print(f"list: {stage} differs by {relative_difference(level, expected[stage]):.1e}")
        assert relative_difference(level, expected[stage]) < 1e-5


def test_an_option_that_the_backbone_has_not_is_no_option_of_the_registry() -> None:
    assert inspect.getfullargspec(ListBackbone.__init__).kwonlyargs == []


def test_each_program_trains_by_default_what_it_trains_on_its_own_backbone() -> None:
    trained = {
        adapter: {key.split(".")[0] for key, p in adapter.named_parameters() if p.requires_grad}
        for adapter in (ListBackbone("resnet18"), TupleBackbone("resnet18"))
    }
    assert list(trained.values()) == [{"layer1", "layer2", "layer3", "layer4"}, {"layer2", "layer3", "layer4"}]


@torch.no_grad()
def test_mmdetection_gets_a_tuple_of_all_stages(network: nn.Module, expected: dict[str, Tensor]) -> None:
    backbone = TupleBackbone(name="resnet18")
    backbone.init_weights()
    load(backbone, network)
    levels = backbone(IMAGES)

    assert isinstance(levels, tuple)
    for n, level in enumerate(levels, start=1):
        print(f"tuple: layer{n} differs by {relative_difference(level, expected[f'layer{n}']):.1e}")
        assert relative_difference(level, expected[f"layer{n}"]) < 1e-5
    assert len(levels) == 4


class Preprocessor(nn.Module):
    """Pads, and says the sizes beside the batch as mmdetection's data preprocessor does."""

    def forward(self, images: Tensor) -> dict[str, Any]:
        return {"inputs": images, "data_samples": [SimpleNamespace(img_shape=(*size, 3)) for size in SIZES]}


@torch.no_grad()
def test_sizes_of_mmdetections_samples_make_levels_exact() -> None:
    backbone, preprocessor = TupleBackbone("resnet18", padding="exact"), Preprocessor()
    backbone.take_sizes_from(preprocessor)
    together = backbone(preprocessor(IMAGES)["inputs"])
    alone = backbone.backbone([IMAGES[1, :, :40, :50]]).values()

    for level, single in zip(together, alone, strict=True):
        _, _, h, w = single.tensors.shape
        torch.testing.assert_close(level[1:, :, :h, :w], single.tensors, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="needs the sizes"):
        backbone(IMAGES)


class Detectron2Backbone(nn.Module, metaclass=ABCMeta):
    """Stands for detectron2's abstract class."""


@torch.no_grad()
def test_detectron2_gets_a_dict_of_tensors_and_their_shapes(network: nn.Module, expected: dict[str, Tensor]) -> None:
    backbone = DictBackbone(Backbone("resnet18", return_interm_layers=True, padding="zeros"))
    load(backbone, network, prefix="body.")
    Detectron2Backbone.register(DictBackbone)
    levels = backbone(IMAGES)

    assert isinstance(backbone, Detectron2Backbone)
    assert list(levels) == ["res2", "res3", "res4", "res5"]
    assert [(spec.channels, spec.stride) for spec in backbone.output_shape().values()] == [
        (64, 4),
        (128, 8),
        (256, 16),
        (512, 32),
    ]
    assert (backbone.size_divisibility, backbone.padding_constraints) == (0, {})
    for n in (1, 2, 3, 4):
        difference = relative_difference(levels[f"res{n + 1}"], expected[f"layer{n}"])
        print(f"dict: res{n + 1} differs by {difference:.1e}")
        assert difference < 1e-5


@torch.no_grad()
def test_sizes_of_detectron2s_image_list_make_levels_exact() -> None:
    backbone = DictBackbone(Backbone("resnet18"))
    images = SimpleNamespace(tensor=IMAGES, image_sizes=[torch.Size(size) for size in SIZES])
    alone = backbone.backbone([IMAGES[1, :, :40, :50]])["0"].tensors

    torch.testing.assert_close(backbone(images)["res5"][1:, :, :2, :2], alone, rtol=0, atol=1e-5)


def test_levels_of_one_stride_need_names() -> None:
    backbone = Backbone("resnet50", dilation=True, return_layers=["layer3", "layer4"], padding="zeros")
    with pytest.raises(ConfigError, match=r"`out_features` must name.*\[16, 16\]"):
        DictBackbone(backbone)
    assert list(DictBackbone(backbone, ["res4", "res5"]).output_shape()) == ["res4", "res5"]


def test_what_is_no_backbone_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`backbone` must be a BackboneBase.* got Linear"):
        DictBackbone(nn.Linear(1, 1))  # type: ignore[arg-type]


# What holds for every adapter, with its network under a name and without


class Net(nn.Module):
    """A network with a parameter and a buffer of its own, beside its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, 3, 1, 1), 2.0))
        self.register_buffer("shift", torch.full((1, 3, 1, 1), 0.5))
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.layer = nn.Conv2d(8, 8, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.stem(x * self.scale + self.shift))


def base(**options: Any) -> BackboneBase:
    torch.manual_seed(0)
    return BackboneBase(Net(), return_layers=["stem", "layer"], train_layers=["layer"], padding="zeros", **options)


ADAPTERS: dict[str, Callable[[BackboneBase], Adapter]] = {
    "under a name": DictBackbone,
    "without": ListBackbone.from_backbone,
}


@pytest.fixture(params=ADAPTERS)
def wrap(request: pytest.FixtureRequest) -> Callable[[BackboneBase], Adapter]:
    return ADAPTERS[request.param]


def outputs(adapter: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        levels = adapter(IMAGES.to(next(adapter.parameters()).dtype))
    return list(levels.values() if isinstance(levels, dict) else levels)


def save_and_load(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda adapter: pickle.loads(pickle.dumps(adapter)), save_and_load],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_runs_weights_of_its_own(wrap: Callable[[BackboneBase], Adapter], copied: Any) -> None:
    adapter = wrap(base())
    twin = copied(adapter)
    expected = outputs(adapter)
    torch.testing.assert_close(outputs(twin), expected, rtol=0, atol=0)

    twin.load_state_dict({key: 2 * tensor for key, tensor in twin.state_dict().items()})
    assert not torch.equal(outputs(twin)[0], expected[0])
    torch.testing.assert_close(outputs(adapter), expected, rtol=0, atol=0)


def test_a_copy_of_a_traced_network_is_one_with_its_backbone() -> None:
    adapter = ListBackbone("resnet18", None, ["layer1.0"], ["layer1"])
    assert adapter.backbone.body.strategy == "graph"  # whose copies are built anew
    twin = copy.deepcopy(adapter)
    fold_for_inference(twin)

    assert not any("running_mean" in key for key in twin.state_dict())
    assert any("running_mean" in key for key in adapter.state_dict())


def test_another_dtype_reaches_all_that_runs(wrap: Callable[[BackboneBase], Adapter]) -> None:
    adapter = wrap(base())
    expected = outputs(adapter)
    doubled = outputs(adapter.to(torch.float64))

    assert {tensor.dtype for tensor in adapter.backbone.state_dict().values()} == {torch.float64}
    torch.testing.assert_close([level.float() for level in doubled], expected)


def test_the_mode_reaches_all_that_runs(wrap: Callable[[BackboneBase], Adapter]) -> None:
    adapter = wrap(base())
    nn.Sequential(adapter).eval()
    assert not any(module.training for module in (*adapter.modules(), *adapter.backbone.modules()))
    nn.Sequential(adapter).train()
    assert all(module.training for module in (*adapter.modules(), *adapter.backbone.modules()))


def test_a_pyramid_is_saved_and_trained_too() -> None:
    for wrap in ADAPTERS.values():
        torch.manual_seed(0)
        pyramid = PyramidConfig(strides=(4, 8), channels=16)
        backbone = BackboneBase(
            Net(), return_layers=["layer"], train_layers=["layer"], padding="zeros", pyramid=pyramid
        )
        adapter = wrap(backbone)
        twin = copy.deepcopy(adapter)
        prefix = "body." if isinstance(adapter, DictBackbone) else ""
        expected = {prefix + key.removeprefix("body.") for key in backbone.state_dict() if key.startswith("body.")}
        expected |= {key for key in backbone.state_dict() if key.startswith("pyramid.")}

        assert adapter.state_dict().keys() == expected
        assert any(key.startswith("pyramid.") and p.requires_grad for key, p in adapter.named_parameters())
        torch.testing.assert_close(outputs(twin), outputs(adapter), rtol=0, atol=0)


def with_a_pyramid() -> Adapter:
    pyramid = PyramidConfig(strides=(16, 32), channels=16)
    return ListBackbone.from_backbone(Backbone("resnet18", return_layers=["layer4"], padding="zeros", pyramid=pyramid))


@torch.no_grad()
@pytest.mark.parametrize(
    "build",
    [
        lambda: ListBackbone("resnet18"),
        lambda: TupleBackbone("resnet18"),
        lambda: DictBackbone(Backbone("resnet18", padding="zeros")),
        with_a_pyramid,
    ],
    ids=["list", "tuple", "dict", "pyramid"],
)
def test_a_backbone_in_an_adapter_is_folded_for_inference(build: Callable[[], Adapter], network: nn.Module) -> None:
    adapter = build()
    adapter.backbone.body.load_state_dict(network.state_dict(), strict=False)  # all but the classifier
    expected = outputs(adapter.eval())
    model = nn.Sequential(nn.Sequential(adapter))
    assert fold_for_inference(model) is model

    for got, wanted in zip(outputs(adapter), expected, strict=True):
        assert relative_difference(got, wanted) < 1e-5
    assert not any("running_mean" in key for key in (*adapter.state_dict(), *adapter.backbone.state_dict()))
    assert not any(parameter.requires_grad for parameter in adapter.parameters())
    with pytest.raises(ConfigError, match="folded for inference does not train"):
        model.train()
