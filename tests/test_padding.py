"""An image's features never depend on who shares its batch."""

import copy
import math
import pickle
import threading
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from detr_backbone import Backbone, BackboneBase, FrozenBatchNorm2d, nested_tensor_from_tensor_list
from detr_backbone.errors import ConfigError
from detr_backbone.nested_tensor import valid_sizes
from detr_backbone.networks.norms import freeze_batch_norm
from detr_backbone.padding.exact import feature_level


def with_random_statistics(backbone: BackboneBase) -> BackboneBase:
    """A backbone whose BatchNorm shifts, so that padding would not stay zero by itself."""
    torch.manual_seed(0)
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.6)
            nn.init.normal_(module.bias, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return backbone.eval()


@cache
def random_backbone(name: str) -> Backbone:
    return with_random_statistics(Backbone(name, return_interm_layers=True))


side = st.integers(1, 97)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(name=st.sampled_from(["resnet18", "resnet50"]), sizes=st.lists(st.tuples(side, side), min_size=2, max_size=3))
def test_an_image_alone_has_the_features_it_has_in_any_batch(name: str, sizes: list[tuple[int, int]]) -> None:
    images = [torch.randn(3, h, w) for h, w in sizes]
    with torch.no_grad():
        together = random_backbone(name)(images)
        for index, image in enumerate(images):
            for level, alone in random_backbone(name)([image]).items():
                h, w = alone.tensors.shape[-2:]
                assert together[level].sizes[index] == (h, w)
                # sums in another order: values are of order 1, float32 has 1e-7
                torch.testing.assert_close(
                    together[level].tensors[index, :, :h, :w], alone.tensors[0], rtol=1e-5, atol=1e-5
                )


def test_zeros_mode_lets_padding_leak() -> None:
    backbone = with_random_statistics(Backbone("resnet18", padding="zeros"))
    small, large = torch.randn(3, 64, 64), torch.randn(3, 97, 97)
    with torch.no_grad():
        alone, together = backbone([small])["0"].tensors[0], backbone([small, large])["0"].tensors[0, :, :2, :2]

    assert (alone - together).abs().max() > 0.05 * alone.abs().max()


def convolutions(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), *between, nn.Conv2d(8, 8, 3, padding=1))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1)])
def test_other_networks_of_known_layers_are_exact_too(pool: nn.Module) -> None:
    backbone = BackboneBase(convolutions(pool), return_layers=["3"], train_layers=["0"])
    small, large = torch.randn(3, 17, 19), torch.randn(3, 40, 33)

    torch.testing.assert_close(
        backbone([small, large])["0"].tensors[:1, :, :5, :5], backbone([small])["0"].tensors, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 8),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.InstanceNorm2d(8),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_images_run_by_size_through_a_layer_that_would_let_padding_in(layer: nn.Module) -> None:
    backbone = BackboneBase(convolutions(layer), return_layers=["3"], train_layers=["0"])
    assert (backbone.batching, str(backbone.leak).split()[0]) == ("by_size", "2")
    images = [torch.randn(3, 17, 19), torch.randn(3, 40, 33), torch.randn(3, 17, 19)]
    batch = backbone(images)["0"]

    for index, image in enumerate(images):
        level = backbone([image])["0"]
        ((h, w),) = level.sizes
        torch.testing.assert_close(batch.tensors[index, :, :h, :w], level.tensors[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.InstanceNorm2d(8, track_running_stats=True)], ids=repr)
def test_a_norm_with_statistics_of_the_batch_is_refused(norm: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"`padding` must be 'zeros' for this network, got 'exact': 2 \("):
        BackboneBase(convolutions(norm), return_layers=["3"], train_layers=["0"])


@pytest.mark.parametrize(
    "network", [convolutions(nn.ReLU()), convolutions(nn.GroupNorm(2, 8))], ids=["masked", "by_size"]
)
@given(sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_no_image_depends_on_its_batch_whatever_their_sizes(network: nn.Module, sizes: list[tuple[int, int]]) -> None:
    backbone = BackboneBase(copy.deepcopy(network), return_layers=["3"], train_layers=["0"]).double()
    images = [torch.randn(3, *size, dtype=torch.float64) for size in sizes]
    with torch.no_grad():
        for run in (backbone, backbone.forward_by_size):
            batch = run(images)["0"]
            for index, image in enumerate(images):
                level = backbone([image])["0"]
                ((h, w),) = level.sizes
                torch.testing.assert_close(batch.tensors[index, :, :h, :w], level.tensors[0], rtol=0, atol=1e-9)


def test_sizes_beside_a_batch_say_where_it_is_padded() -> None:
    small, large = torch.randn(3, 40, 50), torch.randn(3, 64, 96)
    padded = torch.zeros(2, 3, 64, 96)
    padded[0, :, :40, :50], padded[1] = small, large
    backbone = random_backbone("resnet18")
    with torch.no_grad():
        expected, got = backbone([small, large])["3"], backbone(padded, sizes=[(40, 50), (64, 96)])["3"]

    assert torch.equal(got.mask, expected.mask)
    torch.testing.assert_close(got.tensors, expected.tensors)
    with pytest.raises(ValueError, match="`sizes`"):
        backbone([small, large], sizes=[(40, 50), (64, 96)])


def test_padded_cells_of_a_level_are_zero() -> None:
    level = random_backbone("resnet18")([torch.randn(3, 97, 131), torch.randn(3, 33, 40)])["1"]

    assert level.mask.any()
    assert not level.tensors.masked_select(level.mask[:, None]).any()


def test_gradients_do_not_depend_on_the_batch() -> None:
    backbone = with_random_statistics(Backbone("resnet18"))
    small, large = torch.randn(3, 40, 50), torch.randn(3, 97, 64)
    weight = backbone.body.get_parameter("layer2.0.conv1.weight")

    def gradient(images: list[torch.Tensor]) -> torch.Tensor:
        backbone.zero_grad()
        sum(level.tensors.square().sum() for image in images for level in backbone([image]).values()).backward()
        return weight.grad.clone()

    expected = gradient([small, large])
    backbone.zero_grad()
    backbone([small, large])["0"].tensors.square().sum().backward()
    # gradients of some hundred: sums of thousands of products, in another order
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_the_callers_images_are_not_written_to() -> None:
    batch = nested_tensor_from_tensor_list([torch.randn(3, 64, 64), torch.randn(3, 32, 40)])
    batch.tensors.fill_(1.0)  # padding that is not zero, as after normalising a padded batch
    with torch.no_grad():
        features = random_backbone("resnet18")(batch)

    assert batch.tensors.eq(1.0).all()
    with torch.no_grad():
        alone = random_backbone("resnet18")([torch.ones(3, 32, 40)])
    torch.testing.assert_close(features["3"].tensors[1, :, :1, :2], alone["3"].tensors[0], rtol=1e-5, atol=1e-5)


def test_two_threads_may_share_a_backbone() -> None:
    backbone = random_backbone("resnet18")
    batches = [[torch.randn(3, 97, 33), torch.randn(3, 40, 90)], [torch.randn(3, 20, 97), torch.randn(3, 90, 31)]]
    with torch.no_grad():
        expected = [backbone(images)["3"].tensors for images in batches]
    wrong = []

    def serve(index: int) -> None:
        for _ in range(5):
            with torch.no_grad():
                if not torch.equal(backbone(batches[index])["3"].tensors, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=serve, args=[index]) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda backbone: pickle.loads(pickle.dumps(backbone))])
def test_a_copy_is_exact_too(copied) -> None:
    images = [torch.randn(3, 64, 33), torch.randn(3, 40, 70)]
    with torch.no_grad():
        assert torch.equal(
            copied(random_backbone("resnet18"))(images)["3"].tensors, random_backbone("resnet18")(images)["3"].tensors
        )


@pytest.mark.parametrize("stride", [1, 4, 16, 32, 64])
def test_an_exact_level_has_ceiling_sizes_and_their_mask(stride: int) -> None:
    for h, w in [(1, 1), (17, 33), (64, 65), (97, 130)]:
        images = nested_tensor_from_tensor_list([torch.ones(1, h, w), torch.ones(1, 131, 160)])
        cells = torch.ones(2, 1, math.ceil(131 / stride), math.ceil(160 / stride))
        level = feature_level(cells, images, stride=stride, padding="exact")

        assert level.sizes[0] == (math.ceil(h / stride), math.ceil(w / stride))
        assert (~level.mask[0]).sum() == math.ceil(h / stride) * math.ceil(w / stride)


def test_the_mask_of_zeros_mode_is_the_nearest_one() -> None:
    images = nested_tensor_from_tensor_list([torch.ones(1, 800, 10), torch.ones(1, 1066, 32)])
    level = feature_level(torch.ones(2, 1, 34, 1), images, stride=32, padding="zeros")

    # 26 valid cells where ceil(800 / 32) is 25: the published rounding depends on the batch
    assert level.sizes[0] == (26, 1)


def test_valid_sizes_round_up() -> None:
    assert valid_sizes([(1, 32), (33, 64)], 32) == ((1, 1), (2, 2))


def test_a_network_without_a_convolution_is_refused() -> None:
    with pytest.raises(ConfigError, match="must begin with a convolution"):
        BackboneBase(nn.Sequential(nn.ReLU()), return_layers=["0"], train_layers=())


def test_strides_and_channels_are_measured() -> None:
    backbone = Backbone("resnet50", dilation=True, return_interm_layers=True)

    assert backbone.strides == (4, 8, 16, 16)
    assert backbone.channels == (256, 512, 1024, 2048)
    assert backbone.input_strides["layer3.0.conv2"] == 8


def test_an_output_that_is_no_map_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())

    with pytest.raises(ConfigError, match=r"feature map with a whole stride.*of '1'"):
        BackboneBase(network, return_layers=["1"], train_layers=["0"])


def test_training_on_a_padded_batch_runs_where_frozen_features_have_several_readers() -> None:
    backbone = Backbone("googlenet").train()
    backbone([torch.randn(3, 64, 96), torch.randn(3, 50, 40)])["0"].tensors.sum().backward()

    assert any(parameter.grad is not None for parameter in backbone.parameters())


def test_exact_padding_keeps_the_memory_format_in_training() -> None:
    backbone = Backbone("resnet18", return_interm_layers=True).train()
    seen = []
    for convolution in (backbone.body["layer1"][0].conv2, backbone.body["layer1"][1].conv1):  # of many cells
        convolution.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    levels = backbone([torch.randn(3, 128, 96), torch.randn(3, 110, 90)])

    maps = [*seen, *(level.tensors for level in levels.values())]
    assert len(maps) == 6
    assert all(features.is_contiguous(memory_format=torch.channels_last) for features in maps)


def _reflect(network: nn.Module) -> None:
    network.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False, padding_mode="reflect")


def _weigh_by_the_whole_map(network: nn.Module) -> None:
    network.layer1.register_forward_hook(lambda *args: args[-1] * args[-1].mean((2, 3), keepdim=True))


def _own_forward(network: nn.Module) -> None:
    forward = network.layer1.forward
    network.layer1.forward = lambda x: forward(x) * x.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("change", [_reflect, _weigh_by_the_whole_map, _own_forward])
def test_a_resnet_that_was_changed_before_is_no_plain_one(change: Callable[[nn.Module], None]) -> None:
    network = freeze_batch_norm(torchvision.models.resnet18())
    change(network)

    assert_exact(BackboneBase(network, return_layers=("layer2",), train_layers=()))


def test_a_window_that_comes_to_pad_with_other_than_zeros_leaves_images_exact() -> None:
    backbone = Backbone("resnet18", return_layers=("layer2",))
    backbone.body.layer1[0].conv1.padding_mode = "reflect"

    assert_exact(backbone)


@pytest.mark.parametrize("name", ["timm/seresnet18", "timm/tf_efficientnet_lite0", "swin_t"])
def test_a_network_built_on_the_meta_device_has_a_plan_of_its_own(name: str) -> None:
    with torch.device("meta"):
        backbone = Backbone(name)
    built = Backbone(name)
    backbone.load_state_dict(built.state_dict(), assign=True)

    assert (backbone.size_divisor, backbone.strides) == (built.size_divisor, built.strides)
    assert backbone.batching in (built.batching, "by_size")
    assert_exact(backbone)


def assert_exact(backbone: BackboneBase) -> None:
    images = [torch.randn(3, 61, 61), torch.randn(3, 100, 130)]
    with torch.no_grad():
        (batch,), (alone,) = with_random_statistics(backbone)(images).values(), backbone(images[:1]).values()
    h, w = alone.tensors.shape[-2:]
    torch.testing.assert_close(batch.tensors[:1, :, :h, :w], alone.tensors, rtol=1e-4, atol=1e-5)
