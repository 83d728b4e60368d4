"""Images of different sizes as one padded batch."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from detr_backbone.nested_tensor import NestedTensor, as_nested_tensor, nested_tensor_from_tensor_list


def test_images_stand_in_the_top_left_corner_of_zeros() -> None:
    batch = nested_tensor_from_tensor_list([torch.ones(1, 2, 3), torch.full((1, 3, 1), 2.0)])

    expected = torch.tensor([[[1, 1, 1], [1, 1, 1], [0, 0, 0]], [[2, 0, 0], [2, 0, 0], [2, 0, 0]]]).float()
    assert torch.equal(batch.tensors[:, 0], expected)


def test_the_mask_is_true_on_padding_only() -> None:
    batch = nested_tensor_from_tensor_list([torch.ones(1, 2, 3), torch.full((1, 3, 1), 2.0)])

    assert torch.equal(batch.mask, batch.tensors[:, 0] == 0)


def test_sizes_read_from_a_mask_are_those_of_the_images() -> None:
    batch = nested_tensor_from_tensor_list([torch.ones(3, 4, 9), torch.ones(3, 7, 1)])

    assert NestedTensor(batch.tensors, batch.mask).sizes == batch.sizes == ((4, 9), (7, 1))


def test_a_batch_of_one_size_is_not_padded() -> None:
    assert not nested_tensor_from_tensor_list([torch.ones(3, 4, 9), torch.ones(3, 4, 9)]).is_padded
    assert not nested_tensor_from_tensor_list(torch.ones(2, 3, 4, 9)).is_padded
    assert nested_tensor_from_tensor_list([torch.ones(3, 4, 9), torch.ones(3, 4, 8)]).is_padded


def test_a_batch_without_a_mask_has_none_after_a_move_either_where_torch_compiles() -> None:
    def is_padded(batch: NestedTensor) -> bool:
        return batch.is_padded

    compiled = torch.compile(is_padded, backend="eager", fullgraph=True)
    unpadded, padded = torch.ones(1, 3, 4, 9), [torch.ones(3, 4, 9), torch.ones(3, 4, 8)]

    assert not compiled(NestedTensor(unpadded, None).to(torch.float64))
    assert compiled(nested_tensor_from_tensor_list(padded).to(torch.float64))


def test_a_missing_mask_means_that_nothing_is_padded() -> None:
    batch = NestedTensor(torch.ones(2, 3, 4, 5), None)

    assert batch.sizes == ((4, 5), (4, 5))
    assert not batch.decompose()[1].any()


def test_moving_a_batch_keeps_its_sizes_without_reading_the_mask() -> None:
    batch = nested_tensor_from_tensor_list([torch.ones(3, 4, 9), torch.ones(3, 7, 1)]).to("meta")

    assert batch.tensors.device.type == batch.mask.device.type == "meta"
    assert batch.sizes == ((4, 9), (7, 1))


def test_a_batch_of_another_dtype_keeps_its_mask() -> None:
    batch = nested_tensor_from_tensor_list([torch.ones(3, 4, 9), torch.ones(3, 7, 1)])
    half = batch.to("cpu", True).to(torch.bfloat16)

    assert half.tensors.dtype == torch.bfloat16
    assert torch.equal(half.mask, batch.mask)
    assert (half.device, half.sizes) == (torch.device("cpu"), batch.sizes)


def test_a_batch_of_others_needs_a_mask() -> None:
    tensors, mask = torch.ones(1, 3, 4, 9), torch.zeros(1, 4, 9, dtype=torch.bool)
    mask[:, 3:] = True
    assert as_nested_tensor(SimpleNamespace(tensors=tensors, mask=mask)).sizes == ((3, 9),)
    assert as_nested_tensor(SimpleNamespace(tensors=tensors, mask=None)).sizes == ((4, 9),)

    with pytest.raises(TypeError, match=r"images must be .* got SimpleNamespace"):
        as_nested_tensor(SimpleNamespace(tensors=tensors, image_sizes=[(3, 9)]))


def test_a_nested_tensor_is_taken_as_it_is() -> None:
    batch = nested_tensor_from_tensor_list([torch.ones(3, 4, 9)])

    assert as_nested_tensor(batch) is batch


def test_repr_shows_shape_and_sizes() -> None:
    batch = nested_tensor_from_tensor_list([torch.ones(3, 4, 9), torch.ones(3, 7, 1)])

    assert repr(batch) == "NestedTensor([2, 3, 7, 9], torch.float32, device='cpu', sizes=[(4, 9), (7, 1)])"


BAD_IMAGES = [
    ([], ValueError, "empty list"),
    ([torch.ones(3, 4, 4), np.ones((3, 4, 4))], TypeError, r"images\[1\] must be a tensor .* got ndarray"),
    ([torch.ones(3, 4, 4), torch.ones(4, 4)], ValueError, r"images\[1\] must be \[C, h, w\], got \[4, 4\]"),
    ([torch.ones(3, 4, 4), torch.ones(3, 4, 0)], ValueError, r"images\[1\] must hold at least one cell"),
    ([torch.ones(3, 4, 4), torch.ones(1, 4, 4)], ValueError, r"images\[1\] must have the channels of images\[0\], 3"),
    (
        [torch.ones(3, 4, 4), torch.ones(3, 4, 4).half()],
        TypeError,
        r"images\[1\] must have the dtype .* got torch.float16",
    ),
    ([torch.ones(3, 4, 4), torch.ones(3, 4, 4, device="meta")], ValueError, r"images\[1\] must have the device"),
    ([torch.ones(3, 4, 4, dtype=torch.uint8)], TypeError, r"images\[0\] must be floating point, .* got torch.uint8"),
    (torch.ones(3, 4, 4), ValueError, r"\[B, C, H, W\], got \[3, 4, 4\]"),
    (torch.ones(1, 3, 4, 4, dtype=torch.uint8), TypeError, "floating point"),
    (torch.ones(0, 3, 4, 4), ValueError, "at least one cell"),
    (np.ones((2, 3, 4, 4)), TypeError, "got ndarray"),
]


@pytest.mark.parametrize(("images", "error", "message"), BAD_IMAGES)
def test_bad_images_are_named_by_index(images: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nested_tensor_from_tensor_list(images)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`mask` must be \[B, H, W\] = \[2, 8, 9\] .* got \[2, 9, 8\]"):
        NestedTensor(torch.ones(2, 3, 8, 9), torch.zeros(2, 9, 8, dtype=torch.bool))


def test_a_mask_of_numbers_is_refused() -> None:
    with pytest.raises(TypeError, match="must be bool"):
        NestedTensor(torch.ones(2, 3, 8, 9), torch.zeros(2, 8, 9))


def test_sizes_outside_the_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`sizes\[1\]` must lie within"):
        NestedTensor(torch.ones(2, 3, 8, 9), torch.zeros(2, 8, 9, dtype=torch.bool), sizes=[(8, 9), (9, 9)])
    with pytest.raises(ValueError, match="for each of 2 images, got 1"):
        NestedTensor(torch.ones(2, 3, 8, 9), torch.zeros(2, 8, 9, dtype=torch.bool), sizes=[(8, 9)])


def test_a_mask_that_leaves_no_top_left_rectangle_is_refused() -> None:
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[1, 0] = True

    with pytest.raises(ValueError, match=r"`mask\[1\]` must leave one rectangle in the top left corner"):
        _ = NestedTensor(torch.ones(2, 3, 4, 4), mask).sizes


def test_an_image_of_padding_only_is_refused() -> None:
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[1] = True

    with pytest.raises(ValueError, match=r"`mask\[1\]` must leave at least one cell valid"):
        _ = NestedTensor(torch.ones(2, 3, 4, 4), mask).sizes


def test_sizes_without_a_mask_are_refused() -> None:
    with pytest.raises(ValueError, match="`mask` must be given where `sizes` are"):
        NestedTensor(torch.ones(1, 3, 8, 9), None, sizes=[(4, 4)])


def test_a_mask_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="`mask` must be on the device of `tensors`, meta, got cpu"):
        NestedTensor(torch.ones(1, 3, 8, 9, device="meta"), torch.zeros(1, 8, 9, dtype=torch.bool))


def test_tensors_that_are_no_batch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`tensors` must be \[B, C, H, W\], got \[3, 4, 4\]"):
        NestedTensor(torch.ones(3, 4, 4), None)
