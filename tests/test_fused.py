"""Fused for inference, a network gives what it gave, whatever its code does between its layers."""

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torchvision.models.resnet import Bottleneck, ResNet

from detr_backbone import Backbone, BackboneBase, FrozenBatchNorm2d, NestedTensor, fold_for_inference
from detr_backbone.folding import FusedConv2d, fused, primitives
from tests.small_networks import trained

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")),
    reason="this build of torch has no fused convolutions",
)
# Of the largest feature; a sum in another order moves it by some units of float32, over the depth of a network.
TOLERANCE = 2e-5


@pytest.fixture
def primitives_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The primitives that run, in turn: "relu", "add", or "overwrite" for a sum written over what is added."""
    calls: list[str] = []
    conv_relu, conv_add_relu = primitives.conv_relu, primitives.conv_add_relu

    def with_relu(*args: Any) -> Tensor:
        calls.append("relu")
        return conv_relu(*args)

    def with_sum(*args: Any, overwrite: bool) -> Tensor:
        calls.append("overwrite" if overwrite else "add")
        return conv_add_relu(*args, overwrite=overwrite)

    monkeypatch.setattr(fused, "conv_relu", with_relu)
    monkeypatch.setattr(fused, "conv_add_relu", with_sum)
    return calls


@pytest.fixture
def without_memory() -> Iterator[None]:
    """Kinds of convolutions are tried anew, and forgotten afterwards."""
    caches = (primitives._has_operators, primitives._is_equal, primitives._warn)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def assert_close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    largest = expected.abs().max().item()
    torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=tolerance * largest)


class Block(nn.Module):
    """Two convolutions and a residual sum, which subclasses write as code may write it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), FrozenBatchNorm2d(8)
        self.conv, self.norm = nn.Conv2d(8, 8, 1, bias=False), FrozenBatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem_norm(self.stem(x)))
        return self.last(self.join(self.norm(self.conv(x.clone())), x))

    def join(self, z: Tensor, x: Tensor) -> Tensor:
        z += x
        return self.relu(z)


class OutOfPlace(Block):
    def join(self, z: Tensor, x: Tensor) -> Tensor:
        return F.relu(z + x)


class OtherFirst(Block):
    def join(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.add(x, z).relu_()


class NoSum(Block):
    def join(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.relu(z)


class ReadLater(Block):
    def join(self, z: Tensor, x: Tensor) -> Tensor:
        return F.relu(z + x) + x


class ViewReadLater(Block):
    def join(self, z: Tensor, x: Tensor) -> Tensor:
        view = x[:, 2:3]
        return F.relu(z + x) + view


class Kept(Block):
    """It holds its activations, for others to look at."""

    def join(self, z: Tensor, x: Tensor) -> Tensor:
        self.kept = x
        return F.relu(z + x)


class OwnInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem_norm(self.stem(x)))
        return self.last(F.relu(self.norm(self.conv(x)) + x))


class Image(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 3, 1), FrozenBatchNorm2d(3)
        self.last = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.relu(self.stem_norm(self.stem(x)))
        return self.last(F.relu(self.norm(self.conv(z)) + x))


class IntoTheOther(Block):
    def join(self, z: Tensor, x: Tensor) -> Tensor:
        same = x
        x += z
        return F.relu(x) + same


class OtherName(Block):
    def join(self, z: Tensor, x: Tensor) -> Tensor:
        same = z
        z += x
        return self.relu(z) + same


class SumReadToo(Block):
    def join(self, z: Tensor, x: Tensor) -> Tensor:
        z = z + x
        return torch.relu(z) + z


class Scaled(Block):
    def join(self, z: Tensor, x: Tensor) -> Tensor:
        return F.relu(torch.add(z, x, alpha=2))


class Broadcast(Block):
    def join(self, z: Tensor, x: Tensor) -> Tensor:
        return F.relu(z + x.mean((2, 3), keepdim=True))


class Number(Block):
    def join(self, z: Tensor, x: Tensor) -> Tensor:
        return F.relu(z + 1)


class Twice(Block):
    def join(self, z: Tensor, x: Tensor) -> Tensor:
        return F.relu(z + z)


class InputChanges(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem_norm(self.stem(x)))
        z = self.norm(self.conv(x))
        x.zero_()
        return self.last(F.relu(z))


class OtherChanges(Block):
    def join(self, z: Tensor, x: Tensor) -> Tensor:
        z = z + x
        x[:, 1:].zero_()
        return F.relu(z)


class BothConvolutions(Block):
    """A block with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.project_norm = nn.Conv2d(8, 8, 1), FrozenBatchNorm2d(8)

    def join(self, z: Tensor, x: Tensor) -> Tensor:
        return F.relu(self.project_norm(self.project(x)) + z)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is deprecated, and still in use

    @torch.jit.script
    def scripted_relu(x: Tensor) -> Tensor:
        return torch.relu(x)


class Scripted(Block):
    def join(self, z: Tensor, x: Tensor) -> Tensor:
        return scripted_relu(z)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (Block, ["relu", "overwrite"]),
        (OutOfPlace, ["relu", "overwrite"]),
        (OtherFirst, ["relu", "overwrite"]),
        (OtherName, ["relu", "overwrite"]),
        (BothConvolutions, ["relu", "overwrite"]),
        (NoSum, ["relu", "relu"]),
        # What is added is read later, so it must stay.
        (ReadLater, ["relu", "add"]),
        (ViewReadLater, ["relu", "add"]),
        (Kept, ["relu", "add"]),
        (OwnInput, ["relu", "add"]),
        (Image, ["relu", "add"]),
        # Another reader, or something else than one sum and one ReLU.
        *((other, ["relu"]) for other in (IntoTheOther, SumReadToo, Scaled, Broadcast, Number, Twice)),
        *((other, ["relu"]) for other in (InputChanges, OtherChanges, Scripted)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_whatever_the_code_between_layers_does_a_pass_gives_what_it_gave(
    block: type[Block], expected: list[str], primitives_run: list[str]
) -> None:
    backbone = trained(BackboneBase(block(), return_layers=["last"], train_layers=["conv"], padding="zeros")).eval()
    images = torch.randn(2, 3, 17, 22)
    before = images.clone()
    with torch.no_grad():
        levels = backbone(images)["0"].tensors
        kept = getattr(backbone.body, "kept", None)
        fold_for_inference(backbone)
        for _ in range(2):
            primitives_run.clear()
            assert_close(backbone(images)["0"].tensors, levels)
            assert primitives_run == expected

    assert torch.equal(images, before)
    if kept is not None:
        assert_close(backbone.body.kept, kept)


class BottleneckNetwork(ResNet):
    """Bottleneck blocks with and without projection, of groups, dilated at the end."""

    def __init__(self) -> None:
        super().__init__(
            Bottleneck,
            [2, 1, 1, 2],
            groups=2,
            width_per_group=16,
            replace_stride_with_dilation=[False, False, True],
            norm_layer=FrozenBatchNorm2d,
        )


def _bottlenecks(**options: Any) -> BackboneBase:
    return BackboneBase(BottleneckNetwork(), return_interm_layers=True, **options)


NETWORKS: dict[str, Callable[[], BackboneBase]] = {
    "bottlenecks": _bottlenecks,
    "resnet18": lambda: Backbone("resnet18", return_interm_layers=True),
    "regnet_x_400mf": lambda: Backbone("regnet_x_400mf", return_interm_layers=True),
    "mobilenet_v2": lambda: Backbone("mobilenet_v2", return_interm_layers=True),
    "googlenet": lambda: Backbone("googlenet"),
    "timm/resnet10t": lambda: Backbone("timm/resnet10t", return_interm_layers=True),
    "timm/hgnetv2_b0": lambda: Backbone("timm/hgnetv2_b0"),
    "timm/seresnet18": lambda: Backbone("timm/seresnet18"),
}
FUSED = {"resnet18": 17, "bottlenecks": 19, "mobilenet_v2": 0}
"""Convolutions that end in a ReLU: the stem, two or three in a block; not those of projections, or before a ReLU6."""


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_networks_give_what_the_two_layers_give(name: str, primitives_run: list[str]) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    backbone = trained(NETWORKS[name]()).eval()
    folded = fold_for_inference(copy.deepcopy(backbone))
    batches = [[torch.randn(3, 75, 97)], [torch.randn(3, 64, 96), torch.randn(3, 33, 50), torch.randn(3, 64, 96)]]
    with torch.inference_mode():
        for images in batches:
            expected = backbone(images)
            assert expected.keys() == folded(images).keys()
            for got in (folded(images), folded.forward_by_size(images)):
                for level, features in expected.items():
                    assert_close(got[level].tensors, features.tensors)
                    assert torch.equal(got[level].mask, features.mask)
        if name in FUSED:
            primitives_run.clear()
            folded(batches[0])
            assert len(primitives_run) == FUSED[name]
            assert sum(isinstance(module, FusedConv2d) for module in folded.modules()) == FUSED[name]
    assert primitives_run or FUSED[name] == 0
    assert backbone.batching == folded.batching


@pytest.fixture(scope="module")
def bottlenecks() -> BackboneBase:
    """Folded, and not to be changed."""
    torch.manual_seed(0)
    return fold_for_inference(trained(_bottlenecks()))


@torch.no_grad()
def unfused(backbone: BackboneBase, images: Any) -> dict[str, Tensor]:
    return {name: level.tensors for name, level in backbone.forward_whole_batch(images, folds=False).items()}


@pytest.mark.parametrize("plan", ["forward_whole_batch", "forward_by_size"])
def test_a_fused_image_in_a_padded_batch_is_the_image_alone(bottlenecks: BackboneBase, plan: str) -> None:
    images = [torch.randn(3, 97, 75), torch.randn(3, 40, 128), torch.randn(3, 64, 64)]
    with torch.inference_mode():
        together = getattr(bottlenecks, plan)(images)
        for index, image in enumerate(images):
            for name, alone in bottlenecks([image]).items():
                h, w = alone.sizes[0]
                assert_close(together[name].tensors[index, :, :h, :w], alone.tensors[0])


def test_images_of_every_size_go_through_one_folded_network(
    bottlenecks: BackboneBase, primitives_run: list[str]
) -> None:
    for batch, height, width in ((1, 1, 1), (1, 33, 7), (3, 64, 65), (2, 128, 32)):
        images = torch.randn(batch, 3, height, width)
        with torch.inference_mode():
            got = bottlenecks(images)
        for name, expected in unfused(bottlenecks, images).items():
            assert_close(got[name].tensors, expected)
    assert len(primitives_run) == 4 * FUSED["bottlenecks"]


@pytest.mark.parametrize(
    "layers",
    [
        ["bn1", "relu", "maxpool", "layer1.0.conv3", "layer1.1.bn3", "layer1.1", "layer2.0.relu", "layer3"],
        ["maxpool", "layer1.0", "layer1", "layer4.0", "layer4"],
    ],
    ids=["layers", "blocks"],
)
def test_levels_are_what_the_layers_asked_for_return_and_stay_so(layers: list[str], primitives_run: list[str]) -> None:
    backbone = trained(BackboneBase(BottleneckNetwork(), return_layers=layers)).eval()
    images = torch.randn(1, 3, 65, 43)
    with torch.no_grad():
        expected = backbone(images)
        got = fold_for_inference(backbone)(images)

    assert "add" in primitives_run or "overwrite" in primitives_run
    assert list(got) == list(expected)
    for name, level in expected.items():
        assert_close(got[name].tensors, level.tensors)


class Cleared(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem_norm(self.stem(x)))
        z = F.relu(self.norm(self.conv(x)))
        x.zero_()
        return self.last(z)


def test_a_level_before_a_relu_is_computed_when_its_layer_returns() -> None:
    backbone = trained(BackboneBase(Cleared(), return_layers=["norm", "last"], train_layers=["conv"])).eval()
    images = torch.randn(1, 3, 17, 22)
    with torch.no_grad():
        expected = backbone(images)["0"].tensors
        assert_close(fold_for_inference(backbone)(images)["0"].tensors, expected)


def test_hooks_see_what_each_layer_takes_and_returns(bottlenecks: BackboneBase, primitives_run: list[str]) -> None:
    images = torch.randn(2, 3, 64, 43)
    expected: dict[str, Any] = {}
    with torch.no_grad():
        bottlenecks(images)
    assert primitives_run
    primitives_run.clear()
    for path in ("conv1", "bn1", "relu", "layer1.0.conv3", "layer1.0.relu", "layer1.1", "layer4"):
        seen: list[Any] = []
        handle = bottlenecks.body.get_submodule(path).register_forward_hook(
            lambda _, inputs, output, seen=seen: seen.append((inputs[0].clone(), output.clone()))
        )
        with torch.inference_mode():
            levels = bottlenecks(images)
        handle.remove()
        expected[path] = seen
    assert len(expected["relu"]) == 1
    assert len(expected["layer1.0.relu"]) == 3
    assert primitives_run == []
    assert bool((expected["layer1.0.conv3"][0][1] < 0).any())
    assert torch.equal(expected["layer1.1"][0][0], expected["layer1.0.relu"][2][1])
    assert torch.equal(expected["layer1.1"][0][1], levels["0"].tensors)


def test_a_hook_for_every_module_sees_tensors_that_are_computed(bottlenecks: BackboneBase) -> None:
    outputs: list[Any] = []
    handle = nn.modules.module.register_module_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        with torch.no_grad():
            bottlenecks(torch.randn(1, 3, 33, 32))
    finally:
        handle.remove()

    assert {type(output) for output in outputs} == {Tensor, dict}


def _replace(first: Bottleneck, second: Bottleneck) -> None:
    first.conv3 = nn.Conv2d(32, 256, 1).requires_grad_(requires_grad=False)


def _exchange(first: Bottleneck, second: Bottleneck) -> None:
    first.conv3, second.conv3 = second.conv3, first.conv3


@pytest.mark.parametrize("change", [_replace, _exchange])
def test_a_change_of_the_network_ends_fusing(
    change: Callable[[Bottleneck, Bottleneck], None], bottlenecks: BackboneBase, primitives_run: list[str]
) -> None:
    backbone = copy.deepcopy(bottlenecks)
    change(*backbone.body.layer1)
    images = torch.randn(1, 3, 48, 40)
    with torch.no_grad():
        got = backbone(images)

    assert primitives_run == []
    assert_close(got["0"].tensors, unfused(backbone, images)["0"])


def saved(backbone: BackboneBase) -> BackboneBase:
    file = io.BytesIO()
    torch.save(backbone, file)
    file.seek(0)
    loaded: BackboneBase = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
def test_copies_fuse_by_themselves(
    bottlenecks: BackboneBase, copied: Callable[[BackboneBase], BackboneBase], primitives_run: list[str]
) -> None:
    backbone, images = copied(bottlenecks), torch.randn(1, 3, 48, 40)
    with torch.no_grad():
        first = backbone(images)["3"].tensors
        assert len(primitives_run) == FUSED["bottlenecks"]
        for parameter in backbone.parameters():
            parameter.mul_(0.5)
        second = backbone(images)["3"].tensors
        assert_close(bottlenecks(images)["3"].tensors, first)

    assert_close(second, unfused(backbone, images)["3"])
    assert not torch.allclose(first, second)


def test_weights_and_keys_are_those_of_plain_convolutions(bottlenecks: BackboneBase) -> None:
    paths = [path for path, module in bottlenecks.named_modules() if isinstance(module, nn.Conv2d)]

    assert list(bottlenecks.state_dict()) == [f"{path}.{name}" for path in paths for name in ("weight", "bias")]


def test_bf16_is_computed_in_bf16_with_autocast_and_without(primitives_run: list[str]) -> None:
    backbone = trained(_bottlenecks()).eval()
    images = torch.randn(2, 3, 64, 75)
    with torch.no_grad():
        expected = backbone(images)["3"].tensors
        fold_for_inference(backbone, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            got = backbone(images)["3"].tensors
            plain = unfused(backbone, images)["3"]
        again = backbone(images.to(torch.bfloat16))["3"].tensors

    assert len(primitives_run) == 2 * FUSED["bottlenecks"]
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, again)
    assert_close(plain, expected, 0.05)  # eight bits, rounded at every layer
    assert (got.float() - expected).abs().mean() <= 1.1 * (plain.float() - expected).abs().mean()  # a rounding less


def test_float32_weights_under_autocast_compute_in_its_dtype(
    bottlenecks: BackboneBase, primitives_run: list[str]
) -> None:
    images = torch.randn(1, 3, 64, 43)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = bottlenecks(images)["3"].tensors

    assert primitives_run == []
    assert got.dtype == torch.bfloat16


def test_contiguous_maps_run_without_primitives(primitives_run: list[str]) -> None:
    backbone = trained(_bottlenecks(channels_last=False)).eval()
    images = torch.randn(2, 3, 48, 40)
    with torch.no_grad():
        expected = backbone(images)["3"].tensors
        got = fold_for_inference(backbone)(images)["3"].tensors

    assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func.jvp uses it
def test_gradients_reach_the_images(bottlenecks: BackboneBase, primitives_run: list[str]) -> None:
    images = torch.randn(1, 3, 48, 40)
    tangent = torch.randn_like(images)
    leaf = images.clone().requires_grad_()
    level = bottlenecks(leaf)["3"].tensors
    level.sum().backward()
    with forward_ad.dual_level():
        dual = bottlenecks(forward_ad.make_dual(images, tangent))["3"].tensors.sum()
        directional = forward_ad.unpack_dual(dual).tangent
    _, forward = torch.func.jvp(lambda x: bottlenecks(x)["3"].tensors.sum(), (images,), (tangent,))

    assert primitives_run == []
    for derivative in (forward, directional):
        torch.testing.assert_close(
            derivative, (leaf.grad * tangent).sum(), rtol=1e-3, atol=1e-3 * float(leaf.grad.norm())
        )


def test_no_graph_holds_a_private_operator(bottlenecks: BackboneBase) -> None:
    images = torch.randn(2, 3, 64, 43)
    with torch.no_grad():
        exported = torch.export.export(bottlenecks, (images,), strict=False)
        compiled = torch.compile(bottlenecks.forward_whole_batch, backend="eager", fullgraph=True)
        expected = unfused(bottlenecks, images)["3"]

        assert "mkldnn" not in str(exported.graph)
        assert_close(exported.module()(images)["3"].tensors, expected)
        assert_close(compiled(images)["3"].tensors, expected)
        backbone = copy.deepcopy(bottlenecks)
        backbone.body.layer2.compile(backend="eager", fullgraph=True)
        assert_close(backbone(images)["3"].tensors, expected)


def test_vmap_transforms_the_plain_operators() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), FrozenBatchNorm2d(8), nn.ReLU())
    backbone = BackboneBase(network, return_layers=["2"], train_layers=["0"], padding="zeros", channels_last=False)
    fold_for_inference(trained(backbone))
    images = torch.randn(2, 1, 3, 9, 11)

    def features(images: Tensor) -> Tensor:
        return backbone(NestedTensor(images, None))["0"].tensors

    with torch.no_grad():
        got = torch.func.vmap(features)(images)
        assert_close(got[:, 0], features(images[:, 0]))


def _absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitives, "_has_operators", lambda: False)


def _raising(monkeypatch: pytest.MonkeyPatch) -> None:
    def conv_relu(*_: Any) -> Tensor:
        raise RuntimeError("mkldnn: could not create a primitive")

    monkeypatch.setattr(primitives, "conv_relu", conv_relu)


def _another_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitives, "conv_relu", lambda: None)


def _without_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    def conv_relu(kind: primitives.Kind, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, kind.stride, kind.padding, kind.dilation, kind.groups)

    monkeypatch.setattr(primitives, "conv_relu", conv_relu)


def _without_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    def conv_add_relu(*args: Any, overwrite: bool) -> Tensor:
        return primitives.conv_relu(*args[:4])

    monkeypatch.setattr(primitives, "conv_add_relu", conv_add_relu)


def _nan(monkeypatch: pytest.MonkeyPatch) -> None:
    conv_relu = primitives.conv_relu
    monkeypatch.setattr(primitives, "conv_relu", lambda *args: conv_relu(*args) * torch.nan)


@pytest.mark.parametrize("fault", [_absent, _raising, _another_signature, _without_relu, _without_sum, _nan])
def test_a_primitive_that_is_absent_fails_or_is_wrong_is_not_used_and_said_once(
    fault: Callable[[pytest.MonkeyPatch], None],
    bottlenecks: BackboneBase,
    primitives_run: list[str],
    without_memory: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fault(monkeypatch)
    images = torch.randn(1, 3, 48, 40)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        got = bottlenecks(images)["3"].tensors

    assert set(primitives_run) == ({"relu"} if fault is _without_sum else set())
    assert_close(got, unfused(bottlenecks, images)["3"])
    assert len(caplog.records) == (0 if fault is _absent else 1)


def test_switching_onednn_off_switches_its_primitives_off(
    bottlenecks: BackboneBase, primitives_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(1, 3, 48, 40)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with torch.no_grad():
        bottlenecks(images)

    assert primitives_run == []


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 4, 3, padding=1, dtype=torch.float64),
    ],
    ids=str,
)
def test_a_convolution_of_another_kind_stays(convolution: nn.Conv2d, primitives_run: list[str]) -> None:
    network = nn.Sequential(convolution, FrozenBatchNorm2d(4).to(convolution.weight.dtype), nn.ReLU())
    backbone = BackboneBase(network, return_layers=["2"], train_layers=["0"], padding="zeros").eval()
    images = torch.randn(1, 3, 12, 13, dtype=convolution.weight.dtype)
    with torch.no_grad():
        expected = backbone(images)["0"].tensors
        got = fold_for_inference(backbone)(images)["0"].tensors

    assert primitives_run == []
    assert_close(got, expected)
