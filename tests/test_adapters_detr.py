"""Heads of the DETR family, written here from what they call and read, on our backbone; and their options."""

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d

from detr_backbone import Joiner
from detr_backbone.adapters.detr import for_deformable_detr, from_args
from detr_backbone.errors import ConfigError, DetrBackboneError

DETR = {
    "lr": 1e-4,
    "lr_backbone": 1e-5,
    "batch_size": 2,
    "epochs": 300,
    "backbone": "resnet18",
    "dilation": False,
    "position_embedding": "sine",
    "enc_layers": 6,
    "hidden_dim": 32,
    "nheads": 8,
    "num_queries": 100,
    "masks": False,
    "dataset_file": "coco",
    "device": "cpu",
}
DEFORMABLE = DETR | {
    "num_feature_levels": 4,
    "lr_backbone_names": ["backbone.0"],
    "position_embedding_scale": 6.2831853,
}
DAB = DEFORMABLE | {"modelname": "dab_detr", "pe_temperatureH": 20, "pe_temperatureW": 20}
DINO = DAB | {"modelname": "dino", "return_interm_indices": [1, 2, 3], "backbone_freeze_keywords": None}


def built(options: dict[str, Any], **changes: Any) -> Joiner:
    return from_args(Namespace(**options | changes), weights=None, padding="zeros")


class Samples:
    """A padded batch as these programs define it."""

    def __init__(self, tensors: Tensor, mask: Tensor | None) -> None:
        self.tensors, self.mask = tensors, mask

    def decompose(self) -> tuple[Tensor, Tensor | None]:
        return self.tensors, self.mask


def samples() -> Samples:
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 70:] = mask[1, :, 100:] = True
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1)) * ~mask[:, None]
    return Samples(images, mask)


def disturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for key, buffer in model.named_buffers():
        if key.endswith(("bias", "running_mean")):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


class DetrHead(nn.Module):
    """What DETR does with a backbone, up to the tokens of its encoder."""

    def __init__(self, backbone: Any, hidden_dim: int) -> None:
        super().__init__()
        self.input_proj = nn.Conv2d(backbone.num_channels, hidden_dim, kernel_size=1)
        self.backbone = backbone

    def forward(self, samples: Samples) -> tuple[Tensor, Tensor]:
        features, pos = self.backbone(samples)
        src, mask = features[-1].decompose()
        assert mask is not None
        return (self.input_proj(src) + pos[-1]).flatten(2), mask.flatten(1)


class DeformableHead(nn.Module):
    """What Deformable DETR, DAB- and DN-Deformable DETR and DINO do with one: more levels, made from the last."""

    def __init__(self, backbone: Any, hidden_dim: int, num_feature_levels: int) -> None:
        super().__init__()
        projections = [nn.Conv2d(backbone.num_channels[n], hidden_dim, 1) for n in range(len(backbone.strides))]
        in_channels = backbone.num_channels[-1]
        for _ in range(num_feature_levels - len(projections)):
            projections.append(nn.Conv2d(in_channels, hidden_dim, 3, stride=2, padding=1))
            in_channels = hidden_dim
        self.input_proj = nn.ModuleList(projections)
        self.backbone = backbone

    def forward(self, samples: Samples) -> list[tuple[Tensor, Tensor]]:
        features, pos = self.backbone(samples)
        levels = []
        for projection, feature in zip(self.input_proj, features, strict=False):
            src, mask = feature.decompose()
            levels.append((projection(src) + pos[len(levels)], mask))
        for projection in self.input_proj[len(levels) :]:
            src = projection(levels[-1][0] if len(levels) > len(features) else features[-1].tensors)
            mask = F.interpolate(samples.mask[None].float(), size=src.shape[-2:]).to(torch.bool)[0]
            position = self.backbone[1](Samples(src, mask)).to(src.dtype)
            levels.append((src + position, mask))
        return levels


def upstream_levels(joiner: Joiner, batch: Samples, layers: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Features and masks as the original computes them, with torchvision's layers and the weights of `joiner`."""
    network = resnet18(norm_layer=FrozenBatchNorm2d)
    state = {key.removeprefix("0.body."): tensor for key, tensor in joiner.state_dict().items() if key[0] == "0"}
    assert set(network.load_state_dict(state, strict=False).missing_keys) == {"fc.weight", "fc.bias"}
    levels, x = {}, batch.tensors
    for name, child in list(network.named_children())[:8]:
        x = child(x)
        if name in layers:
            assert batch.mask is not None
            levels[name] = x, F.interpolate(batch.mask[None].float(), size=x.shape[-2:]).to(torch.bool)[0]
    return levels


@torch.no_grad()
def test_a_head_of_detr_runs_without_glue() -> None:
    joiner = built(DETR)
    disturb(joiner)
    model = DetrHead(joiner, hidden_dim=32)
    tokens, mask = model(samples())
    (features, expected_mask), *_ = upstream_levels(joiner, samples(), ["layer4"]).values()
    expected = (model.input_proj(features) + sines(expected_mask, 16, 10000.0, 0.0)).flatten(2)

    difference = relative_difference(tokens, expected)
    print(f"DETR: tokens differ by {difference:.1e}")
    assert difference < 1e-5
    assert torch.equal(mask, expected_mask.flatten(1))


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value: what float32 leaves, for maps of any scale."""
    return ((got - expected).abs().max() / expected.abs().max()).item()


def sines(mask: Tensor, num_pos_feats: int, temperature: float, offset: float) -> Tensor:
    """Sine positions cell by cell, from the formula (arXiv 2005.12872, appendix A.4)."""
    valid = (~mask).double()
    axes = []
    for axis in (1, 2):
        count = valid.cumsum(axis)
        total = count.select(axis, -1).unsqueeze(axis)
        angle = (count + offset) / (total + 1e-6) * 2 * torch.pi
        channels = []
        for pair in range(num_pos_feats // 2):
            scaled = angle / temperature ** (2 * pair / num_pos_feats)
            channels += [scaled.sin(), scaled.cos()]
        axes += channels
    return torch.stack(axes, dim=1).float()


@torch.no_grad()
@pytest.mark.parametrize("options", [DEFORMABLE, DINO], ids=["Deformable DETR", "DINO"])
def test_a_head_that_reads_channels_of_each_level_makes_its_own_levels(
    options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    joiner = built(options)
    disturb(joiner)
    model = DeformableHead(joiner, hidden_dim=32, num_feature_levels=4)
    levels = model(samples())
    temperature, offset = (20.0, 0.0) if options is DINO else (10000.0, -0.5)
    expected = list(upstream_levels(joiner, samples(), ["layer2", "layer3", "layer4"]).values())

    assert (type(joiner.num_channels), joiner.num_channels) == (list, [128, 256, 512])
    assert (type(joiner.strides), joiner.strides) == (list, [8, 16, 32])
    assert [tuple(level.shape) for level, _ in levels] == [
        (2, 32, 12, 16),
        (2, 32, 6, 8),
        (2, 32, 3, 4),
        (2, 32, 2, 2),
    ]
    for (got, mask), projection, (features, expected_mask) in zip(levels, model.input_proj, expected, strict=False):
        wanted = projection(features) + sines(expected_mask, 16, temperature, offset)
        valid = ~expected_mask[:, None]  # positions of padded cells are arbitrary: they are divided by no length
        difference = relative_difference(got * valid, wanted * valid)
        print(f"{request.node.callspec.id}: a level differs by {difference:.1e}")
        assert difference < 1e-5
        assert torch.equal(mask, expected_mask)


def test_names_and_groups_of_the_optimizer_are_those_of_the_programs() -> None:
    model = DetrHead(built(DETR, position_embedding="learned"), hidden_dim=32)
    groups = {"backbone" in name for name, p in model.named_parameters() if p.requires_grad}

    assert groups == {True, False}
    assert {"backbone.0.body.layer4.1.bn2.running_var", "backbone.1.row_embed.weight"} <= model.state_dict().keys()
    assert model.state_dict().keys() >= {f"backbone.0.body.{key}" for key in ("conv1.weight", "bn1.bias")}


# What the options of each program mean


@pytest.mark.parametrize(
    ("options", "changes", "strides", "num_channels"),
    [
        (DETR, {}, (32,), 512),
        (DETR, {"masks": True}, (4, 8, 16, 32), 512),
        (DETR, {"backbone": "resnet50", "dilation": True}, (16,), 2048),
        (DEFORMABLE, {}, [8, 16, 32], [128, 256, 512]),
        (DEFORMABLE, {"num_feature_levels": 1}, [32], [512]),
        (DAB, {}, (32,), 512),
        (DAB, {"modelname": "dab_deformable_detr"}, [8, 16, 32], [128, 256, 512]),
        (DINO, {}, [8, 16, 32], [128, 256, 512]),
        (DINO, {"return_interm_indices": [0, 1, 2, 3], "num_feature_levels": 5}, [4, 8, 16, 32], [64, 128, 256, 512]),
    ],
)
def test_levels_are_those_of_the_program(
    options: dict[str, Any], changes: dict[str, Any], strides: Any, num_channels: Any
) -> None:
    with torch.device("meta"):  # shapes only
        joiner = built(options, **changes)

    assert (joiner.strides, joiner.num_channels) == (strides, num_channels)


@pytest.mark.parametrize(
    ("options", "changes", "temperature", "offset"),
    [
        (DETR, {"position_embedding": "v2"}, 10000, 0),
        (DEFORMABLE, {}, 10000, -0.5),
        (DAB, {}, 20, 0),
        (DAB, {"modelname": "dn_dab_deformable_detr"}, 10000, -0.5),
        (DINO, {}, 20, 0),
    ],
)
def test_positions_are_those_of_the_program(
    options: dict[str, Any], changes: dict[str, Any], temperature: float, offset: float
) -> None:
    with torch.device("meta"):
        position: Any = built(options, **changes)[1]

    assert (position.num_pos_feats, position.temperature, position.offset) == (16, temperature, offset)


@pytest.mark.parametrize(("lr_backbone", "trained"), [(1e-5, {"layer2", "layer3", "layer4"}), (0, set())])
def test_a_learning_rate_of_zero_freezes_the_backbone(lr_backbone: float, trained: set[str]) -> None:
    with torch.device("meta"):
        body: Any = built(DETR, lr_backbone=lr_backbone)[0].body

    assert {key.split(".")[0] for key, p in body.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        (DETR, {"backbone": "resnet49"}, r"`name` must be .*'resnet49'.*did you mean 'resnet\d+'"),
        (DETR, {"position_embedding": "sin"}, r"`position_embedding`: got 'sin'.*'sine'"),
        (DETR, {"dilation": True}, "`dilation` needs Bottleneck blocks"),
        (DETR, {"lr_backbone": -1.0}, r"`lr_backbone` must be 0 or more, got -1"),
        (DETR, {"hidden_dim": 33}, "`hidden_dim` must be even"),
        (DETR, {"batch_norm_type": "GroupNorm"}, "`batch_norm_type`: got 'GroupNorm'"),
        (DETR, {"num_features_levels": 4}, "'num_features_levels'.*'num_feature_levels'"),
        (DEFORMABLE, {"num_feature_levels": 2}, "`num_feature_levels` must be at least the 3 levels.* got 2"),
        (DEFORMABLE, {"position_embedding_scale": 1.0}, "`position_embedding_scale` must be 2 pi, got 1"),
        (DAB, {"pe_temperatureW": 10}, "`pe_temperatureH` must equal `pe_temperatureW`, got 20 and 10"),
        (DINO, {"return_interm_indices": [1, 3]}, r"`return_interm_indices` must be one of.* got \[1, 3\]"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(
    options: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DetrBackboneError, match=message) as error:
        built(options, **changes)

    assert "\n" not in str(error.value)


def test_an_option_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="got none for hidden_dim"):
        from_args(SimpleNamespace(backbone="resnet18", lr_backbone=0, position_embedding="sine"))


def test_the_programs_start_from_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import detr_backbone.backbone.backbone as module

    asked = []
    monkeypatch.setattr(module, "load_weights", lambda body, weights, name: asked.append((name, weights)))
    from_args(Namespace(**DETR), padding="zeros")

    assert asked == [("resnet18", "IMAGENET1K_V1")]


def test_any_backbone_is_read_by_a_head_of_deformable_detr() -> None:
    joiner = built(DETR, masks=True)
    assert for_deformable_detr(joiner) is joiner
    assert joiner.num_channels == [64, 128, 256, 512]
