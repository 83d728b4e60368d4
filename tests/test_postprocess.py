"""Scores, category ids and pixels, from outputs small enough to work out by hand."""

import pytest
import torch

from detr_backbone.detectors.postprocess import PostProcess
from detr_backbone.errors import NumericsError

LOGITS = torch.tensor([[[0.0, 3.0, 1.0], [2.0, 0.0, 9.0]], [[1.0, 0.0, 0.0], [0.0, 5.0, 0.0]]])
BOXES = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]], [[0.5, 0.5, 1.0, 1.0], [0.1, 0.2, 0.4, 0.2]]])
OUTPUTS = {"pred_logits": LOGITS, "pred_boxes": BOXES}
SIZES = [(100, 200), (50, 40)]


def test_softmax_gives_each_query_its_best_real_class() -> None:
    first, second = PostProcess()(OUTPUTS, SIZES)

    assert first["labels"].tolist() == [1, 0]  # the second query is most likely no object, then class 0
    assert second["labels"].tolist() == [0, 1]
    torch.testing.assert_close(first["scores"], torch.stack([LOGITS[0, 0].softmax(0)[1], LOGITS[0, 1].softmax(0)[0]]))


def test_boxes_are_corners_in_pixels_of_their_own_image_and_not_clipped() -> None:
    first, second = PostProcess()(OUTPUTS, torch.tensor(SIZES))

    torch.testing.assert_close(first["boxes"], torch.tensor([[80.0, 30, 120, 70], [0, 0, 100, 100]]))
    torch.testing.assert_close(second["boxes"], torch.tensor([[0.0, 0, 40, 50], [-4, 5, 12, 15]]))


def test_sigmoid_gives_the_best_of_all_queries_and_classes_with_their_boxes() -> None:
    first, _ = PostProcess(score="sigmoid", num_select=3)(OUTPUTS, SIZES)

    torch.testing.assert_close(first["scores"], torch.tensor([9.0, 3.0, 2.0]).sigmoid())
    assert first["labels"].tolist() == [2, 1, 0]
    torch.testing.assert_close(first["boxes"], torch.tensor([[0.0, 0, 100, 100], [80, 30, 120, 70], [0, 0, 100, 100]]))


def test_sigmoid_gives_fewer_where_there_are_fewer() -> None:
    first, _ = PostProcess(score="sigmoid", num_select=100)(OUTPUTS, SIZES)

    assert len(first["scores"]) == 2 * 3


def test_labels_become_category_ids() -> None:
    first, _ = PostProcess(category_ids=[1, 90])(OUTPUTS, SIZES)

    assert first["labels"].tolist() == [90, 1]


def test_category_ids_must_be_as_many_as_classes() -> None:
    with pytest.raises(ValueError, match="`category_ids` must hold one id for each of 2 classes, got 3"):
        PostProcess(category_ids=[1, 2, 3])(OUTPUTS, SIZES)


def test_category_ids_are_no_part_of_the_state_dict() -> None:
    assert not PostProcess(category_ids=[1, 2]).state_dict()


def test_half_precision_outputs_give_float32_boxes() -> None:
    first, _ = PostProcess()({name: value.bfloat16() for name, value in OUTPUTS.items()}, SIZES)

    assert first["boxes"].dtype == first["scores"].dtype == torch.float32


@pytest.mark.parametrize("name", ["pred_logits", "pred_boxes"])
def test_a_prediction_that_is_not_a_number_is_refused(name: str) -> None:
    broken = {key: value.clone() for key, value in OUTPUTS.items()}
    broken[name][1, 0, 0] = torch.nan

    with pytest.raises(NumericsError, match=rf"`{name}` must be finite, got NaN or infinity for images \[1\]"):
        PostProcess()(broken, SIZES)


def test_there_must_be_one_size_for_each_image() -> None:
    with pytest.raises(ValueError, match=r"`target_sizes` must be \[B, 2\] = \[2, 2\], got \[1, 2\]"):
        PostProcess()(OUTPUTS, SIZES[:1])


def test_an_unknown_score_is_refused() -> None:
    with pytest.raises(ValueError, match="`score` must be 'softmax' or 'sigmoid', got 'focal'"):
        PostProcess(score="focal")
