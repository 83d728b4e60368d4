"""Frozen BatchNorm equals BatchNorm in eval mode, and can be calibrated from data."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from detr_backbone import (
    Backbone,
    BackboneBase,
    FrozenBatchNorm2d,
    Joiner,
    PositionEmbeddingSine,
    calibrate_frozen_batch_norm,
)
from detr_backbone.errors import NumericsError
from detr_backbone.nested_tensor import nested_tensor_from_tensor_list


def trained_batch_norm(channels: int = 6, eps: float = 1e-3) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=eps).eval()
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if name == "running_var" else nn.init.normal_(tensor)
    return norm


def frozen(norm: nn.BatchNorm2d) -> FrozenBatchNorm2d:
    layer = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
    layer.load_state_dict(norm.state_dict())
    return layer


def test_output_equals_batch_norm_in_eval_mode() -> None:
    norm = trained_batch_norm()
    x = torch.randn(2, 6, 5, 7)

    torch.testing.assert_close(frozen(norm)(x), norm(x), rtol=0, atol=1e-6)


def test_it_has_the_four_buffers_of_batch_norm_and_no_parameters() -> None:
    layer = FrozenBatchNorm2d(4)

    assert list(layer.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    assert not list(layer.parameters())


def test_training_mode_changes_neither_output_nor_statistics() -> None:
    layer = frozen(trained_batch_norm())
    x = torch.randn(4, 6, 5, 7)
    before, expected = copy.deepcopy(layer.state_dict()), layer.eval()(x)

    assert torch.equal(layer.train()(x), expected)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("half_buffers", [False, True])
def test_output_has_the_dtype_of_its_input(dtype: torch.dtype, half_buffers: bool) -> None:
    layer = frozen(trained_batch_norm())
    x = torch.randn(2, 6, 5, 7)
    expected = layer(x)
    output = (layer.to(dtype) if half_buffers else layer)(x.to(dtype))

    assert output.dtype == dtype
    # two roundings of numbers up to 8: at most 2 * 8 * 2^-9 for bfloat16, with its 8 bits of precision
    torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0.05)


def test_output_keeps_its_dtype_under_autocast() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 6, 3), frozen(trained_batch_norm()))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(1, 3, 8, 8)).dtype == torch.bfloat16


def test_a_tiny_variance_stays_finite_in_half_precision() -> None:
    layer = FrozenBatchNorm2d(1).half()
    layer.running_var.fill_(1e-8)  # rounds to zero in float16

    # 1 / sqrt(0 + 1e-5) = 316.2, to the 2^-2 that float16 has left there
    torch.testing.assert_close(layer(torch.ones(1, 1, 1, 1).half()).item(), 316.2, rtol=0, atol=0.25)


def test_another_number_of_channels_is_refused() -> None:
    with pytest.raises(RuntimeError, match="running_mean should contain 1 elements not 6"):
        FrozenBatchNorm2d(6)(torch.ones(1, 1, 4, 4))


def seen_by_torch(network: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # cumulative mean
    network.train()
    with torch.no_grad():
        for batch in batches:
            network(batch)
    return {name: buffer for name, buffer in network.named_buffers() if "num_batches" not in name}


def test_calibration_equals_the_cumulative_statistics_of_batch_norm() -> None:
    batches = [torch.randn(2, 3, 64, 96), torch.randn(3, 3, 40, 40)]
    network = torchvision.models.resnet18()
    backbone = Backbone("resnet18")
    backbone.body.load_state_dict(network.state_dict(), strict=False)

    images = calibrate_frozen_batch_norm(backbone, batches)

    assert images == 5
    expected = seen_by_torch(network, batches)
    got = {name: buffer for name, buffer in backbone.body.named_buffers() if "running" in name}
    assert len(got) == 40
    for name, buffer in got.items():
        torch.testing.assert_close(buffer, expected[name], rtol=1e-4, atol=1e-5)


def test_calibration_does_not_count_padding() -> None:
    small, large = torch.randn(3, 33, 47), torch.randn(3, 64, 96)
    joiner = Joiner(Backbone("resnet18"), PositionEmbeddingSine())
    calibrate_frozen_batch_norm(joiner, [[small, large]])
    stem = joiner[0].body

    convolved = [F.conv2d(image, stem.conv1.weight, stride=2, padding=3) for image in (small, large)]
    cells = torch.cat([features.flatten(1) for features in convolved], dim=1)
    torch.testing.assert_close(stem.bn1.running_mean, cells.mean(dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stem.bn1.running_var, cells.var(dim=1), rtol=1e-4, atol=1e-5)


def test_calibration_counts_every_token_where_a_norm_takes_no_map() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 96, 32, stride=32)  # 96 channels pass for the 16 + 8 x 10 tokens of the probe
            self.norm = FrozenBatchNorm2d(96)
            self.last = nn.Conv2d(96, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x)
            return self.last(self.norm(x.flatten(2)).unflatten(2, x.shape[2:]))

    backbone = BackboneBase(Tokens(), return_layers=["last"], train_layers=[], padding="zeros")
    batch = nested_tensor_from_tensor_list([torch.rand(3, 64, 64), torch.rand(3, 32, 64)])
    calibrate_frozen_batch_norm(backbone, [batch])

    with torch.no_grad():
        expected = backbone.body.patches(batch.tensors).mean((0, 2, 3))
    torch.testing.assert_close(backbone.body.norm.running_mean, expected)


def test_a_calibrated_random_network_keeps_its_features_in_scale() -> None:
    backbone = Backbone("resnet50", return_interm_layers=True)
    images = torch.randn(4, 3, 64, 64)
    before = backbone(images)["3"].tensors.std()
    calibrate_frozen_batch_norm(backbone, [images])
    after = [level.tensors.std().item() for level in backbone(images).values()]

    assert before > 5  # statistics (0, 1): every block adds to the scale
    assert max(after) < 3


def test_calibration_leaves_no_hook_behind() -> None:
    backbone = Backbone("resnet18")
    calibrate_frozen_batch_norm(backbone, [torch.randn(2, 3, 32, 32)])

    assert not any(module._forward_hooks for module in backbone.modules())


def test_calibration_without_data_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate_frozen_batch_norm(Backbone("resnet18"), [])


def test_calibration_with_a_single_cell_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two valid cells"):
        calibrate_frozen_batch_norm(Backbone("resnet18"), [torch.randn(1, 3, 32, 32)])


def test_calibration_with_nan_names_the_layer() -> None:
    with pytest.raises(NumericsError, match="statistics of 'bn1'"):
        calibrate_frozen_batch_norm(
            Backbone("resnet18"), [nested_tensor_from_tensor_list(torch.full((2, 3, 64, 64), torch.nan))]
        )
