"""What stands where a network has BatchNorm: frozen it equals eval(), and one that learns does so where it should."""

import copy

import pytest
import torch
import torchvision
from timm.layers import BatchNormAct2d
from torch import nn

from detr_backbone import Backbone, BackboneBase, FrozenBatchNorm2d, calibrate_frozen_batch_norm
from detr_backbone.errors import ConfigError
from detr_backbone.networks.norms import convert_batch_norm, freeze_batch_norm

ALL = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")


def trained(norm: nn.Module) -> nn.Sequential:
    """A layer with numbers as training leaves them, inside of a network."""
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if name.endswith("running_var") else nn.init.normal_(tensor, std=0.1)
    return nn.Sequential(nn.Identity(), norm).eval()


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(6, eps=1e-3),
        nn.BatchNorm2d(6, affine=False),
        nn.SyncBatchNorm(6, eps=1e-2),
        BatchNormAct2d(6, eps=1e-3),
        BatchNormAct2d(6, act_layer=nn.SiLU, inplace=False),
        BatchNormAct2d(6, apply_act=False),
        BatchNormAct2d(6, act_layer=nn.PReLU),
    ],
    ids=lambda norm: f"{type(norm).__name__}, eps={norm.eps}, affine={norm.affine}",
)
def test_a_frozen_layer_computes_what_the_layer_computes_in_eval_mode(norm: nn.Module) -> None:
    network = trained(norm)
    x = torch.randn(2, 6, 5, 7)
    expected, keys = network(x.clone()), [key for key in network.state_dict() if "num_batches" not in key]

    frozen = freeze_batch_norm(network)

    torch.testing.assert_close(frozen.train()(x), expected, rtol=0, atol=1e-6)
    assert list(frozen.state_dict()) == keys
    assert isinstance(frozen[1], FrozenBatchNorm2d)
    assert {"weight", "bias", "running_mean", "running_var"} == dict(frozen[1].named_buffers()).keys()


@pytest.mark.parametrize(
    ("norm", "shape"), [(nn.BatchNorm1d, (2, 6, 9)), (nn.BatchNorm1d, (4, 6)), (nn.BatchNorm3d, (2, 6, 3, 4, 5))]
)
def test_a_norm_of_tokens_or_volumes_is_frozen_too(norm: type[nn.Module], shape: tuple[int, ...]) -> None:
    network = trained(norm(6, eps=1e-3))
    x = torch.randn(shape)
    expected = network(x)

    torch.testing.assert_close(freeze_batch_norm(network).train()(x), expected, rtol=0, atol=1e-6)


def test_a_layer_in_two_places_stays_one_layer() -> None:
    norm = nn.BatchNorm2d(3)
    network = freeze_batch_norm(nn.Sequential(norm, nn.ReLU(), norm))

    assert network[0] is network[2]


class Doubled(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (nn.BatchNorm2d(4, track_running_stats=False), "without running statistics cannot be frozen, got 1 "),
        (Doubled(4), "unsupported BatchNorm subclass Doubled, at 1"),
    ],
)
def test_a_layer_that_cannot_be_frozen_is_named(norm: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        freeze_batch_norm(nn.Sequential(nn.Identity(), norm))


def test_calibration_keeps_a_fused_activation() -> None:
    first, second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
    fused = nn.Sequential(first, BatchNormAct2d(6), second, nn.BatchNorm2d(4))
    plain = nn.Sequential(copy.deepcopy(first), nn.BatchNorm2d(6), nn.ReLU(), copy.deepcopy(second), nn.BatchNorm2d(4))
    x = torch.randn(4, 3, 16, 16)
    last = []
    for network in (fused, plain):
        name = str(len(network) - 1)
        backbone = BackboneBase(freeze_batch_norm(network), return_layers=[name], train_layers=[])
        calibrate_frozen_batch_norm(backbone, [x])
        last.append(backbone.body.get_submodule(name).running_mean)

    torch.testing.assert_close(last[0], last[1], rtol=1e-6, atol=1e-7)


def test_batch_norm_learns_and_moves_in_training() -> None:
    backbone = Backbone("resnet18", norm="batch", padding="zeros", train_layers=ALL).train()
    norm = backbone.body.get_submodule("layer2.0.bn1")
    before = norm.running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64))["0"].tensors.sum().backward()

    assert norm.weight.grad is not None
    assert not torch.equal(norm.running_mean, before)


def test_batch_norm_is_frozen_where_nothing_trains() -> None:
    backbone = Backbone("resnet18", norm="batch", padding="zeros").train()
    kinds = {path: type(backbone.body.get_submodule(path)) for path in ("bn1", "layer1.0.bn1", "layer2.0.bn1")}

    assert kinds == {"bn1": FrozenBatchNorm2d, "layer1.0.bn1": FrozenBatchNorm2d, "layer2.0.bn1": nn.BatchNorm2d}


@pytest.mark.parametrize(("norm", "kind"), [("sync", nn.SyncBatchNorm), ("group", nn.GroupNorm)])
def test_a_norm_is_chosen_by_name(norm: str, kind: type[nn.Module]) -> None:
    backbone = Backbone("resnet18", norm=norm, padding="zeros", train_layers=ALL)  # type: ignore[arg-type]

    assert sum(isinstance(module, kind) for module in backbone.modules()) == 20
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules())


def test_group_norm_has_32_groups_and_keeps_a_fused_activation() -> None:
    network = nn.Sequential(nn.Identity(), BatchNormAct2d(64, act_layer=nn.SiLU))
    convert_batch_norm(network, lambda _: "group")
    x = torch.randn(2, 64, 5, 7)

    torch.testing.assert_close(network(x), nn.functional.silu(nn.functional.group_norm(x, 32)))


def test_group_norm_keeps_the_scale_and_shift_that_a_network_begins_with() -> None:
    plain = nn.BatchNorm2d(64)
    nn.init.zeros_(plain.weight)  # as the last norm of a residual block begins in many networks
    nn.init.normal_(plain.bias)
    bias = plain.bias.clone()
    grouped = convert_batch_norm(nn.Sequential(plain, nn.BatchNorm2d(32, affine=False)), lambda _: "group")

    assert not grouped[0].weight.any()
    assert torch.equal(grouped[0].bias, bias)
    assert not list(grouped[1].parameters())


def test_statistics_that_data_has_moved_are_not_thrown_away_for_group_norm() -> None:
    network = nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32))
    network(torch.rand(2, 3, 4, 4))

    with pytest.raises(ConfigError, match="statistics of a BatchNorm that has seen data, got 1 "):
        convert_batch_norm(network, lambda _: "group")


def test_sync_batch_norm_keeps_weights_and_statistics() -> None:
    network = trained(nn.BatchNorm2d(6, eps=1e-3))
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    x = torch.randn(2, 6, 5, 7)
    expected = network(x)

    synchronised = convert_batch_norm(network, lambda _: "sync")

    assert isinstance(synchronised[1], nn.SyncBatchNorm)
    assert all(torch.equal(tensor, before[key]) for key, tensor in synchronised.state_dict().items())
    torch.testing.assert_close(synchronised(x), expected)


def test_batch_statistics_are_not_exact() -> None:
    with pytest.raises(ConfigError, match=r"got 'exact': .*bn1 \(.*takes its statistics from the batch"):
        Backbone("resnet18", norm="batch")


def test_group_norm_is_exact_by_size() -> None:
    backbone = Backbone("resnet18", norm="group")

    assert backbone.batching == "by_size"
    assert str(backbone.leak).startswith("bn1 ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "layer"}, r"`norm` must be one of \['frozen', 'batch', 'sync', 'group'\], got 'layer'"),
        ({"norm": "group", "weights": "IMAGENET1K_V1"}, "`norm` must not be 'group' with `weights`, got IMAGENET1K_V1"),
        ({"norm": "group", "name": "mobilenet_v2"}, "needs channels that 32 divides .*, got 16 at features.1.conv.2"),
        ({"norm": "sync", "name": "timm/tf_efficientnet_lite0"}, "must not be 'sync' for a BatchNorm with a fused"),
    ],
)
def test_a_norm_that_cannot_be_built_says_why(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Backbone(**({"name": "resnet18", "padding": "zeros"} | options))  # type: ignore[arg-type]


def test_weights_of_batch_norm_load_into_batch_norm_that_learns(tmp_path) -> None:
    network = trained(torchvision.models.resnet18())[1]
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    learning = Backbone("resnet18", norm="batch", padding="zeros", weights=str(tmp_path / "weights.pth")).eval()
    frozen = Backbone("resnet18", weights=str(tmp_path / "weights.pth")).eval()
    x = torch.randn(1, 3, 64, 64)

    torch.testing.assert_close(learning(x)["0"].tensors, frozen(x)["0"].tensors)


@pytest.mark.parametrize("own", ["hook", "gradient hook", "forward"])
def test_a_norm_that_does_more_than_its_class_is_not_replaced(own: str) -> None:
    network = nn.Sequential(nn.BatchNorm2d(6))
    if own == "hook":
        network[0].register_forward_hook(lambda *args: args[-1] * 2)
    elif own == "gradient hook":
        network[0].register_full_backward_hook(lambda *_: None)
    else:
        network[0].forward = lambda x: x

    with pytest.raises(ConfigError, match="got those of 0"):
        freeze_batch_norm(network)
