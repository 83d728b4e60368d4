import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrize

from detr_backbone import Backbone, FrozenBatchNorm2d, IntermediateLayerGetter, calibrate_frozen_batch_norm
from detr_backbone.folding import FoldedConv2d, fold_frozen_batch_norm, unfold_frozen_batch_norm

# Folding rounds the weights once more: a few units of float32 over the depth of a network.
OUTPUT = {"rtol": 0.0, "atol": 1e-5}
GRADIENT = {"rtol": 0.0, "atol": 1e-4}


def trained(network: nn.Module) -> nn.Module:
    """The network with statistics as training leaves them, instead of (0, 1)."""
    for norm in network.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.0)
            nn.init.normal_(norm.bias, std=0.3)
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return network


def conv_and_norm() -> nn.Sequential:
    network = trained(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), FrozenBatchNorm2d(4)))
    assert isinstance(network, nn.Sequential)
    return network


def relative(difference: Tensor, to: Tensor) -> Tensor:
    return difference / to.abs().max()


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "mobilenet_v2", "regnet_y_400mf"])
def test_outputs_and_gradients_are_those_of_the_two_layers(name: str) -> None:
    network = trained(torchvision.models.get_model(name, weights=None, norm_layer=FrozenBatchNorm2d)).eval()
    images = torch.randn(2, 3, 64, 64)
    folded = copy.deepcopy(network)
    norms = sum(isinstance(module, FrozenBatchNorm2d) for module in network.modules())
    assert fold_frozen_batch_norm(folded) == norms

    outputs = [model(images) for model in (network, folded)]
    torch.testing.assert_close(relative(outputs[1], outputs[0]), relative(outputs[0], outputs[0]), **OUTPUT)
    for output in outputs:
        output.square().sum().backward()
    for (key, expected), got in zip(network.named_parameters(), folded.parameters(), strict=True):
        assert expected.grad is not None, key
        assert got.grad is not None, key
        largest = expected.grad.abs().max().clamp_min(1e-30)
        torch.testing.assert_close(got.grad / largest, expected.grad / largest, **GRADIENT)


def test_the_state_dict_is_that_of_the_two_layers() -> None:
    network = conv_and_norm()
    before = copy.deepcopy(network.state_dict())
    fold_frozen_batch_norm(network)
    network(torch.randn(1, 3, 8, 8))

    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_unfolding_gives_both_layers_their_work_back() -> None:
    network, images = conv_and_norm(), torch.randn(1, 3, 8, 8)
    convolved, normed = network[0](images), network(images)
    assert fold_frozen_batch_norm(network) == 1
    torch.testing.assert_close(network[0](images), normed)

    assert unfold_frozen_batch_norm(network) == 1
    assert type(network[0]) is nn.Conv2d
    torch.testing.assert_close(network[0](images), convolved, rtol=0, atol=0)
    torch.testing.assert_close(network(images), normed, rtol=0, atol=0)


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = FrozenBatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) + x


class Twice(TwoReaders):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.conv(x * 2))


class Between(TwoReaders):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.conv(x), inplace=True))


@pytest.mark.parametrize("network", [TwoReaders(), Twice(), Between()], ids=lambda network: type(network).__name__)
def test_a_norm_that_is_not_the_only_reader_of_one_convolution_is_left(network: nn.Module) -> None:
    assert fold_frozen_batch_norm(network) == 0
    assert type(network.get_submodule("conv")) is nn.Conv2d


def test_functional_code_between_layers_is_seen() -> None:
    class Functional(TwoReaders):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.conv(F.pad(x, (1, 1, 1, 1)))))

    assert fold_frozen_batch_norm(Functional()) == 1


def test_a_convolution_of_another_class_is_left() -> None:
    class Doubling(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return 2 * super().forward(input)

    assert fold_frozen_batch_norm(nn.Sequential(Doubling(3, 4, 1), FrozenBatchNorm2d(4))) == 0


def test_a_convolution_that_is_asked_for_returns_its_own_output() -> None:
    backbone = Backbone("resnet18", return_layers=["layer1.0.conv1", "layer4"])
    trained(backbone)
    images = torch.randn(1, 3, 64, 64)
    got = backbone(images)["0"].tensors
    unfold_frozen_batch_norm(backbone)

    torch.testing.assert_close(got, backbone(images)["0"].tensors)


def _load(network: nn.Sequential) -> None:
    network.load_state_dict({key: value + 1 for key, value in network.state_dict().items()})


def _assign(network: nn.Sequential) -> None:
    state = {key: value + 1 for key, value in network.state_dict().items()}
    network.load_state_dict(state, assign=True)


def _step(network: nn.Sequential) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    network(torch.ones(1, 3, 4, 4)).sum().backward()
    optimizer.step()


def _statistics(network: nn.Sequential) -> None:
    network[1].running_mean.add_(1)


def _through_data(network: nn.Sequential) -> None:
    network.train()
    network[0].weight.data.add_(1)
    network.eval()


def _double(network: nn.Sequential) -> None:
    network.double()


@pytest.mark.parametrize("change", [_load, _assign, _step, _statistics, _through_data, _double])
def test_what_is_kept_for_inference_follows_every_change(change: Callable[[nn.Sequential], None]) -> None:
    network, images = conv_and_norm(), torch.randn(1, 3, 8, 8)
    fold_frozen_batch_norm(network)
    with torch.no_grad():
        before = network(images)
    change(network)
    with torch.no_grad():
        images = images.to(network[0].weight.dtype)
        got = network(images)
        unfold_frozen_batch_norm(network)

        torch.testing.assert_close(got, network(images))
        assert got.dtype != before.dtype or not torch.allclose(got, before)


def test_inference_folds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = conv_and_norm(), torch.randn(1, 3, 8, 8)
    fold_frozen_batch_norm(network)
    folds = []
    fold = FoldedConv2d._fold
    monkeypatch.setattr(FoldedConv2d, "_fold", lambda self, dtype: folds.append(dtype) or fold(self, dtype))
    for context in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with context():
            network(images)

    assert len(folds) == 1
    network(images).sum().backward()  # what inference kept does not get into training
    assert network[0].weight.grad is not None


@pytest.mark.parametrize(("size", "scales_weights"), [((8, 8), True), ((8, 6), False)])
def test_training_scales_the_fewer_of_weights_and_outputs(
    size: tuple[int, int], scales_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = trained(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), FrozenBatchNorm2d(4)))
    images = torch.randn(2, 3, *size)
    expected = network(images)
    fold_frozen_batch_norm(network)
    scaled = []
    fold = FoldedConv2d._fold
    monkeypatch.setattr(FoldedConv2d, "_fold", lambda self, dtype: scaled.append(self) or fold(self, dtype))
    for _ in range(2):
        torch.testing.assert_close(network(images), expected)
    assert len(scaled) == (2 if scales_weights else 0)
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected)
    assert len(scaled) == (3 if scales_weights else 1)  # without gradients they are scaled once, whatever comes out


def test_a_parametrized_weight_is_not_kept() -> None:
    class Scaled(nn.Module):
        factor = 1.0

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.factor

    network, images = conv_and_norm(), torch.randn(1, 3, 8, 8)
    fold_frozen_batch_norm(network)
    scaled = Scaled()
    parametrize.register_parametrization(network[0], "weight", scaled)
    with torch.no_grad():
        network(images)
        scaled.factor = 2.0
        got = network(images)
        plain = F.conv2d(images, network[0].weight, network[0].bias, padding=1)
        network[1].folded = False

        torch.testing.assert_close(got, network[1](plain))


def test_autocast_computes_in_its_dtype_with_gradients_and_without() -> None:
    network, images = conv_and_norm(), torch.randn(1, 3, 8, 8)
    expected = network(images)
    fold_frozen_batch_norm(network)
    with torch.autocast("cpu", torch.bfloat16):
        in_training = network(images)
        with torch.no_grad():
            in_inference = network(images)

    assert in_training.dtype == in_inference.dtype == torch.bfloat16
    assert torch.equal(in_training, in_inference)
    torch.testing.assert_close(in_training.float(), expected, rtol=0.02, atol=0.02)  # eight bits of mantissa


def test_copies_and_pickles_are_folded_by_their_own_norms() -> None:
    network, images = conv_and_norm(), torch.randn(1, 3, 8, 8)
    fold_frozen_batch_norm(network)
    with torch.no_grad():
        expected = network(images)
    file = io.BytesIO()
    torch.save(network, file)
    size = file.tell()
    file.seek(0)
    for twin in (copy.deepcopy(network), torch.load(file, weights_only=False)):
        assert twin[0].norm[0] is twin[1]
        assert twin[0].norm[0] is not network[1]
        torch.testing.assert_close(twin(images), expected)
    unfold_frozen_batch_norm(network)
    torch.save(network, plain := io.BytesIO())
    assert size < plain.tell() + 500  # what is kept for inference is not in the file


def test_a_compiled_graph_holds_the_folding() -> None:
    network, images = conv_and_norm(), torch.randn(1, 3, 8, 8)
    fold_frozen_batch_norm(network)
    expected = network(images)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), expected)
        network[1].running_mean.add_(1)
        torch.testing.assert_close(compiled(images), network(images))


def test_a_frozen_first_part_builds_no_graph() -> None:
    levels = Backbone("resnet18", return_interm_layers=True)(torch.randn(1, 3, 64, 64))

    assert [level.tensors.requires_grad for level in levels.values()] == [False, True, True, True]


def test_a_folded_backbone_is_calibrated_like_an_unfolded_one() -> None:
    folded = Backbone("resnet18", return_interm_layers=True)
    plain = copy.deepcopy(folded)
    unfold_frozen_batch_norm(plain)
    images = [torch.randn(3, 64, 64), torch.randn(3, 48, 80)]
    for backbone in (folded, plain):
        calibrate_frozen_batch_norm(backbone, [images])

    for key, expected in plain.state_dict().items():
        torch.testing.assert_close(folded.state_dict()[key], expected, rtol=1e-4, atol=1e-4)


def test_a_layer_that_ends_in_a_convolution_returns_that_convolution() -> None:
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), FrozenBatchNorm2d(4), nn.Conv2d(4, 4, 1))
    getter = IntermediateLayerGetter(network, ["0", "2"])

    assert fold_frozen_batch_norm(getter) == 0
