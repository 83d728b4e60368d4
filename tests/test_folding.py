"""Folding changes no number, and nothing that PyTorch lets a user do to a network makes it stale."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from detr_backbone import Backbone, BackboneBase, FrozenBatchNorm2d, calibrate_frozen_batch_norm, fold_for_inference
from detr_backbone.errors import ConfigError
from detr_backbone.folding import FoldedConv2d
from tests.small_networks import trained

# Folding rounds the weights once more: a few units of float32 over the depth of a network.
OUTPUT = {"rtol": 0.0, "atol": 1e-5}
GRADIENT = {"rtol": 0.0, "atol": 1e-4}


def conv_and_norm() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), FrozenBatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))


def tiny() -> BackboneBase:
    """A pair, and a convolution after it."""
    backbone = BackboneBase(conv_and_norm(), return_layers=["2"], train_layers=["0", "2"])
    trained(backbone)
    return backbone


def features(backbone: BackboneBase, images: Tensor, *, folds: bool = True) -> Tensor:
    return backbone.forward_whole_batch(images, folds=folds)["0"].tensors


def relative(difference: Tensor, to: Tensor) -> Tensor:
    return difference / to.abs().max()


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "mobilenet_v2", "regnet_y_400mf"])
def test_outputs_and_gradients_are_those_of_the_two_layers(name: str) -> None:
    network = torchvision.models.get_model(name, weights=None, norm_layer=FrozenBatchNorm2d)
    norms = sum(isinstance(module, FrozenBatchNorm2d) for module in network.modules())
    trains = [name for name, child in network.named_children() if any(True for _ in child.parameters())]
    backbone = trained(BackboneBase(network, train_layers=trains))
    images = torch.randn(2, 3, 64, 64)
    assert sum(isinstance(module, FoldedConv2d) for module in backbone.modules()) == norms

    results = []
    for folds in (False, True):
        backbone.zero_grad()
        output = features(backbone, images, folds=folds)
        output.square().sum().backward()
        results.append((output.detach(), {key: p.grad for key, p in backbone.named_parameters() if p.requires_grad}))
    (expected, expected_gradients), (got, gradients) = results
    torch.testing.assert_close(relative(got, expected), relative(expected, expected), **OUTPUT)
    for key, gradient in expected_gradients.items():
        largest = gradient.abs().max().clamp_min(1e-30)
        torch.testing.assert_close(gradients[key] / largest, gradient / largest, **GRADIENT, msg=key)


def test_the_state_dict_is_that_of_the_two_layers() -> None:
    backbone = tiny()
    before = copy.deepcopy(backbone.state_dict())
    backbone(torch.randn(1, 3, 8, 8))

    after = backbone.state_dict()
    assert list(after) == [f"body.{key}" for key in conv_and_norm().state_dict()]
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_layers_that_are_called_outside_of_a_pass_do_their_own_work() -> None:
    backbone, images = tiny(), torch.randn(1, 3, 8, 8)
    convolution, norm = backbone.body.get_submodule("0"), backbone.body.get_submodule("1")

    assert torch.equal(convolution(images), F.conv2d(images, convolution.weight, convolution.bias, padding=1))
    assert torch.equal(norm(images.expand(1, 3, 8, 8)[:, [0, 1, 2, 0]]), norm.normalise(images[:, [0, 1, 2, 0]]))


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = FrozenBatchNorm2d(4)
        self.last = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.last(self.norm(x) + x)


class Twice(TwoReaders):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(x)) + self.norm(self.conv(x * 2)))


class Between(TwoReaders):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(F.relu(self.conv(x), inplace=True)))


class Functional(TwoReaders):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.norm(self.conv(F.pad(x, (1, 1, 1, 1))[..., 1:-1, 1:-1]))))


class Doubling(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Conv2d's name
        return 2 * super().forward(input)


class Subclass(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Doubling(3, 4, 1)


@pytest.mark.parametrize(
    ("network", "folded"),
    [(TwoReaders(), False), (Twice(), False), (Between(), False), (Functional(), True), (Subclass(), False)],
    ids=lambda value: type(value).__name__,
)
def test_a_norm_is_folded_that_alone_reads_one_call_of_a_plain_convolution(network: nn.Module, folded: bool) -> None:
    backbone = BackboneBase(network, return_layers=["last"], train_layers=["conv"], padding="zeros")

    assert isinstance(backbone.body.get_submodule("conv"), FoldedConv2d) is folded


def test_a_convolution_that_is_asked_for_returns_its_own_output() -> None:
    backbone = trained(Backbone("resnet18", return_layers=["layer1.0.conv1", "layer4"]))
    images = torch.randn(1, 3, 64, 64)

    torch.testing.assert_close(features(backbone, images), features(backbone, images, folds=False))


def test_a_layer_that_ends_in_a_convolution_returns_that_convolution() -> None:
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), FrozenBatchNorm2d(4), nn.Conv2d(4, 4, 1))
    backbone = BackboneBase(network, return_layers=["0", "2"], train_layers=["0"])

    assert not any(isinstance(module, FoldedConv2d) for module in backbone.modules())


def _load(backbone: BackboneBase) -> None:
    backbone.load_state_dict({key: value + 1 for key, value in backbone.state_dict().items()})


def _assign(backbone: BackboneBase) -> None:
    backbone.load_state_dict({key: value + 1 for key, value in backbone.state_dict().items()}, assign=True)


def _step(backbone: BackboneBase, **options: bool) -> None:
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1.0, **options)
    features(backbone, torch.ones(1, 3, 8, 8)).sum().backward()
    optimizer.step()


def _fused_step(backbone: BackboneBase) -> None:
    _step(backbone, fused=True)  # does not raise the version of what it writes


def _statistics(backbone: BackboneBase) -> None:
    backbone.body.get_submodule("1").running_mean.add_(1)


def _copy_into_data(backbone: BackboneBase) -> None:
    parameter = backbone.body.get_parameter("0.weight")
    parameter.data.copy_(parameter.data + 1)  # as averaged weights are swapped in


def _new_data(backbone: BackboneBase) -> None:
    parameter = backbone.body.get_parameter("0.weight")
    parameter.data = parameter.data + 1


def _alias(backbone: BackboneBase) -> None:
    parameter = backbone.body.get_parameter("0.weight")
    values = parameter.detach().clone()
    parameter.data = values
    features(backbone, torch.ones(1, 3, 8, 8))
    values.add_(1)  # neither the address nor the version of the parameter changes


def _lbfgs(backbone: BackboneBase) -> None:
    optimizer = torch.optim.LBFGS(backbone.parameters(), lr=1.0, max_iter=1)

    def loss() -> Tensor:
        optimizer.zero_grad()
        loss = features(backbone, torch.ones(1, 3, 8, 8)).square().mean()
        loss.backward()
        return loss

    optimizer.step(loss)


def _new_parameter(backbone: BackboneBase) -> None:
    convolution = backbone.body.get_submodule("0")
    convolution.weight = nn.Parameter(convolution.weight.detach() + 1)


def _vector(backbone: BackboneBase) -> None:
    vector = nn.utils.parameters_to_vector(backbone.parameters())
    nn.utils.vector_to_parameters(vector + 1, backbone.parameters())


def _replace_convolution(backbone: BackboneBase) -> None:
    backbone.body["0"] = nn.Conv2d(3, 4, 3, padding=1)


def _copy_convolution(backbone: BackboneBase) -> None:
    backbone.body["0"] = copy.deepcopy(backbone.body["0"])


def _replace_norm(backbone: BackboneBase) -> None:
    backbone.body["1"] = trained(FrozenBatchNorm2d(4))


def _learned_norm(backbone: BackboneBase) -> None:
    backbone.body["1"] = nn.BatchNorm2d(4).eval()


def _no_norm(backbone: BackboneBase) -> None:
    backbone.body["1"] = nn.Identity()


class Adapter(nn.Module):
    """A wrapper as low-rank adapters are."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.more = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.more(x)


def _wrap(backbone: BackboneBase) -> None:
    backbone.body["0"] = Adapter(backbone.body["0"])


class Quantized(nn.Module):
    """A wrapper that reads the weights of what it wraps, as those of quantization-aware training do."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        step = self.base.weight.detach().abs().max() / 7
        return F.conv2d(x, (self.base.weight / step).round() * step, self.base.bias, padding=1)


def _quantize(backbone: BackboneBase) -> None:
    backbone.body["0"] = Quantized(backbone.body["0"])


def _hook_output(backbone: BackboneBase) -> None:
    backbone.body["0"].register_forward_hook(lambda _, __, output: output + 1)


def _hook_input(backbone: BackboneBase) -> None:
    backbone.body["1"].register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,))


def _patch(backbone: BackboneBase) -> None:
    convolution = backbone.body["0"]
    convolution.forward = lambda x: 2 * F.conv2d(x, convolution.weight, convolution.bias, padding=1)


def _share(backbone: BackboneBase) -> None:
    backbone.body["2"] = nn.Sequential(backbone.body["2"], nn.Conv2d(4, 3, 1), backbone.body["0"])


def _prune(backbone: BackboneBase) -> None:
    prune.l1_unstructured(backbone.body["0"], "weight", amount=0.5)
    backbone.body.get_parameter("0.weight_orig").data.mul_(2)  # shows in `weight` when the layer is called


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def _parametrize(backbone: BackboneBase) -> None:
    parametrize.register_parametrization(backbone.body["0"], "weight", Halved())


def _synchronise(backbone: BackboneBase) -> None:
    backbone.body["1"] = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4)).eval()


CHANGES = [
    *(_load, _assign, _step, _fused_step, _lbfgs, _statistics, _copy_into_data, _new_data, _alias, _new_parameter),
    *(_vector, _replace_convolution, _copy_convolution, _replace_norm, _learned_norm, _no_norm, _wrap, _share),
    *(_prune, _parametrize, _quantize, _synchronise, _hook_output, _hook_input, _patch),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_the_next_pass_gives_what_the_unfolded_network_gives(change: Callable[[BackboneBase], None]) -> None:
    torch.manual_seed(0)
    backbone, images = tiny().eval(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        before = features(backbone, images)
    change(backbone)
    with torch.no_grad():
        got, expected = features(backbone, images), features(backbone, images, folds=False)

    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)  # values up to 10
    assert change is _copy_convolution or not torch.allclose(got, before)


def test_hooks_see_what_a_convolution_gives_and_its_gradient() -> None:
    backbone, images = tiny(), torch.randn(1, 3, 8, 8, requires_grad=True)
    convolution, seen = backbone.body["0"], []
    convolution.register_forward_hook(lambda _, __, output: seen.append(output))
    convolution.register_full_backward_hook(lambda _, __, gradients: seen.append(gradients[0]))
    features(backbone, images).sum().backward()

    output = F.conv2d(images, convolution.weight, convolution.bias, padding=1).detach().requires_grad_()
    backbone.body["2"](backbone.body["1"](output)).sum().backward()
    torch.testing.assert_close(seen[0], output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[1], output.grad, rtol=1e-5, atol=1e-5)


def test_a_hook_for_every_module_sees_what_a_convolution_gives() -> None:
    backbone, images = tiny(), torch.randn(1, 3, 8, 8)
    convolution, seen = backbone.body["0"], {}
    handle = nn.modules.module.register_module_forward_hook(lambda module, _, output: seen.update({module: output}))
    features(backbone, images)
    handle.remove()

    expected = F.conv2d(images, convolution.weight, convolution.bias, padding=1)
    torch.testing.assert_close(seen[convolution], expected, rtol=1e-5, atol=1e-5)


def test_a_changed_network_stays_exact() -> None:
    backbone = tiny()
    backbone.body["2"] = nn.Conv2d(4, 4, 5, padding=2)  # nothing zeroes the padding before it
    small, large = torch.randn(3, 9, 13), torch.randn(3, 16, 16)
    alone, together = backbone([small])["0"], backbone([small, large])["0"]

    torch.testing.assert_close(together.tensors[0, :, :9, :13], alone.tensors[0])


class Deformed(nn.Module):
    """What takes the images, and is no nn.Conv2d."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


def test_images_are_not_compared_with_a_convolution_that_does_not_take_them() -> None:
    backbone, images = tiny(), torch.randn(1, 5, 8, 8)
    backbone.body["0"] = Deformed()

    torch.testing.assert_close(backbone(images)["0"].tensors, features(backbone, images, folds=False))


@pytest.mark.parametrize(("size", "scales_weights"), [((8, 8), True), ((8, 6), False)])
def test_the_fewer_of_weights_and_outputs_are_scaled(
    size: tuple[int, int], scales_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), FrozenBatchNorm2d(4), nn.ReLU())
    backbone = trained(BackboneBase(network, return_layers=["2"], train_layers=["0"]))
    images, normalised = torch.randn(2, 3, *size), []
    normalise = FrozenBatchNorm2d.normalise
    monkeypatch.setattr(FrozenBatchNorm2d, "normalise", lambda self, x: normalised.append(x) or normalise(self, x))
    got = features(backbone, images)
    assert len(normalised) == (0 if scales_weights else 1)

    torch.testing.assert_close(got, features(backbone, images, folds=False))


def test_autocast_computes_in_its_dtype_with_gradients_and_without() -> None:
    backbone, images = tiny(), torch.randn(1, 3, 8, 8)
    expected = features(backbone, images)
    with torch.autocast("cpu", torch.bfloat16):
        in_training = features(backbone, images)
        with torch.no_grad():
            in_inference = features(backbone, images)

    assert in_training.dtype == in_inference.dtype == torch.bfloat16
    assert torch.equal(in_training, in_inference)
    torch.testing.assert_close(in_training.float(), expected, rtol=0.02, atol=0.03)  # eight bits of mantissa


def test_parameters_are_as_pytorch_makes_them() -> None:
    backbone = Backbone("resnet18", return_interm_layers=True)
    levels = backbone(torch.randn(1, 3, 64, 64))

    assert all(parameter.is_contiguous() for parameter in backbone.parameters())
    assert all(level.tensors.is_contiguous(memory_format=torch.channels_last) for level in levels.values())


def test_gradients_have_the_strides_of_parameters() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1, stride=2), FrozenBatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1))
    backbone = BackboneBase(network, return_layers=["2"], train_layers=["0", "2"])
    features(backbone, torch.randn(2, 3, 16, 16)).sum().backward()

    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride(), name


def test_a_compiled_graph_holds_the_folding() -> None:
    backbone, images = tiny().eval(), torch.randn(1, 3, 8, 8)
    expected = features(backbone, images)
    compiled = torch.compile(backbone.forward_whole_batch, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images)["0"].tensors, expected)
        _statistics(backbone)
        torch.testing.assert_close(compiled(images)["0"].tensors, features(backbone, images))


@pytest.mark.parametrize("change", [_replace_convolution, _wrap, _replace_norm], ids=lambda change: change.__name__)
def test_a_compiled_graph_of_a_changed_network_gives_what_the_network_gives(
    change: Callable[[BackboneBase], None],
) -> None:
    torch.compiler.reset()
    backbone, images = tiny().eval(), torch.randn(1, 3, 8, 8)
    compiled = torch.compile(backbone.forward_whole_batch, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(images)
        change(backbone)
        expected = features(backbone, images, folds=False)
        torch.testing.assert_close(compiled(images)["0"].tensors, expected)


def test_a_convolution_that_an_adapter_makes_of_the_same_class_only_convolves() -> None:
    adapter = type(tiny().body.get_submodule("0"))(3, 4, 1)
    x = torch.rand(1, 3, 5, 7)

    assert adapter(x).equal(F.conv2d(x, adapter.weight, adapter.bias))


def test_a_frozen_first_part_builds_no_graph() -> None:
    levels = Backbone("resnet18", return_interm_layers=True)(torch.randn(1, 3, 64, 64))

    assert [level.tensors.requires_grad for level in levels.values()] == [False, True, True, True]


def test_a_hook_may_run_the_backbone_again() -> None:
    backbone, images = tiny(), [torch.randn(3, 9, 13), torch.randn(3, 8, 8)]
    expected = features(backbone, images)
    inner = []

    def again(*_: object) -> None:
        if not inner:
            inner.append(None)
            inner[0] = features(backbone, images)

    backbone.body.get_submodule("0").register_forward_hook(again)

    torch.testing.assert_close(features(backbone, images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inner[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_folding_for_inference_leaves_plain_convolutions(dtype: torch.dtype | None) -> None:
    backbone = trained(Backbone("resnet18", return_interm_layers=True))
    images = [torch.randn(3, 64, 64), torch.randn(3, 40, 50)]
    context = torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None)
    with torch.no_grad(), context:
        expected = backbone(images)
        assert fold_for_inference(backbone, dtype=dtype) is backbone
        got = backbone(images)

    kinds = {type(module) for module in backbone.body.modules()}
    assert nn.Conv2d in kinds
    assert not kinds & {FoldedConv2d, FrozenBatchNorm2d}
    assert {parameter.dtype for parameter in backbone.parameters()} == {dtype or torch.float32}
    # The weights are scaled in float32 and rounded once in both; in bf16 the bias is rounded too.
    tolerance = 1e-5 if dtype is None else 0.05
    for name, level in expected.items():
        largest = level.tensors.abs().max().item()
        torch.testing.assert_close(got[name].tensors, level.tensors, rtol=0, atol=tolerance * largest)


def test_what_follows_a_folded_norm_stays() -> None:
    pytest.importorskip("timm")
    backbone = trained(Backbone("timm/mobilenetv2_050"))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = features(backbone.eval(), images)
        torch.testing.assert_close(features(fold_for_inference(backbone), images), expected, rtol=1e-4, atol=1e-4)


def test_a_backbone_that_is_folded_for_inference_refuses_training() -> None:
    model = nn.Sequential(tiny(), nn.Identity())
    fold_for_inference(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())

    with pytest.raises(ConfigError, match="does not train"):
        model.train()
    with pytest.raises(ConfigError, match="Identity"):
        fold_for_inference(nn.Identity())


def test_a_changed_network_is_not_folded_for_inference() -> None:
    backbone = tiny()
    _replace_norm(backbone)

    with pytest.raises(ConfigError, match="as it was built"):
        fold_for_inference(backbone)


def test_calibration_does_not_depend_on_folding() -> None:
    folded = Backbone("resnet18", return_interm_layers=True)
    plain = copy.deepcopy(folded)
    plain._folded = {}
    images = [torch.randn(3, 64, 64), torch.randn(3, 48, 80)]
    for backbone in (folded, plain):
        calibrate_frozen_batch_norm(backbone, [images])

    for key, expected in plain.state_dict().items():
        torch.testing.assert_close(folded.state_dict()[key], expected, rtol=1e-4, atol=1e-4)


def _add_one(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1


@pytest.mark.parametrize("place", [0, 1])
def test_a_layer_with_a_forward_of_its_own_is_not_folded(place: int) -> None:
    network = trained(conv_and_norm())
    _add_one(network[place])
    images = torch.randn(1, 3, 16, 20)
    expected = network(images)

    torch.testing.assert_close(features(BackboneBase(network, return_layers=("2",), train_layers=()), images), expected)


def test_a_pair_that_a_hook_reaches_into_is_not_folded_for_good() -> None:
    backbone = Backbone("resnet18", return_layers=("layer1",), train_layers=())
    trained(backbone).body.layer1[0].conv1.register_forward_hook(lambda *args: args[-1] * 2 + 1)
    images = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        expected = backbone.eval()(images)["0"].tensors
        torch.testing.assert_close(fold_for_inference(backbone)(images)["0"].tensors, expected, rtol=1e-4, atol=1e-4)


def test_a_weight_that_a_hook_computes_is_refused_before_anything_is_folded() -> None:
    backbone = Backbone("resnet18", return_layers=("layer1",), train_layers=())
    prune.l1_unstructured(backbone.body.layer1[1].conv1, "weight", amount=0.5)
    before = list(backbone.state_dict())

    with pytest.raises(ConfigError, match=r"got that of layer1\.1\.conv1"):
        fold_for_inference(backbone)

    assert list(backbone.state_dict()) == before


def test_weights_that_are_not_finite_are_not_folded() -> None:
    backbone = Backbone("resnet18", return_layers=("layer1",), train_layers=())
    backbone.body.layer1[1].conv1.weight[3] = float("nan")

    with pytest.raises(ConfigError, match=r"in layer1\.1\.conv1\.weight"):
        fold_for_inference(backbone)
