"""Levels of several strides from networks of one stride: the simple feature pyramid, and the ViTs that it is for."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from detr_backbone import BackboneBase, BackboneConfig, Joiner, PositionEmbeddingSine, PyramidConfig, fold_for_inference
from detr_backbone.detectors import DetectorConfig, build_criterion, build_detector
from detr_backbone.errors import ConfigError
from detr_backbone.nested_tensor import NestedTensor, nested_tensor_from_tensor_list
from detr_backbone.networks.stages import NetworkStages
from detr_backbone.pyramid import SimpleFeaturePyramid
from detr_backbone.training import OptimizerConfig, parse_config
from detr_backbone.training.optimizer import build_optimizer

TINY = {"img_size": 112, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0, "dynamic_img_size": True}
VITS: dict[str, Callable[[], nn.Module]] = {
    "patch 16": partial(VisionTransformer, patch_size=16, **TINY),
    "dinov2": partial(VisionTransformer, patch_size=14, init_values=1e-1, reg_tokens=4, no_embed_class=True, **TINY),
    "dinov3": partial(
        Eva,
        patch_size=16,
        qkv_bias=False,
        init_values=1e-1,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        num_reg_tokens=4,
        use_fc_norm=False,
        norm_layer=partial(LayerNorm, eps=1e-5),
        **TINY,
    ),
}
STRIDES = {"patch 16": (4, 8, 16, 32, 64), "dinov2": (7, 14, 28), "dinov3": (8, 16, 32)}
# the second is smaller than a cell of the coarsest level, whose windows beyond it hold no cell at all
SIZES = ((45, 66), (11, 30), (130, 160))


def random_images(sizes: tuple[tuple[int, int], ...] = SIZES) -> list[Tensor]:
    return [torch.randn(3, *size, dtype=torch.float64) for size in sizes]


class Patches(nn.Module):
    """A map of stride 16 that is exact in a padded batch, so that all images share one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 16, stride=16, padding=0)
        self.second = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def backbone_of(network: nn.Module, **options: Any) -> BackboneBase:
    trained = [name for name, child in network.named_children() if any(True for _ in child.parameters())]
    return BackboneBase(network, train_layers=trained, **options).double()


@pytest.fixture(scope="module")
def masked() -> BackboneBase:
    torch.manual_seed(0)
    pyramid = PyramidConfig(strides=(4, 8, 16, 32, 64), channels=8)
    return backbone_of(Patches(), return_layers=["second"], pyramid=pyramid)


@pytest.fixture(scope="module")
def vits() -> dict[str, BackboneBase]:
    torch.manual_seed(0)
    return {
        name: BackboneBase(
            build(), train_layers=["blocks.[1-2]", "norm"], pyramid=PyramidConfig(strides=STRIDES[name], channels=8)
        ).double()
        for name, build in VITS.items()
    }


def check_alone_equals_batch(backbone: BackboneBase, images: list[Tensor]) -> None:
    batch = backbone.forward_whole_batch(images) if backbone.batching == "masked" else backbone(images)
    for index, image in enumerate(images):
        for (name, alone), stride in zip(backbone([image]).items(), backbone.strides, strict=True):
            h, w = -(-image.shape[1] // stride), -(-image.shape[2] // stride)
            cells = batch[name].tensors[index]

            assert alone.tensors.shape[-2:] == (h, w)
            assert batch[name].sizes[index] == (h, w)
            # sums in another order: float64 has 2e-16
            assert (cells[:, :h, :w] - alone.tensors[0]).abs().max() <= 1e-9 * alone.tensors.abs().max()
            assert not cells[:, h:].any()
            assert not cells[:, :, w:].any()


@pytest.mark.parametrize("mode", [True, False])
def test_an_image_has_the_levels_in_a_padded_batch_that_it_has_alone(masked: BackboneBase, mode: bool) -> None:
    assert masked.batching == "masked"
    with torch.set_grad_enabled(mode):
        check_alone_equals_batch(masked, random_images())


@pytest.mark.parametrize("name", VITS)
def test_an_image_has_the_levels_of_a_vit_in_a_padded_batch_that_it_has_alone(
    vits: dict[str, BackboneBase], name: str
) -> None:
    assert vits[name].strides == STRIDES[name]
    with torch.no_grad():
        check_alone_equals_batch(vits[name], random_images())


def test_gradients_of_a_padded_batch_are_finite_and_the_sum_of_those_of_its_images(masked: BackboneBase) -> None:
    images = random_images()

    def gradients(*batches: list[Tensor]) -> dict[str, Tensor]:
        masked.zero_grad()
        for batch in batches:
            levels = masked.forward_whole_batch(batch).values()
            torch.stack([level.tensors.square().sum() for level in levels]).sum().backward()
        return {name: p.grad.clone() for name, p in masked.named_parameters() if p.grad is not None}

    together, alone = gradients(images), gradients(*([image] for image in images))

    assert together.keys() == dict(masked.named_parameters()).keys()
    for name, expected in alone.items():
        torch.testing.assert_close(together[name], expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def test_a_level_is_a_deconvolution_the_map_itself_or_its_maximum_then_two_normalised_convolutions() -> None:
    pyramid = SimpleFeaturePyramid(
        PyramidConfig(strides=(4, 8, 16, 32, 64), channels=6), strides=(16,), channels=(8,), padding="exact"
    )
    state = pyramid.state_dict()
    x = torch.randn(1, 8, 5, 7)

    def deconvolve(x: Tensor, key: str) -> Tensor:
        """Every cell becomes 2 x 2 cells, by a matrix for each."""
        weight, bias = state[f"{key}.weight"], state[f"{key}.bias"]
        cells = torch.einsum("bchw,coyx->bohywx", x, weight).flatten(4, 5).flatten(2, 3)
        return cells + bias[:, None, None]

    def normalise(x: Tensor, key: str) -> Tensor:
        mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, correction=0)
        scaled = (x - mean) / (variance + 1e-6).sqrt()
        return scaled * state[f"{key}.weight"][:, None, None] + state[f"{key}.bias"][:, None, None]

    quarter = F.gelu(normalise(deconvolve(x, "levels.0.enlarge.0"), "levels.0.enlarge.1"))
    maps = [
        deconvolve(quarter, "levels.0.enlarge.3"),
        deconvolve(x, "levels.1.enlarge.0"),
        x,
        torch.stack([x[:, :, h : h + 2, w : w + 2].amax((2, 3)) for h in (0, 2, 4) for w in (0, 2, 4, 6)], -1),
        torch.stack([x[:, :, h : h + 4, w : w + 4].amax((2, 3)) for h in (0, 4) for w in (0, 4)], -1),
    ]
    maps[3], maps[4] = maps[3].unflatten(-1, (3, 4)), maps[4].unflatten(-1, (2, 2))
    levels = pyramid({"0": NestedTensor(x, None)}, NestedTensor(torch.zeros(1, 3, 80, 112), None))
    for index, cells in enumerate(maps):
        lateral = normalise(F.conv2d(cells, state[f"levels.{index}.lateral.0.weight"]), f"levels.{index}.lateral.1")
        output = F.conv2d(lateral, state[f"levels.{index}.output.0.weight"], padding=1)
        expected = normalise(output, f"levels.{index}.output.1")
        torch.testing.assert_close(levels[str(index)].tensors, expected, rtol=1e-4, atol=1e-5)  # float32


def test_every_level_may_come_from_a_layer_of_its_own() -> None:
    network, strides = VITS["dinov3"]().double().eval(), (8, 16, 32)
    config = PyramidConfig(strides=strides, channels=8)
    backbone = backbone_of(network, return_layers=["blocks.[0-2]"], pyramid=config).eval()
    image = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    maps = network.forward_intermediates(image, intermediates_only=True)

    for index, (stride, level) in enumerate(zip(strides, backbone(image).values(), strict=True)):
        alone = SimpleFeaturePyramid(
            PyramidConfig(strides=(stride,), channels=8), strides=(16,), channels=(32,), padding="exact"
        ).double()
        alone.levels[0].load_state_dict(backbone.pyramid.levels[index].state_dict())
        expected = alone({"0": NestedTensor(maps[index], None)}, NestedTensor(image, None))["0"]
        torch.testing.assert_close(level.tensors, expected.tensors, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("network", "strides", "possible"),
    [
        ("dinov2", (8, 16, 32), "[7, 14, 28, 56]"),
        ("dinov3", (2, 4), "[4, 8, 16, 32, 64]"),
        ("dinov3", (16, 8), "[4, 8, 16, 32, 64]"),
        ("dinov3", (8, 8), "[4, 8, 16, 32, 64]"),
        ("dinov3", (), "[4, 8, 16, 32, 64]"),
    ],
)
def test_other_strides_are_refused_with_those_that_there_may_be(
    network: str, strides: tuple[int, ...], possible: str
) -> None:
    base = 14 if network == "dinov2" else 16
    with pytest.raises(ConfigError) as error:
        SimpleFeaturePyramid(PyramidConfig(strides=strides), strides=(base,), channels=(8,), padding="exact")

    assert "`pyramid.strides`" in str(error.value)
    assert possible in str(error.value)
    assert str(list(strides)) in str(error.value)


@pytest.mark.parametrize(
    ("strides", "got"), [((8, 16), "[8, 16]"), ((16, 16), "2 layers")], ids=["two strides", "two layers for three"]
)
def test_maps_that_do_not_fit_the_levels_are_refused(strides: tuple[int, ...], got: str) -> None:
    with pytest.raises(ConfigError) as error:
        SimpleFeaturePyramid(PyramidConfig(strides=(8, 16, 32)), strides=strides, channels=(8, 8), padding="exact")

    assert "`return_layers`" in str(error.value)
    assert got in str(error.value)


def test_no_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`pyramid\.channels`.* got 0"):
        SimpleFeaturePyramid(PyramidConfig(strides=(8,), channels=0), strides=(8,), channels=(8,), padding="exact")


def test_the_masks_of_the_original_code_are_resized_to_the_levels() -> None:
    backbone = BackboneBase(
        Patches(),
        return_layers=["second"],
        train_layers=["second"],
        padding="zeros",
        pyramid=PyramidConfig(strides=(8, 32), channels=4),
    )
    batch = nested_tensor_from_tensor_list([torch.rand(3, 64, 96), torch.rand(3, 33, 50)])
    for level in backbone(batch).values():
        expected = F.interpolate(batch.mask[None].float(), size=level.tensors.shape[-2:])[0].bool()
        assert level.mask.equal(expected)


def test_a_joiner_has_the_strides_and_channels_of_the_pyramid_and_keys_of_its_own(masked: BackboneBase) -> None:
    joiner = Joiner(masked, PositionEmbeddingSine(4))
    features, positions = joiner(random_images())

    assert joiner.strides == (4, 8, 16, 32, 64)
    assert joiner.channels == (8,) * 5
    assert joiner.num_channels == 8
    assert [position.shape[-2:] for position in positions] == [level.tensors.shape[-2:] for level in features]
    assert {key.rpartition(".levels.")[0] for key in joiner.state_dict() if ".body." not in key} == {"0.pyramid"}


def test_a_pyramid_trains_at_the_rate_of_the_detector(masked: BackboneBase) -> None:
    detector = nn.Module()
    detector.backbone = Joiner(masked, PositionEmbeddingSine(4))
    groups = build_optimizer(detector, OptimizerConfig(lr=1e-3, lr_backbone=1e-5)).param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}

    assert {rates[id(parameter)] for parameter in masked.pyramid.parameters()} == {1e-3}
    assert {rates[id(parameter)] for parameter in masked.body.parameters()} == {1e-5}


def test_folding_for_inference_freezes_the_pyramid_and_changes_no_level() -> None:
    backbone = backbone_of(Patches(), return_layers=["second"], pyramid=PyramidConfig(strides=(8, 16), channels=4))
    images = random_images()
    with torch.no_grad():
        before = [level.tensors.clone() for level in backbone(images).values()]
        after = [level.tensors for level in fold_for_inference(backbone)(images).values()]

    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_a_file_may_ask_for_a_pyramid(tmp_path: Any) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("detector: {backbone: {name: timm/x, pyramid: {strides: [8, 16, 32], channels: 64}}}")
    config = parse_config(["--config", str(file), "--detector.backbone.pyramid.channels", "32"])

    assert config.detector.backbone.pyramid == PyramidConfig(strides=(8, 16, 32), channels=32)
    assert BackboneConfig().pyramid is None


def test_a_detector_learns_from_the_levels_of_a_vit(
    vits: dict[str, BackboneBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    joiner = Joiner(copy.deepcopy(vits["dinov2"]).float(), PositionEmbeddingSine(16))
    monkeypatch.setattr("detr_backbone.detectors.build.build_backbone", lambda _: joiner)
    sizes = {"num_queries": 5, "nheads": 2, "enc_layers": 1, "dec_layers": 1, "dim_feedforward": 32}
    config = DetectorConfig(name="deformable_detr", backbone=BackboneConfig(hidden_dim=32), num_classes=2, **sizes)
    detector, criterion = build_detector(config), build_criterion(config)
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.3]])} for _ in SIZES]
    outputs = detector([image.float() for image in random_images()])
    criterion.weighted_sum(criterion(outputs, targets)).backward()

    assert detector.strides == (7, 14, 28)
    for name, parameter in joiner.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_a_compiled_graph_holds_the_pyramid() -> None:
    backbone = backbone_of(Patches(), return_layers=["second"], pyramid=PyramidConfig(strides=(8, 32), channels=4))
    batch = nested_tensor_from_tensor_list(random_images())
    compiled = torch.compile(backbone.forward_whole_batch, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected, got = backbone.forward_whole_batch(batch), compiled(batch)

    assert got.keys() == expected.keys()
    for name, level in expected.items():
        torch.testing.assert_close(got[name].tensors, level.tensors, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", VITS)
def test_levels_of_a_vit_are_the_intermediates_of_its_library(name: str) -> None:
    network = VITS[name]().double().eval()
    patch = 14 if name == "dinov2" else 16
    backbone = backbone_of(network, return_layers=["blocks.0", "blocks.2", "norm"]).eval()
    image = torch.randn(1, 3, 6 * patch, 7 * patch, dtype=torch.float64)
    with torch.no_grad():
        *blocks, norm = (level.tensors for level in backbone(image).values())
        expected = network.forward_intermediates(image, indices=[0, 2], intermediates_only=True)
        (normalised,) = network.forward_intermediates(image, indices=[2], norm=True, intermediates_only=True)

    torch.testing.assert_close(blocks, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(norm, normalised, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", VITS)
def test_the_level_of_a_vit_is_its_final_norm(name: str) -> None:
    assert NetworkStages(VITS[name]()).levels(None, return_interm_layers=False) == ["norm"]


def test_the_level_of_a_vit_without_a_final_norm_is_its_last_block() -> None:
    network = VisionTransformer(global_pool="avg", fc_norm=True, **TINY)

    assert isinstance(network.norm, nn.Identity)
    assert NetworkStages(network).levels(None, return_interm_layers=False) == ["blocks.2"]
