"""The backbone: levels, masks, positions, what trains, and what it is called in a checkpoint."""

from functools import partial

import pytest
import torch
import torchvision
from torch import Tensor

from detr_backbone import (
    Backbone,
    BackboneBase,
    BackboneConfig,
    FrozenBatchNorm2d,
    NestedTensor,
    PositionEncodingConfig,
    build_backbone,
)
from detr_backbone.errors import ConfigError

STAGES = ("layer1", "layer2", "layer3", "layer4")


def small(**options: object) -> BackboneConfig:
    return BackboneConfig(name="resnet18", hidden_dim=32, **options)  # type: ignore[arg-type]


# parameters and state-dict keys of torchvision's networks without their classifier
PUBLISHED = {
    "resnet18": (11_166_912, 100),
    "resnet34": (21_267_648, 180),
    "resnet50": (23_454_912, 265),
    "resnet101": (42_394_816, 520),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_keys_are_the_published_ones(name: str) -> None:
    backbone = Backbone(name)

    assert (sum(p.numel() for p in backbone.parameters()), len(backbone.state_dict())) == PUBLISHED[name]
    assert not any("num_batches_tracked" in key for key in backbone.state_dict())


def test_keys_are_those_of_a_published_checkpoint() -> None:
    keys = build_backbone(small()).state_dict()

    assert {"0.body.conv1.weight", "0.body.bn1.running_var", "0.body.layer2.0.downsample.1.bias"} <= keys.keys()


@pytest.mark.parametrize("layers", [("layer4",), STAGES, ("layer2", "layer3", "layer4")])
@pytest.mark.parametrize("dilation", [False, True])
def test_keys_do_not_depend_on_layers_or_dilation(layers: tuple[str, ...], dilation: bool) -> None:
    backbone = Backbone("resnet50", return_layers=layers, dilation=dilation)

    assert list(backbone.state_dict()) == list(Backbone("resnet50").state_dict())


def test_frozen_features_equal_those_of_torchvision() -> None:
    network = torchvision.models.resnet18().eval()
    backbone = Backbone("resnet18")
    backbone.body.load_state_dict(network.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 64)

    with torch.no_grad():
        features = backbone(x)["0"].tensors
        expected = torch.nn.Sequential(*list(network.children())[:-2])(x)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_published_sizes_round_up() -> None:
    levels = Backbone("resnet18", return_interm_layers=True)(torch.zeros(1, 3, 65, 97))

    assert [tuple(level.tensors.shape[-2:]) for level in levels.values()] == [(17, 25), (9, 13), (5, 7), (3, 4)]


def test_strides_and_channels_are_measured() -> None:
    joiner = build_backbone(BackboneConfig(return_layers=STAGES, dilation=True))

    assert joiner.strides == (4, 8, 16, 16)
    assert joiner.channels == (256, 512, 1024, 2048)
    assert joiner.num_channels == 2048


def test_num_channels_may_be_assigned() -> None:
    joiner = build_backbone(small())
    joiner.num_channels = 7

    assert joiner.num_channels == 7


def test_layers_come_finest_first_in_whatever_order_they_are_asked_for() -> None:
    backbone = Backbone("resnet18", return_layers=["layer4", "layer2"])

    assert backbone.strides == (8, 32)
    assert list(backbone(torch.zeros(1, 3, 32, 32))) == ["0", "1"]


def test_the_first_element_gives_a_dict_of_nested_tensors() -> None:
    joiner = build_backbone(small())
    levels = joiner[0](torch.zeros(1, 3, 32, 32))

    assert isinstance(levels["0"], NestedTensor)
    assert isinstance(joiner[0].body, torch.nn.ModuleDict)


def test_the_second_element_encodes_a_further_level() -> None:
    joiner = build_backbone(small())
    level = NestedTensor(torch.zeros(1, 512, 2, 3), torch.zeros(1, 2, 3, dtype=torch.bool))

    assert joiner[1](level).shape == (1, 32, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_have_the_dtype_of_their_features(dtype: torch.dtype) -> None:
    features, positions = build_backbone(small()).to(dtype)(torch.zeros(1, 3, 32, 32, dtype=dtype))

    assert features[0].tensors.dtype == positions[0].dtype == dtype


def test_features_are_half_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, positions = build_backbone(small())(torch.zeros(1, 3, 32, 32))

    assert features[0].tensors.dtype == positions[0].dtype == torch.bfloat16


def test_stem_and_first_stage_are_frozen_by_default() -> None:
    backbone = Backbone("resnet50")
    trained = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}

    assert trained == {"layer2", "layer3", "layer4"}
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == 23_232_512


def test_what_trains_is_chosen_by_name() -> None:
    backbone = Backbone("resnet18", train_layers=["conv1", "layer4.1"])
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}

    assert trained == {"body.conv1.weight", "body.layer4.1.conv1.weight", "body.layer4.1.conv2.weight"}


def test_no_layers_to_train_freezes_everything() -> None:
    assert not any(p.requires_grad for p in Backbone("resnet18", train_layers=[]).parameters())


def test_training_does_not_change_buffers() -> None:
    joiner = build_backbone(small()).train()
    before = {name: buffer.clone() for name, buffer in joiner.named_buffers()}
    for _ in range(2):
        joiner(torch.randn(2, 3, 32, 32))

    assert all(torch.equal(buffer, before[name]) for name, buffer in joiner.named_buffers())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BackboneConfig(name="resnet51"), "got 'resnet51', expected one of resnet101, .*; did you mean 'resnet50'"),
        (small(dilation=True), "`dilation` needs Bottleneck blocks, which resnet18 lacks"),
        (small(return_layers=("layer5",)), "got 'layer5', expected one of conv1, .*; did you mean 'layer"),
        (small(return_layers=()), "at least one layer"),
        (
            small(return_layers=("layer2",), train_layers=("layer4",)),
            r"must name none or layers that lead to \['layer2'\]",
        ),
        (small(return_layers=("layer4", "layer4")), "`return_layers` must name each layer once"),
        (small(train_layers=("layer5",)), "`train_layers` must name layers with parameters: got 'layer5'"),
        (small(train_layers=("bn1",)), "`train_layers` must name layers with parameters: got 'bn1'"),
        (small(train_layers=("layer",)), "got 'layer', expected one of conv1, layer1"),
        (small(train_layers="layer4"), r"`train_layers` must be a list of names, such as \['layer4'\]"),
        (small(padding="reflect"), "`padding` must be 'exact' or 'zeros', got 'reflect'"),
        (BackboneConfig(name="resnet18", hidden_dim=15), "`hidden_dim` must be even"),
        (
            small(position_encoding=PositionEncodingConfig(type="learned", temperature=20.0)),
            "belong to the sine encoding",
        ),
    ],
)
def test_a_configuration_that_cannot_be_built_says_why(config: BackboneConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(config)


@pytest.mark.parametrize("option", ["position_encoding", "pyramid"])
def test_a_configuration_inside_of_another_is_no_text(option: str) -> None:
    with pytest.raises(TypeError, match=f"`{option}` must be"):
        build_backbone(small(**{option: "learned"}))


def test_two_ways_of_choosing_layers_contradict() -> None:
    with pytest.raises(ConfigError, match="got both"):
        Backbone("resnet18", return_interm_layers=True, return_layers=["layer4"])


def test_any_sequential_network_makes_a_backbone() -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, stride=2, padding=1), FrozenBatchNorm2d(4), torch.nn.Conv2d(4, 8, 1, stride=2)
    )
    backbone = BackboneBase(network, return_layers=["0", "2"], train_layers=["2"])

    assert (backbone.strides, backbone.channels) == ((2, 4), (4, 8))
    assert [tuple(level.tensors.shape) for level in backbone(torch.zeros(1, 1, 9, 9)).values()] == [
        (1, 4, 5, 5),
        (1, 8, 3, 3),
    ]


def test_layers_inside_of_stages_make_levels_too() -> None:
    backbone = Backbone("resnet18", return_layers=["layer4.0", "layer2.0.conv1"])

    assert (backbone.strides, backbone.channels) == ((8, 32), (128, 512))
    assert list(backbone.state_dict()) == [f"body.{key}" for key in backbone.body.state_dict()]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_enter_the_network_in_the_memory_format_of_its_maps(memory_format: torch.memory_format) -> None:
    backbone = Backbone("resnet18", return_interm_layers=True)
    formats = []

    def compare(strides: tuple[int, ...], total: Tensor) -> None:
        formats.append(total.stride() == strides)

    def watch(_: object, __: object, outputs: dict[str, Tensor]) -> None:
        for output in list(outputs.values())[1:]:  # the first stage does not train
            output.register_hook(partial(compare, output.stride()))

    backbone.body.register_forward_hook(watch)
    levels = [level.tensors for level in backbone(torch.rand(1, 3, 64, 96)).values()]
    torch.autograd.backward(
        levels[1:], [torch.ones(level.shape).to(memory_format=memory_format) for level in levels[1:]]
    )
    assert formats == [True] * 3
