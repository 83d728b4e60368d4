"""Exported backbones and detectors, in the engines that are small enough for every test run."""

from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr_backbone import Joiner, NestedTensor, PositionEmbeddingLearned
from detr_backbone.backbone import BackboneBase
from detr_backbone.detectors import DETR
from detr_backbone.errors import ExportError
from detr_backbone.export import ENGINES, ExportedBackbone, ExportedDetector, ExportReport, export, load_exported
from detr_backbone.export.engines import open_engine
from tests.export_models import LEVELS, Network, assert_same, build_joiner, build_tiny_detr, images


@pytest.fixture(scope="module")
def joiner() -> Joiner:
    return build_joiner()


@pytest.fixture(scope="module")
def detector() -> DETR:
    return build_tiny_detr()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def onnx_joiner(joiner: Joiner, folder: Path) -> ExportReport:
    return export(joiner, folder / "joiner.onnx", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), config={"name": "tiny"})


@pytest.fixture(scope="module")
def onnx_detector(detector: DETR, folder: Path) -> ExportReport:
    return export(detector, folder / "detector.onnx", categories={7: "cat", 3: "dog", 44: "cow"})


@pytest.fixture(scope="module")
def pt2_joiner(joiner: Joiner, folder: Path) -> ExportReport:
    return export(joiner, folder / "joiner.pt2")


@pytest.fixture(params=["onnx_joiner", "pt2_joiner"])
def exported_joiner(request: pytest.FixtureRequest) -> Joiner:
    loaded = load_exported(request.getfixturevalue(request.param).path)
    assert isinstance(loaded, Joiner)
    return loaded


def test_an_exported_joiner_gives_levels_masks_sizes_and_positions_of_padded_images(
    joiner: Joiner, exported_joiner: Joiner
) -> None:
    with torch.inference_mode():
        features, positions = joiner(images())
    got_features, got_positions = exported_joiner(images())

    assert_same([level.tensors for level in got_features], [level.tensors for level in features])
    assert_same(got_positions, positions)
    assert [level.sizes for level in got_features] == [level.sizes for level in features]
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(got_features, features, strict=True))


def test_an_exported_joiner_takes_a_list_a_batch_and_a_nested_tensor_alike(exported_joiner: Joiner) -> None:
    batch = torch.randn(2, 3, 40, 56)

    for given in (list(batch), NestedTensor(batch, None)):
        assert_same(exported_joiner(given)[0][-1].tensors, exported_joiner(batch)[0][-1].tensors)


def test_padding_in_a_batch_does_not_change_an_image(exported_joiner: Joiner) -> None:
    alone, _ = exported_joiner([images()[3]])
    together, _ = exported_joiner(images())
    h, w = alone[-1].sizes[0]

    assert_same(together[-1].tensors[3, :, :h, :w], alone[-1].tensors[0])
    assert together[-1].tensors[3, :, h:].abs().max() == 0


def test_an_exported_joiner_has_strides_channels_and_position_encoding_for_a_detector(
    joiner: Joiner, exported_joiner: Joiner
) -> None:
    for name in ("strides", "channels", "num_channels", "padding"):
        assert getattr(exported_joiner, name) == getattr(joiner, name)
    mask = torch.zeros(1, 3, 4, dtype=torch.bool)
    assert_same(exported_joiner[1](mask), joiner[1](mask))


def test_an_exported_detector_gives_the_detections_of_each_image_in_the_order_of_the_images(
    detector: DETR, onnx_detector: ExportReport
) -> None:
    with torch.inference_mode():
        expected = detector(images())
    exported = load_exported(onnx_detector.path)
    got = exported(images())

    assert isinstance(exported, ExportedDetector)
    for name in ("pred_logits", "pred_boxes"):
        assert_same(got[name], expected[name])


def test_metadata_say_what_the_file_was_made_from(joiner: Joiner, onnx_joiner: ExportReport) -> None:
    loaded = load_exported(onnx_joiner.path)
    assert isinstance(loaded, Joiner)
    metadata = loaded[0].metadata

    assert metadata == onnx_joiner.metadata
    assert (metadata.kind, metadata.strides, metadata.channels, metadata.in_channels) == ("joiner", (4, 8), (4, 8), 3)
    assert (metadata.mean, metadata.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert metadata.config == {"name": "tiny"}
    assert metadata.versions["torch"] == version("torch")
    assert len(metadata.weights_sha256) == 64


def test_categories_keep_their_ids_and_their_order(onnx_detector: ExportReport) -> None:
    loaded = load_exported(onnx_detector.path)
    assert isinstance(loaded, ExportedDetector)

    assert list(loaded.metadata.categories.items()) == [(7, "cat"), (3, "dog"), (44, "cow")]


def test_folded_weights_are_constants_and_no_mask_is_in_the_graph(onnx_joiner: ExportReport) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(onnx_joiner.path).graph

    assert {node.op_type for node in graph.node} == {"Conv", "Relu"}


def test_an_onnx_file_holds_its_weights_itself(onnx_joiner: ExportReport) -> None:
    onnx = pytest.importorskip("onnx")
    tensors = onnx.load(onnx_joiner.path, load_external_data=False).graph.initializer

    assert not any(tensor.external_data for tensor in tensors)
    assert sorted(path.suffix for path in onnx_joiner.path.parent.glob("joiner*")) in ([".onnx"], [".onnx", ".pt2"])


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    joiner = build_joiner().train()
    before = {name: tensor.clone() for name, tensor in joiner.state_dict().items()}
    export(joiner, tmp_path / "joiner.pt2")

    after = joiner.state_dict()
    assert joiner.training
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_learned_positions_come_back_with_the_file(tmp_path: Path) -> None:
    joiner = build_joiner(encoding=PositionEmbeddingLearned(8, num_embeddings=10))
    loaded = load_exported(export(joiner, tmp_path / "joiner.pt2").path)

    assert_same(loaded(images())[1], joiner(images())[1])


def test_a_backbone_is_exported_without_positions(joiner: Joiner, tmp_path: Path) -> None:
    loaded = load_exported(export(joiner[0], tmp_path / "backbone.pt2").path)

    assert isinstance(loaded, ExportedBackbone)
    assert_same(loaded(images())["1"].tensors, joiner[0](images())["1"].tensors)


def test_a_backbone_with_zeros_as_padding_sees_the_padding_that_the_model_sees(tmp_path: Path) -> None:
    joiner = build_joiner(padding="zeros")
    loaded = load_exported(export(joiner, tmp_path / "joiner.pt2").path)

    assert_same(loaded(images())[0][-1].tensors, joiner(images())[0][-1].tensors)


def test_a_graph_with_masks_gives_the_same_in_one_pass(joiner: Joiner, tmp_path: Path) -> None:
    report = export(joiner, tmp_path / "masked.pt2", masks=True)
    loaded = load_exported(report.path)

    assert report.metadata.masks
    assert_same(loaded(images())[0][-1].tensors, joiner(images())[0][-1].tensors)


class DiffersInGraphs(BackboneBase):
    def forward(self, images: Any) -> dict[str, NestedTensor]:
        levels = super().forward(images)
        if torch.compiler.is_exporting():
            levels["1"].tensors = levels["1"].tensors + 0.01
        return levels


class ServesSomeSizes(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.shape[2] > 3 * x.shape[3] else x * 2)


class LooksAtValues(Network):
    """Cannot be traced, so that its layers are taken by hooks."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] < 0 else super().forward(x)


def test_a_network_whose_layers_are_taken_by_hooks_is_exported(tmp_path: Path) -> None:
    joiner = build_joiner(LooksAtValues())
    assert joiner[0].body.strategy == "hooks"
    loaded = load_exported(export(joiner, tmp_path / "hooks.pt2").path)

    assert_same(loaded(images())[0][-1].tensors, joiner(images())[0][-1].tensors)


def test_a_file_that_differs_from_the_model_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"file=.*model\.pt2 \| got torch: .* expected .* at most 1\.0e-04"):
        export(DiffersInGraphs(Network(), return_layers=LEVELS, train_layers=()), tmp_path / "model.pt2")

    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_differs_from_the_model_does_not_run_the_file(
    joiner: Joiner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENGINES, ".pt2", ("torch", "onnxruntime"))  # which cannot read it
    report = export(joiner, tmp_path / "joiner.pt2")

    assert list(report.metadata.failed_engines) == ["onnxruntime"]
    assert load_exported(report.path)(images())[0][0].sizes == joiner(images())[0][0].sizes
    monkeypatch.setattr("detr_backbone.export.engines._onnxruntime", lambda path, _: open_engine(path, "torch"))
    with pytest.raises(ExportError, match=r"key=engine \| got onnxruntime: .* fix: use torch"):
        load_exported(report.path, engine="onnxruntime")


def test_a_failed_export_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("an older export")
    with pytest.raises(ExportError):
        export(DiffersInGraphs(Network(), return_layers=LEVELS, train_layers=()), path)

    assert path.read_text() == "an older export"


@pytest.mark.parametrize(
    ("ending", "message"), [("pt2", "got a refusal of 1 x "), ("onnx", "which torch.export took for impossible")]
)
def test_a_model_that_serves_some_sizes_only_is_refused(ending: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export(build_joiner(ServesSomeSizes()), tmp_path / f"model.{ending}")


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (lambda: nn.Conv2d(3, 4, 1), {}, "`model` must be .* got Conv2d"),
        (lambda: build_tiny_detr(padding="zeros"), {}, "`masks` must be True .* got False"),
        (lambda: build_joiner(padding="zeros"), {"masks": True}, "`masks` must be False .* got True"),
        (lambda: build_joiner(encoding=nn.Identity()), {}, r"`model\[1\]` must be .* got Identity"),
    ],
)
def test_a_model_that_cannot_be_exported_faithfully_is_refused(
    build: Callable[[], nn.Module], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export(build(), tmp_path / "model.pt2", **options)


def test_the_ending_decides_the_format(joiner: Joiner, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"`path` must end in \.onnx, \.xml, \.pt2, got model\.bin"):
        export(joiner, tmp_path / "model.bin")


def test_an_exported_file_is_not_trained(onnx_detector: ExportReport) -> None:
    with pytest.raises(ExportError, match=r"got train\(True\)"):
        load_exported(onnx_detector.path).train()


def test_images_of_other_channels_are_refused(onnx_detector: ExportReport) -> None:
    with pytest.raises(ValueError, match="`images` must have 3 channels, got 1"):
        load_exported(onnx_detector.path)([torch.zeros(1, 32, 32)])


def test_images_below_the_least_size_of_a_graph_are_refused(pt2_joiner: ExportReport) -> None:
    height, width = pt2_joiner.metadata.min_size  # torch.export does not let every level have one cell only
    with pytest.raises(ValueError, match=f"at least {width} pixels in W for this file, got {width - 1}"):
        load_exported(pt2_joiner.path)([torch.zeros(3, height, width - 1)])


def test_threads_of_an_engine_are_an_option(onnx_joiner: ExportReport) -> None:
    loaded = load_exported(onnx_joiner.path, threads=1)

    assert_same(loaded(images())[0][0].tensors, load_exported(onnx_joiner.path)(images())[0][0].tensors)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("joiner.onnx", {"engine": "torch"}, r"key=engine \| got torch expected onnxruntime or openvino"),
        ("joiner.onnx", {"engine": "onnxruntim"}, "did you mean 'onnxruntime'"),
        ("joiner.onnx", {"threads": 0}, "`threads` must be at least 1, got 0"),
        ("joiner.onnx", {"precision": "bf16"}, "`precision` must be float32 for onnxruntime, got bf16"),
        ("joiner.pt2", {"threads": 2}, "`threads` must be left out for torch, got 2"),
        ("joiner.bin", {}, r"got '\.bin' expected \.onnx, \.xml, \.pt2"),
    ],
)
def test_options_that_do_not_fit_a_file_are_refused(
    name: str,
    options: dict[str, Any],
    message: str,
    onnx_joiner: ExportReport,
    pt2_joiner: ExportReport,
) -> None:
    with pytest.raises(ExportError, match=message):
        load_exported(onnx_joiner.path.parent / name, **options)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.onnx"):
        load_exported(tmp_path / "absent.onnx")


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_damaged_file_is_named(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"damaged.{ending}"
    path.write_bytes(b"damaged")
    with pytest.raises(ExportError, match=rf"file=.*damaged\.{ending}"):
        load_exported(path)


def test_a_foreign_onnx_file_is_refused(onnx_joiner: ExportReport, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_joiner.path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(ExportError, match=r"file=.*foreign\.onnx key=detr_backbone"):
        load_exported(tmp_path / "foreign.onnx")


def test_metadata_of_another_version_are_refused(onnx_joiner: ExportReport, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_joiner.path)
    for entry in model.metadata_props:
        entry.value = entry.value.replace('"version": 1', '"version": 99')
    onnx.save(model, tmp_path / "later.onnx")
    with pytest.raises(ExportError, match=r"key=version \| got 99 expected 1"):
        load_exported(tmp_path / "later.onnx")


@pytest.mark.parametrize(
    ("path", "library", "extra"),
    [("m.onnx", "onnxruntime", "onnx"), ("m.onnx", "onnxscript", "onnx"), ("m.xml", "openvino", "openvino")],
)
def test_a_library_that_is_missing_is_named_with_its_extra(
    path: str, library: str, extra: str, joiner: Joiner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_spec(name: str) -> ModuleSpec | None:
        return None if name == library else ModuleSpec(name, None)

    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    with pytest.raises(ExportError, match=rf"`{library}` is not installed .*detr_backbone\[{extra}\]"):
        export(joiner, tmp_path / path)
