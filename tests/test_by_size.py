"""A padded batch in passes of equal size gives what it gives as a whole."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_backbone import (
    Backbone,
    BackboneBase,
    NestedTensor,
    calibrate_frozen_batch_norm,
    nested_tensor_from_tensor_list,
)
from detr_backbone.padding.by_size import _PasteIntoBatch, group_by_size, is_faster_by_size

SIZES = ((320, 352), (67, 131), (320, 352))


@pytest.fixture(scope="module")
def images() -> NestedTensor:
    generator = torch.Generator().manual_seed(0)
    return nested_tensor_from_tensor_list([torch.randn(3, *size, generator=generator) for size in SIZES])


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone("resnet18", return_interm_layers=True)


def passes(backbone: BackboneBase, images: NestedTensor) -> list[int]:
    """How many images each pass through the body holds."""
    seen: list[int] = []
    handle = backbone.body.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    backbone(images)
    handle.remove()
    return seen


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (((400, 544), (320, 500), (384, 400), (240, 320)), True),
        (((800, 1088), (480, 640)), True),
        (((800, 1088), (800, 1080)), False),
        (((224, 224), (160, 200)), False),
        (((800, 1088), (800, 1088)), False),
    ],
)
def test_much_padding_is_worth_passes_of_their_own(sizes: tuple[tuple[int, int], ...], expected: bool) -> None:
    batch = nested_tensor_from_tensor_list([torch.zeros(3, *size) for size in sizes])
    assert is_faster_by_size(batch, nn.Identity()) is expected


@pytest.mark.parametrize(
    ("divisor", "expected"), [(1, [(0, 3), (1,), (2,)]), (4, [(0, 2, 3), (1,)]), (16, [(0, 1, 2, 3)])]
)
def test_images_share_a_pass_that_are_of_one_size_once_the_divisor_divides_them(
    divisor: int, expected: list[tuple[int, ...]]
) -> None:
    sizes = [(8, 12), (9, 12), (7, 10), (8, 12)]
    batch = nested_tensor_from_tensor_list([torch.full((1, *size), float(index)) for index, size in enumerate(sizes)])
    groups = group_by_size(batch, divisor)

    assert [group.indices for group in groups] == expected
    for group in groups:
        assert group.images.sizes == tuple(sizes[index] for index in group.indices)
        assert [image[0, 0, 0].item() for image in group.images.tensors] == list(group.indices)


def test_what_the_padding_of_the_caller_holds_is_cut_away() -> None:
    batch = NestedTensor(torch.ones(2, 1, 8, 8), torch.tensor([[[False]], [[True]]]).expand(2, 8, 8).clone())
    batch.mask[1, :7, :6] = False
    (group,) = group_by_size(NestedTensor(batch.tensors, batch.mask), 8)

    assert group.images.tensors[1].sum() == 7 * 6


def test_a_padded_batch_gives_what_it_gives_as_a_whole(backbone: Backbone, images: NestedTensor) -> None:
    assert passes(backbone, images) == [2, 1]
    whole = backbone.forward_whole_batch(images)
    for name, level in backbone(images).items():
        assert level.sizes == whole[name].sizes
        assert level.mask.equal(whole[name].mask)
        torch.testing.assert_close(level.tensors, whole[name].tensors, rtol=1e-4, atol=1e-4)
        assert level.tensors.is_contiguous(memory_format=torch.channels_last)


def test_its_gradients_are_those_of_the_whole(backbone: Backbone, images: NestedTensor) -> None:
    backbone, images = copy.deepcopy(backbone).double(), images.to(torch.float64)  # rounding decides about no ReLU

    def gradients(levels: dict[str, NestedTensor]) -> dict[str, Tensor]:
        backbone.zero_grad()
        torch.stack([level.tensors.square().mean() for level in levels.values()]).sum().backward()
        return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}

    apart, whole = gradients(backbone(images)), gradients(backbone.forward_whole_batch(images))
    assert apart.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(apart[name], gradient, rtol=0, atol=1e-12 * gradient.abs().max().item(), msg=name)


def test_zeros_keep_to_the_batch(images: NestedTensor) -> None:
    assert passes(Backbone("resnet18", padding="zeros"), images) == [3]


def test_a_subclass_adds_its_own_once(images: NestedTensor) -> None:
    class Doubled(Backbone):
        def forward(self, images: NestedTensor) -> dict[str, NestedTensor]:  # type: ignore[override]
            levels = super().forward(images)
            return {name: NestedTensor(2 * level.tensors, level.mask) for name, level in levels.items()}

    backbone, plain = Doubled("resnet18"), Backbone("resnet18")
    plain.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(backbone(images)["0"].tensors, 2 * plain(images)["0"].tensors)


def test_a_compiled_backbone_leaves_the_graph_for_images_of_several_sizes(images: NestedTensor) -> None:
    torch.compiler.reset()
    network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.ReLU())
    backbone = BackboneBase(network, return_layers=["2"], train_layers=["0"])
    assert backbone.batching == "by_size"
    expected = backbone(images)["0"].tensors

    torch.testing.assert_close(torch.compile(backbone, backend="eager")(images)["0"].tensors, expected)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph"):
        torch.compile(backbone, backend="eager", fullgraph=True)(images)


def test_images_put_together_pass_their_gradients_on() -> None:
    maps = [torch.randn(n, 2, *s, dtype=torch.float64, requires_grad=True) for n, s in ((2, (2, 3)), (1, (3, 4)))]
    apply = partial(_PasteIntoBatch.apply, (3, 4, 4), [(0, 2), (1,)])
    first, second = (F.pad(cells, (0, 4 - cells.shape[3], 0, 4 - cells.shape[2])) for cells in maps)
    assert torch.equal(apply(*maps), torch.stack([first[0], second[0], first[1]]))
    assert torch.autograd.gradcheck(apply, maps)


def test_statistics_of_mixed_sizes_fit_images_that_run_by_size() -> None:
    torch.manual_seed(0)
    backbone = Backbone("efficientnet_b0", return_interm_layers=True).eval()
    assert backbone.batching == "by_size"
    sizes = ((64, 96), (96, 64), (128, 128), (80, 112), (128, 64), (96, 96))
    images = [torch.randn(3, *size) for size in sizes]
    calibrate_frozen_batch_norm(backbone, [images])
    with torch.no_grad():
        levels = backbone(images).values()

    for level in levels:  # a norm of scale 1 ends most stages: per group, statistics gave a hundred times as much
        spread = level.tensors.transpose(0, 1)[:, ~level.mask].std()
        assert 0.3 < spread < 3
