"""Branches that only a CUDA device takes; `benchmarks/gpu.sh` runs these where there is one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detr_backbone import Backbone, NestedTensor, build_backbone, fold_for_inference, nested_tensor_from_tensor_list
from detr_backbone.backbone import BackboneConfig
from detr_backbone.detectors import DetectorConfig, build_criterion, build_detector, build_postprocess
from detr_backbone.detectors.deformable_sampling import multi_scale_deformable_attention, sampling_on

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = "cuda"
SIZES = ((97, 131), (64, 160), (97, 131), (160, 90))


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 means float32 here; PyTorch's default for convolutions is TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def images(device: str = CUDA, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, *size, generator=generator).to(device, dtype) for size in SIZES]


@pytest.fixture(scope="module")
def network() -> Backbone:
    torch.manual_seed(0)
    return Backbone("resnet18", return_interm_layers=True, train_layers=()).eval()


@pytest.fixture(scope="module")
def float64_backbone(network: Backbone) -> Backbone:
    return copy.deepcopy(network).double().to(CUDA)


def assert_levels_equal(got: Any, expected: Any, **tolerance: float) -> None:
    for name, level in expected.items():
        assert torch.equal(got[name].mask.cpu(), level.mask.cpu())
        torch.testing.assert_close(got[name].tensors.cpu(), level.tensors.cpu(), **tolerance)


def test_a_batch_is_pinned_with_its_mask_and_sizes() -> None:
    pinned = nested_tensor_from_tensor_list(images("cpu")).pin_memory()

    assert pinned.tensors.is_pinned()
    assert pinned.mask.is_pinned()
    assert pinned.sizes == SIZES


def test_a_loader_pins_batches_of_this_package() -> None:
    loader = DataLoader(images("cpu"), batch_size=2, collate_fn=nested_tensor_from_tensor_list, pin_memory=True)

    assert all(batch.tensors.is_pinned() and batch.mask.is_pinned() for batch in loader)


def test_a_copy_that_does_not_block_arrives_whole() -> None:
    batch = nested_tensor_from_tensor_list(images("cpu"))
    moved = batch.pin_memory().to(CUDA, non_blocking=True)
    torch.cuda.synchronize()

    assert torch.equal(moved.tensors.cpu(), batch.tensors)
    assert torch.equal(moved.mask.cpu(), batch.mask)
    assert moved.sizes == SIZES


def test_memory_that_another_stream_uses_is_not_given_away() -> None:
    stream = torch.cuda.Stream()
    expected = nested_tensor_from_tensor_list(images("cpu")).tensors.double().sum()
    batch = nested_tensor_from_tensor_list(images())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        total = batch.tensors.double().sum()
    batch.record_stream(stream)
    shape = batch.tensors.shape
    del batch
    torch.full(shape, 7.0, device=CUDA)  # would take the memory at once, and write to it
    stream.synchronize()

    torch.testing.assert_close(total.cpu(), expected)


def test_a_padded_batch_gives_what_it_gives_on_the_cpu(network: Backbone) -> None:
    on_cuda = copy.deepcopy(network).to(CUDA)
    with torch.inference_mode():
        # Convolutions of other algorithms, over up to 4608 products each.
        assert_levels_equal(on_cuda(images()), network(images("cpu")), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("plan", ["forward_whole_batch", "forward_by_size"])
def test_both_plans_give_each_image_what_it_gives_alone(plan: str, grad: bool, float64_backbone: Backbone) -> None:
    with torch.set_grad_enabled(grad):
        together = getattr(float64_backbone, plan)(nested_tensor_from_tensor_list(images(dtype=torch.float64)))
        for index, image in enumerate(images(dtype=torch.float64)):
            for name, level in float64_backbone([image]).items():
                h, w = level.sizes[0]
                got = together[name].tensors[index]
                torch.testing.assert_close(got[:, :h, :w], level.tensors[0], rtol=1e-9, atol=1e-9)
                assert not got[:, h:].any()
                assert not got[:, :, w:].any()


def test_a_network_that_looks_at_the_whole_map_runs_by_size() -> None:
    backbone = Backbone("mobilenet_v3_small", train_layers=()).double().to(CUDA).eval()
    assert backbone.batching == "by_size"
    with torch.inference_mode():
        together = backbone(images(dtype=torch.float64))["0"]
        alone = backbone(images(dtype=torch.float64)[1:2])["0"]
    h, w = alone.sizes[0]

    torch.testing.assert_close(together.tensors[1, :, :h, :w], alone.tensors[0], rtol=1e-9, atol=1e-9)


def test_folding_for_inference_changes_no_feature(float64_backbone: Backbone) -> None:
    folded = fold_for_inference(copy.deepcopy(float64_backbone))
    with torch.inference_mode():
        expected = float64_backbone(images(dtype=torch.float64))
        assert_levels_equal(folded(images(dtype=torch.float64)), expected, rtol=1e-9, atol=1e-9)


def test_features_under_autocast_are_bfloat16_and_close_to_float32(network: Backbone) -> None:
    on_cuda = copy.deepcopy(network).to(CUDA)
    with torch.inference_mode():
        expected = on_cuda(images())["3"].tensors
        with torch.autocast(CUDA, torch.bfloat16):
            got = on_cuda(images())["3"].tensors

    assert got.dtype == torch.bfloat16
    # 8 bits of mantissa through 17 convolutions
    assert (got.float() - expected).norm() < 0.05 * expected.norm()


def test_positions_are_made_where_the_features_are() -> None:
    joiner = build_backbone(BackboneConfig(name="resnet18", hidden_dim=32)).to(CUDA).eval()
    with torch.inference_mode():
        features, positions = joiner(images())

    assert positions[0].device == features[0].tensors.device == features[0].mask.device


def test_sampling_by_grid_sample_on_the_device_equals_embedding_bag_on_the_cpu() -> None:
    shapes = [(9, 13), (5, 7)]
    value = torch.randn(2, 9 * 13 + 5 * 7, 4, 8, dtype=torch.float64)
    locations = torch.rand(2, 11, 4, 2, 3, 2, dtype=torch.float64) * 1.2 - 0.1
    weights = torch.rand(2, 11, 4, 2, 3, dtype=torch.float64)
    on_cpu = multi_scale_deformable_attention(value, shapes, locations, weights, sampling="embedding_bag")
    arguments = (value.to(CUDA), shapes, locations.to(CUDA), weights.to(CUDA))
    on_cuda = multi_scale_deformable_attention(*arguments, sampling="grid_sample")

    torch.testing.assert_close(on_cuda.cpu(), on_cpu)
    assert sampling_on(CUDA) in ("grid_sample", "ms_deform_attn")


def test_sampling_by_ms_deform_attn_equals_grid_sample() -> None:
    pytest.importorskip("torch_ms_deform_attn")
    shapes = [(9, 13), (5, 7)]
    value = torch.randn(2, 9 * 13 + 5 * 7, 4, 8, device=CUDA)
    locations, weights = torch.rand(2, 11, 4, 2, 3, 2, device=CUDA), torch.rand(2, 11, 4, 2, 3, device=CUDA)
    one, other = (
        multi_scale_deformable_attention(value, shapes, locations, weights, sampling=sampling)
        for sampling in ("ms_deform_attn", "grid_sample")
    )

    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


DETECTORS = {
    "detr": {"name": "detr"},
    "deformable": {"name": "deformable_detr"},
    "two_stage": {"name": "deformable_detr", "with_box_refine": True, "two_stage": True},
}


def build_small(options: dict[str, Any]) -> tuple[nn.Module, DetectorConfig]:
    torch.manual_seed(0)
    backbone = BackboneConfig(name="resnet18", return_layers=("layer3", "layer4"), hidden_dim=64)
    small: dict[str, Any] = {"enc_layers": 1, "dec_layers": 2, "dim_feedforward": 64, "dropout": 0.0}
    config = DetectorConfig(num_classes=5, num_queries=7, backbone=backbone, **small, **options)
    return build_detector(config), config


@pytest.mark.parametrize("options", DETECTORS.values(), ids=DETECTORS)
def test_a_detector_gives_what_it_gives_on_the_cpu(options: dict[str, Any]) -> None:
    detector, _ = build_small(options)
    detector = detector.double().eval()
    with torch.inference_mode():
        expected = detector(images("cpu", torch.float64))
        got = detector.to(CUDA)(images(dtype=torch.float64))

    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(got[name].cpu(), expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", DETECTORS.values(), ids=DETECTORS)
def test_an_image_gives_the_same_detections_alone_and_in_a_padded_batch(options: dict[str, Any]) -> None:
    detector, _ = build_small(options)
    detector = detector.double().to(CUDA).eval()
    with torch.inference_mode():
        together, alone = detector(images(dtype=torch.float64)), detector(images(dtype=torch.float64)[1:2])

    torch.testing.assert_close(together["pred_boxes"][1], alone["pred_boxes"][0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("options", DETECTORS.values(), ids=DETECTORS)
def test_a_training_step_gives_every_parameter_a_finite_gradient(options: dict[str, Any], precision: str) -> None:
    detector, config = build_small(options)
    detector.to(CUDA).train()
    criterion = build_criterion(config).to(CUDA)
    boxes = torch.tensor([[0.5, 0.5, 0.3, 0.3], [0.3, 0.6, 0.2, 0.1]], device=CUDA)
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 3], device=CUDA)} for _ in SIZES]
    with torch.autocast(CUDA, torch.bfloat16, enabled=precision == "bf16"):
        outputs = detector(nested_tensor_from_tensor_list(images("cpu")).pin_memory().to(CUDA, non_blocking=True))
        loss = criterion.weighted_sum(criterion(outputs, targets))
    loss.backward()

    assert loss.isfinite()
    trained = {name: p.grad for name, p in detector.named_parameters() if p.requires_grad}
    assert {name for name, gradient in trained.items() if gradient is None or not gradient.isfinite().all()} == set()


def test_detections_come_from_the_device() -> None:
    detector, config = build_small(DETECTORS["detr"])
    postprocess = build_postprocess(config, category_ids=(3, 5, 7, 9, 11))
    with torch.inference_mode():
        detections = postprocess(detector.to(CUDA).eval()(images()), torch.tensor(SIZES, device=CUDA))

    assert {d["boxes"].device.type for d in detections} == {CUDA}
    assert {int(label) for d in detections for label in d["labels"]} <= {3, 5, 7, 9, 11}


def test_a_detector_trains_and_is_evaluated_from_a_configuration(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("pycocotools")
    from detr_backbone.coco.shapes import draw_shapes
    from detr_backbone.training import parse_config, train

    draw_shapes(tmp_path / "shapes", train=16, val=4, image_size=64)
    root = tmp_path / "shapes"
    train(
        parse_config(
            [
                f"--output_dir={tmp_path / 'run'}",
                *("--mixed_precision=bf16", "--optimizer.epochs=1", "--calibration_images=4", "--data.num_workers=2"),
                *("--detector.name=deformable_detr", "--detector.backbone.name=resnet18", "--detector.enc_layers=1"),
                *("--detector.dec_layers=2", "--detector.num_queries=5", "--detector.backbone.hidden_dim=64"),
                *("--data.transforms.eval_size=64", "--data.transforms.scales=[64]", "--data.transforms.crop=false"),
                *(f"--data.train.images={root / 'train'}", f"--data.val.images={root / 'val'}"),
                f"--data.train.annotations={root / 'annotations/instances_train.json'}",
                f"--data.val.annotations={root / 'annotations/instances_val.json'}",
            ]
        )
    )

    assert (tmp_path / "run" / "checkpoint.pt").is_file()


def test_a_batch_without_sizes_reads_them_from_the_device() -> None:
    batch = nested_tensor_from_tensor_list(images())

    assert NestedTensor(batch.tensors, batch.mask).sizes == SIZES
