"""Whole detectors under the names of other libraries, and back; their own code computes the same."""

import itertools
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from detr_backbone import BackboneConfig, nested_tensor_from_tensor_list
from detr_backbone.checkpoints.config import detector_config
from detr_backbone.checkpoints.detector_file import read_detector
from detr_backbone.checkpoints.layouts import DetectorLayout, Names, find_detector_layout, from_original, to_original
from detr_backbone.checkpoints.load import load_detector
from detr_backbone.checkpoints.open import open_detector
from detr_backbone.checkpoints.write import write_weights
from detr_backbone.detectors import DetectorConfig, build_detector
from detr_backbone.errors import WeightsError
from detr_backbone.weights.resnet_keys import ResNetLayout

ANY_LAYER = {
    "encoder.layers.0.self_attn_layer_norm.weight": "encoder.layers.0.norm1.weight",
    "encoder.layers.0.final_layer_norm.bias": "encoder.layers.0.norm2.bias",
    "encoder.layers.0.fc1.weight": "encoder.layers.0.linear1.weight",
    "decoder.layers.5.self_attn.out_proj.bias": "decoder.layers.5.self_attn.out_proj.bias",
    "decoder.layers.5.fc2.bias": "decoder.layers.5.linear2.bias",
    "decoder.layers.10.final_layer_norm.bias": "decoder.layers.10.norm3.bias",
}
# Recorded from files that transformers 5.24 wrote: its name -> the original.
DETR = {f"model.{theirs}": f"transformer.{ours}" for theirs, ours in ANY_LAYER.items()} | {
    "model.backbone.conv_encoder.model.layer1.0.bn1.weight": "backbone.0.body.layer1.0.bn1.weight",
    "model.position_embedding.row_embeddings.weight": "backbone.1.row_embed.weight",
    "model.position_embedding.column_embeddings.weight": "backbone.1.col_embed.weight",
    "model.decoder.layers.0.self_attn_layer_norm.weight": "transformer.decoder.layers.0.norm1.weight",
    "model.decoder.layers.0.encoder_attn_layer_norm.weight": "transformer.decoder.layers.0.norm2.weight",
    "model.decoder.layers.0.encoder_attn.out_proj.bias": "transformer.decoder.layers.0.multihead_attn.out_proj.bias",
    "model.decoder.layernorm.weight": "transformer.decoder.norm.weight",
    "model.encoder.layernorm.weight": "transformer.encoder.norm.weight",
    "model.query_position_embeddings.weight": "query_embed.weight",
    "model.input_projection.weight": "input_proj.weight",
    "class_labels_classifier.bias": "class_embed.bias",
    "bbox_predictor.layers.2.weight": "bbox_embed.layers.2.weight",
}
DEFORMABLE = {f"model.{theirs}": f"transformer.{ours}" for theirs, ours in ANY_LAYER.items()} | {
    "model.encoder.layers.0.self_attn.sampling_offsets.weight": (
        "transformer.encoder.layers.0.self_attn.sampling_offsets.weight"
    ),
    "model.decoder.layers.0.self_attn_layer_norm.weight": "transformer.decoder.layers.0.norm2.weight",
    "model.decoder.layers.0.encoder_attn_layer_norm.weight": "transformer.decoder.layers.0.norm1.weight",
    "model.decoder.layers.0.encoder_attn.value_proj.bias": "transformer.decoder.layers.0.cross_attn.value_proj.bias",
    "model.decoder.bbox_embed.1.layers.0.weight": "transformer.decoder.bbox_embed.1.layers.0.weight",
    "model.query_position_embeddings.weight": "query_embed.weight",
    "model.input_proj.3.1.weight": "input_proj.3.1.weight",
    "model.level_embed": "transformer.level_embed",
    "model.reference_points.bias": "transformer.reference_points.bias",
    "model.enc_output_norm.bias": "transformer.enc_output_norm.bias",
    "class_embed.0.bias": "class_embed.0.bias",
}


@pytest.mark.parametrize("names", [DETR, DEFORMABLE], ids=["detr", "deformable_detr"])
def test_recorded_names_of_transformers_are_translated_both_ways(names: dict[str, str]) -> None:
    theirs = {key: torch.tensor(index) for index, key in enumerate(names)}
    ours = {key: torch.tensor(index) for index, key in enumerate(names.values())}

    assert to_original(theirs, DetectorLayout(names="huggingface")) == ours
    assert from_original(ours, DetectorLayout(names="huggingface")) == theirs


def test_queries_keys_and_values_are_one_tensor_here_and_three_there() -> None:
    ours = {"transformer.encoder.layers.0.self_attn.in_proj_weight": torch.arange(12.0).view(6, 2)}
    theirs = from_original(ours, DetectorLayout(names="huggingface"))

    prefix = "model.encoder.layers.0.self_attn"
    assert theirs.keys() == {f"{prefix}.{part}_proj.weight" for part in "qkv"}
    assert theirs[f"{prefix}.k_proj.weight"].tolist() == [[4, 5], [6, 7]]
    assert torch.equal(to_original(theirs, DetectorLayout(names="huggingface")).popitem()[1], ours.popitem()[1])


def config(name: str, **options: Any) -> DetectorConfig:
    levels = ("layer4",) if name == "detr" else ("layer3", "layer4")
    backbone = BackboneConfig(name="resnet18", return_layers=levels, hidden_dim=32, padding="zeros")
    common: dict[str, Any] = {"nheads": 8, "enc_layers": 1, "dec_layers": 2, "dim_feedforward": 24, "num_queries": 6}
    return DetectorConfig(name=cast(Any, name), num_classes=3, backbone=backbone, **common | options)


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    """Keys of both detectors, each with a tensor of its own that divides by three."""
    cases = {
        "detr": config("detr", pre_norm=True),
        "deformable": config("deformable_detr"),
        "two_stage": config("deformable_detr", with_box_refine=True, two_stage=True),
    }
    return {
        name: {key: torch.full((3,), index) for index, key in enumerate(build_detector(case).state_dict())}
        for name, case in cases.items()
    }


NAMES: tuple[Names, ...] = ("original", "huggingface", "huggingface_modules")
RESNETS: tuple[ResNetLayout, ...] = ("torchvision", "detectron2", "huggingface")


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("resnet", RESNETS)
@pytest.mark.parametrize("prefix", ["", "detr.", "model."])
@pytest.mark.parametrize("detector", ["detr", "deformable", "two_stage"])
def test_every_tensor_makes_the_round_trip_and_the_layout_shows_in_the_keys(
    states: dict[str, dict[str, Tensor]], names: Names, resnet: ResNetLayout, prefix: str, detector: str
) -> None:
    layout = DetectorLayout(names=names, resnet=resnet, prefix=prefix)
    theirs = from_original(states[detector], layout)
    back = to_original(theirs, layout)

    assert find_detector_layout(theirs) == layout
    assert back.keys() == states[detector].keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in states[detector].items())


def test_what_is_outside_of_the_prefix_keeps_its_name() -> None:
    state = {"detr.transformer.encoder.layers.0.norm1.bias": torch.ones(1), "mask_head.lay1.bias": torch.ones(1)}
    layout = find_detector_layout(state)

    assert layout.prefix == "detr."
    assert list(to_original(state, layout)) == ["transformer.encoder.layers.0.norm1.bias", "mask_head.lay1.bias"]


def test_another_detector_is_named_by_its_keys() -> None:
    with pytest.raises(
        WeightsError, match=r"must be of DETR or Deformable DETR.* got 1 tensors such as 'roi_heads\.w'"
    ):
        find_detector_layout({"roi_heads.w": torch.ones(1)})


@pytest.mark.parametrize(
    "key",
    [
        "module.transformer.decoder.layers.0.sa_qcontent_proj.weight",  # Conditional, DAB and DN DETR
        "model.decoder.layers.0.ca_qcontent_proj.weight",  # Conditional DETR of transformers
        "model.decoder.layers.0.self_attn.self_attn_query_content_proj.weight",  # DAB-DETR of transformers
    ],
)
def test_a_relative_of_detr_is_named_before_anything_is_renamed(key: str) -> None:
    with pytest.raises(
        WeightsError, match=r"got those of Conditional, DAB or DN DETR .* `detector\.backbone\.weights`"
    ):
        find_detector_layout([key.partition("decoder")[0] + "encoder.layers.0.norm1.bias", key])


# Against transformers itself, where it is installed: too large for every test run.

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "detr": ("Detr", {}),
    "learned": ("Detr", {"position_embedding_type": "learned"}),
    "dc5 r50": ("Detr", {"backbone": "resnet50", "dilation": True}),
    "deformable": ("DeformableDetr", {"num_feature_levels": 4}),
    "deformable r50": ("DeformableDetr", {"num_feature_levels": 4, "backbone": "resnet50"}),
    "refine": ("DeformableDetr", {"num_feature_levels": 4, "with_box_refine": True}),
    "two_stage": (
        "DeformableDetr",
        {"num_feature_levels": 4, "with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 9},
    ),
}
BATCHES = {"padded": [(96, 128), (64, 160)], "alone": [(97, 131)]}
# The sizes of the published detectors, which take minutes: `pytest -m sweep -rP tests/test_checkpoints_layouts.py`.
SIZES = {
    **{f"{which}_{what}": n for which in ("encoder", "decoder") for what, n in (("layers", 6), ("ffn_dim", 1024))},
    **{"d_model": 256, "num_labels": 90, "backbone": "resnet50"},
}
DEFORMABLE_SIZES = SIZES | {"num_queries": 300, "num_feature_levels": 4}
CASES |= {
    "published detr": ("Detr", SIZES | {"num_queries": 100, "encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048}),
    "published deformable": ("DeformableDetr", DEFORMABLE_SIZES),
    "published refine": ("DeformableDetr", DEFORMABLE_SIZES | {"with_box_refine": True}),
    "published two_stage": ("DeformableDetr", DEFORMABLE_SIZES | {"with_box_refine": True, "two_stage": True}),
}


def disturb(model: nn.Module) -> None:
    """Give every layer something to compute that its fresh weights would not show."""
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "running_var" in key:
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and any(
                part in key for part in ("running_mean", "norm", "bn", "sampling_offsets", "attention_weights", "bbox")
            ):
                tensor.add_(0.05 * torch.randn_like(tensor))


def theirs_of(name: str, *, native: bool) -> Any:
    transformers = pytest.importorskip("transformers")
    kind, options = CASES[name]
    size = {
        f"{which}_{what}": n
        for which in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 8), ("ffn_dim", 48))
    }
    levels = ["stage4"] if kind == "Detr" else ["stage2", "stage3", "stage4"]
    resnet18 = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    common = {"d_model": 64, "num_queries": 7, "num_labels": 5, "backbone": "resnet18"} | size | options
    if native:
        common["backbone_config"] = transformers.ResNetConfig(
            **({} if common.pop("backbone") == "resnet50" else resnet18), out_features=levels
        )
    else:
        common["use_timm_backbone"] = True
    config = getattr(transformers, f"{kind}Config")(**common, use_pretrained_backbone=False)
    return getattr(transformers, f"{kind}ForObjectDetection")(config).eval()


def their_order(outputs: dict[str, Tensor], expected: Any) -> tuple[Tensor, Tensor]:
    """Return the index of each of their queries in our outputs, one to one.

    Where the scores of two proposals differ by less than rounding, either may come first, and so do their queries.
    """
    distances = torch.cdist(outputs["pred_boxes"], expected.pred_boxes, p=float("inf")) + torch.cdist(
        outputs["pred_logits"], expected.logits, p=float("inf")
    )
    queries = torch.stack([torch.from_numpy(linear_sum_assignment(each.T)[1]) for each in distances])
    moved = queries != torch.arange(queries.shape[1])
    print(f"{moved.sum()} of {moved.numel()} queries in another order")
    assert moved.float().mean() < 0.05
    return torch.arange(len(queries))[:, None], queries


TRIED = [
    pytest.param(name, native, marks=[pytest.mark.sweep] if name.startswith("published") else [])
    for name, native in itertools.product(CASES, (False, True))
    if not (native and name.endswith("r50"))
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "native"), TRIED)
def test_transformers_detectors_compute_the_same_in_both_directions(tmp_path: Path, name: str, native: bool) -> None:
    theirs = theirs_of(name, native=native)
    disturb(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    opened = open_detector(str(tmp_path / "theirs"), padding="zeros")

    ours = build_detector(opened.config).eval()
    disturb(ours)
    write_weights(from_original(ours.state_dict(), opened.report.layout), tmp_path / "ours" / "model.safetensors")
    (tmp_path / "ours" / "config.json").write_bytes((tmp_path / "theirs" / "config.json").read_bytes())
    loaded, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)

    assert not any(info.values())
    for batch, sizes in BATCHES.items():
        images = nested_tensor_from_tensor_list([torch.randn(3, *size) for size in sizes])
        for direction, their_model, our_model in (
            ("theirs to ours", theirs, opened.model),
            ("ours to theirs", loaded.eval(), ours),
        ):
            expected = their_model(pixel_values=images.tensors, pixel_mask=(~images.mask).long())
            outputs = our_model(images)
            order = their_order(outputs, expected) if "two_stage" in name else slice(None)
            differences = [
                (outputs[key][order] - wanted).abs().max().item()
                for key, wanted in (("pred_logits", expected.logits), ("pred_boxes", expected.pred_boxes))
            ]
            print(
                f"{name}, {opened.report.layout}, {direction}, {batch}: logits differ by {differences[0]:.1e}, ", end=""
            )
            print(f"boxes by {differences[1]:.1e}")
            assert max(differences) < 1e-4


def test_the_modules_of_transformers_have_names_of_their_own(tmp_path: Path) -> None:
    theirs = theirs_of("deformable", native=True)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    source = read_detector(str(tmp_path / "weights.pth"))
    load_detector(build_detector(detector_config(source)), source)

    assert source.layout == DetectorLayout(names="huggingface_modules", resnet="huggingface")
    assert from_original(to_original(source.file.tensors, source.layout), source.layout).keys() == set(
        theirs.state_dict()
    )


def test_the_recorded_names_are_those_that_transformers_writes(tmp_path: Path) -> None:
    theirs = theirs_of("learned", native=False)
    theirs.save_pretrained(tmp_path)
    written = read_detector(str(tmp_path)).file.tensors
    recorded = {key for key in DETR if ".5." not in key and ".10." not in key and "encoder.layernorm" not in key}

    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "detr"
    assert recorded <= written.keys()
