"""The trial finds padding that gets into an image through code that no list of layers shows."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detr_backbone import Backbone, BackboneBase
from detr_backbone.errors import ConfigError
from detr_backbone.padding.trial import GroupsTogether


class Block(nn.Module):
    """A convolution, and what a subclass does with its output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.zeros(8, 1, 1))  # nothing of it shows in a fresh network

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.more(self.conv(x))

    def more(self, x: Tensor) -> Tensor:
        return x


class Gated(Block):
    def more(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


class Pooled(Block):
    def more(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.gate(x), 3, 1, 1)


class Normed(Block):
    def more(self, x: Tensor) -> Tensor:
        return self.gate(x) / x.norm(dim=(2, 3), keepdim=True)


class Looks(Gated):
    """No trace can follow this forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] else x


def network(block: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), block, nn.Conv2d(8, 8, 3, padding=1))


@pytest.mark.parametrize(
    ("block", "layer"),
    [(Gated(), "2.gate (Conv2d)"), (Pooled(), "2 (Pooled)"), (Normed(), "2 (Normed)")],
)
def test_code_between_layers_that_lets_padding_in_is_named(block: nn.Module, layer: str) -> None:
    backbone = BackboneBase(network(block), return_layers=["3"], train_layers=["0"])

    assert backbone.batching == "by_size"
    assert backbone.leak == f"padding gets into the image, first seen in the output of {layer}"


def test_a_resnet_of_torchvision_is_known_to_be_exact_and_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr("detr_backbone.padding.plan.draw_sensitive_weights", tried.append)
    backbone = Backbone("resnet18")

    assert (backbone.batching, tried) == ("masked", [])


class OfTheBatch(Block):
    """A norm that no class tells to be one of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, 1, 1))

    def more(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.mean((0, 2, 3))[:, None, None], 0.1)
        return self.gate(x) - self.mean


class AcrossTheBatch(Block):
    def more(self, x: Tensor) -> Tensor:
        return self.gate(x) - x.mean(0, keepdim=True)


@pytest.mark.parametrize(("block", "key"), [(OfTheBatch(), "2.mean"), (AcrossTheBatch(), "depend on each other")])
def test_statistics_of_the_batch_are_refused_that_only_a_forward_shows(block: nn.Module, key: str) -> None:
    with pytest.raises(ConfigError, match=f"`padding` must be 'zeros'.*{key}"):
        BackboneBase(network(block), return_layers=["3"], train_layers=["0"])


class OnlyLast(Block):
    """Leaks into every image but the first."""

    def more(self, x: Tensor) -> Tensor:
        return torch.cat([x[:1], x[1:] + x[1:].mean((2, 3), keepdim=True)])


def test_every_image_of_the_batch_is_compared() -> None:
    with pytest.raises(ConfigError, match="`padding` must be 'zeros'"):
        BackboneBase(network(OnlyLast()), return_layers=["3"], train_layers=["0"])


class EvensOutItsSides(nn.Module):
    """Pads by itself what its stride does not divide, which zeros in the batch cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.conv):
            x = layer(F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)))
        return x


def test_a_network_that_pads_odd_sides_by_itself_is_exact_at_odd_sides() -> None:
    backbone = BackboneBase(EvensOutItsSides(), return_layers=["conv"], train_layers=["conv"]).double()
    images = [torch.randn(3, h, w, dtype=torch.float64) for h, w in ((130, 161), (50, 33))]
    batch = backbone(images)["0"]

    for index, image in enumerate(images):
        alone = backbone([image])["0"].tensors[0]
        h, w = alone.shape[-2:]
        torch.testing.assert_close(batch.tensors[index, :, :h, :w], alone, rtol=0, atol=1e-12)


class AtEvenSides(Block):
    """Leaks only where the sides of the batch are multiples of 64."""

    def more(self, x: Tensor) -> Tensor:
        return x + x.mean((2, 3), keepdim=True) * (x.shape[-1] % 64 == 0 and x.shape[-2] % 48 == 0)


def test_images_whose_sides_are_even_everywhere_are_tried_too() -> None:
    backbone = BackboneBase(network(AtEvenSides()), return_layers=["3"], train_layers=["0"])

    assert backbone.batching == "by_size"


def test_code_between_layers_that_works_cell_by_cell_is_exact() -> None:
    backbone = BackboneBase(network(Block()), return_layers=["3"], train_layers=["0"])

    assert backbone.size_divisor == 1


@pytest.mark.parametrize("block", [Block(), Looks()], ids=["sequential", "hooks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_leaves_a_network_as_it_was(block: nn.Module, dtype: torch.dtype) -> None:
    tried = network(block).to(dtype).train()
    tried[1].eval()
    before = {name: tensor.clone() for name, tensor in tried.state_dict().items()}
    storages = {name: tensor.data_ptr() for name, tensor in tried.state_dict().items()}
    BackboneBase(tried, return_layers=["2", "3"], train_layers=["0"])

    assert [module.training for module in tried] == [True, False, True, True]
    assert {name: tensor.data_ptr() for name, tensor in tried.state_dict().items()} == storages
    assert all(torch.equal(tensor, before[name]) for name, tensor in tried.state_dict().items())


def test_the_trial_draws_no_random_numbers_of_the_caller() -> None:
    torch.manual_seed(0)
    block = network(Block())
    before = torch.get_rng_state()
    BackboneBase(block, return_layers=["3"], train_layers=["0"])

    assert torch.equal(torch.get_rng_state(), before)


class Same(nn.Conv2d):
    """Pads as TensorFlow does: by as much as the size of the map asks for."""

    def forward(self, x: Tensor) -> Tensor:
        missing = [max((-(-side // 2) - 1) * 2 + 3 - side, 0) for side in x.shape[-2:]]
        return super().forward(F.pad(x, (missing[1] // 2, -(-missing[1] // 2), missing[0] // 2, -(-missing[0] // 2))))


def test_padding_that_follows_the_size_of_the_image_finds_whole_strides() -> None:
    network = nn.Sequential(Same(3, 8, 3, stride=2), nn.ReLU(), Same(8, 8, 3, stride=2))
    backbone = BackboneBase(network, return_layers=["2"], train_layers=["0"])
    small, large = torch.randn(3, 33, 45), torch.randn(3, 64, 70)
    alone, together = backbone([small])["0"], backbone([small, large])["0"]

    assert backbone.size_divisor == 4
    assert alone.tensors.shape[-2:] == (9, 12)  # 33 / 4 and 45 / 4, rounded up
    torch.testing.assert_close(together.tensors[:1, :, :9, :12], alone.tensors, rtol=1e-5, atol=1e-5)


def test_windows_without_padding_take_the_cells_at_the_border_too() -> None:
    patches = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 2, stride=2))
    backbone = BackboneBase(patches, return_layers=["0", "1"], train_layers=["0"])

    assert backbone.size_divisor == 8
    assert [level.tensors.shape[-2:] for level in backbone([torch.randn(3, 33, 45)]).values()] == [(9, 12), (5, 6)]


@pytest.mark.parametrize("side", [9, 40])  # on both sides of the 256 cells from which two dimensions are faster
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [0, (2, 1), "same"])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_convolutions_of_groups_compute_the_same_in_the_trial(
    groups: int, padding: int | tuple[int, int] | str, bias: bool, side: int
) -> None:
    stride = 1 if padding == "same" else (2, 1)
    layer = nn.Conv2d(8, 16, (3, 2), stride, padding, (1, 2), groups, bias, dtype=torch.float64)
    x = torch.randn(2, 8, side, side + 1, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    expected = layer(x)
    with GroupsTogether():
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
