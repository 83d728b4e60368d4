"""A padded batch computed image by image gives what the batch gives."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_backbone import Backbone, NestedTensor, nested_tensor_from_tensor_list
from detr_backbone.padding.by_size import _Together, is_faster_image_by_image

SIZES = ((320, 352), (67, 131))


@pytest.fixture(scope="module")
def images() -> NestedTensor:
    generator = torch.Generator().manual_seed(0)
    return nested_tensor_from_tensor_list([torch.randn(3, *size, generator=generator) for size in SIZES])


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone("resnet18", return_interm_layers=True)


def batches_seen(backbone: Backbone, images: NestedTensor) -> list[int]:
    """How many images each pass through the body holds."""
    seen = []
    body, forward = backbone.body, backbone.body.forward

    def counting(x: Tensor) -> dict[str, Tensor]:
        seen.append(len(x))
        return forward(x)

    body.forward = counting  # type: ignore[method-assign]
    backbone(images)
    body.forward = forward  # type: ignore[method-assign]
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
    assert is_faster_image_by_image(batch) is expected


def test_a_padded_batch_gives_what_it_gives_as_a_whole(backbone: Backbone, images: NestedTensor) -> None:
    assert batches_seen(backbone, images) == [1, 1]
    apart = backbone(images)
    backbone.body.register_forward_hook(lambda *_: None)
    assert batches_seen(backbone, images) == [2]
    for name, level in backbone(images).items():
        assert apart[name].sizes == level.sizes
        assert apart[name].mask.equal(level.mask)
        torch.testing.assert_close(apart[name].tensors, level.tensors, rtol=1e-4, atol=1e-4)


def test_its_gradients_are_those_of_the_whole(backbone: Backbone, images: NestedTensor) -> None:
    def gradients() -> dict[str, Tensor]:
        backbone.zero_grad()
        loss = torch.stack([level.tensors.square().mean() for level in backbone(images).values()]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}

    apart = gradients()
    backbone.body.register_forward_hook(lambda *_: None)
    whole = gradients()
    assert apart.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(apart[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize(
    "register",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
    ],
)
def test_a_hook_on_a_layer_sees_the_batch(backbone: Backbone, images: NestedTensor, register: nn.Module) -> None:
    register(backbone.body.layer2)
    assert batches_seen(backbone, images) == [2]


def test_zeros_keep_to_the_batch(images: NestedTensor) -> None:
    assert batches_seen(Backbone("resnet18", padding="zeros"), images) == [2]


def test_a_subclass_adds_its_own_once(images: NestedTensor) -> None:
    class Doubled(Backbone):
        def forward(self, images: NestedTensor) -> dict[str, NestedTensor]:  # type: ignore[override]
            levels = super().forward(images)
            return {name: NestedTensor(2 * level.tensors, level.mask) for name, level in levels.items()}

    backbone, plain = Doubled("resnet18"), Backbone("resnet18")
    plain.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(backbone(images)["0"].tensors, 2 * plain(images)["0"].tensors)


def test_levels_keep_the_memory_format(backbone: Backbone, images: NestedTensor) -> None:
    assert all(level.tensors.is_contiguous(memory_format=torch.channels_last) for level in backbone(images).values())


def test_images_put_together_pass_their_gradients_on() -> None:
    maps = [torch.randn(1, 2, *size, dtype=torch.float64, requires_grad=True) for size in ((2, 3), (4, 1), (3, 4))]
    apply = partial(_Together.apply, (4, 4))
    padded = [F.pad(cells, (0, 4 - cells.shape[3], 0, 4 - cells.shape[2])) for cells in maps]
    assert torch.equal(apply(*maps), torch.cat(padded))
    assert torch.autograd.gradcheck(apply, maps)
