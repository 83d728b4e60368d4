"""Whole detectors from files: completely, to fine-tune on other classes, and opened by their tensors alone."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detr_backbone import BackboneConfig
from detr_backbone.checkpoints.categories import COCO_NAMES, matching_classes
from detr_backbone.checkpoints.config import dataclass_from_dict, detector_config, refuse_other_settings
from detr_backbone.checkpoints.detector_file import read_detector
from detr_backbone.checkpoints.layouts import DetectorLayout, from_original
from detr_backbone.checkpoints.load import load_detector
from detr_backbone.checkpoints.open import open_detector
from detr_backbone.checkpoints.write import convert_weights, write_weights
from detr_backbone.detectors import DETR, DeformableDETR, DetectorConfig, build_detector
from detr_backbone.errors import WeightsError
from detr_backbone.position_encoding import PositionEncodingConfig
from tests.processes import Command

RESNET = BackboneConfig(name="resnet18", return_layers=("layer4",), hidden_dim=32)
SMALL = DetectorConfig(
    backbone=RESNET, num_classes=3, num_queries=6, nheads=8, enc_layers=1, dec_layers=2, dim_feedforward=24
)
DEFORMABLE = replace(
    SMALL,
    name="deformable_detr",
    num_feature_levels=3,
    set_cost_class=2.0,
    cls_loss_coef=2.0,
    backbone=replace(RESNET, return_layers=("layer3", "layer4"), position_encoding=PositionEncodingConfig(offset=-0.5)),
)
NAMES = ("cat", "dog", "bird")


def tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def detr() -> DETR:
    model = build_detector(SMALL)
    assert isinstance(model, DETR)
    return model


@pytest.fixture(scope="module")
def deformable() -> DeformableDETR:
    model = build_detector(DEFORMABLE)
    assert isinstance(model, DeformableDETR)
    return model


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


@pytest.fixture(scope="module")
def trained(detr: DETR) -> dict[str, Tensor]:
    """The tensors of a DETR that was trained elsewhere on cats, dogs and birds."""
    generator = torch.Generator().manual_seed(1)
    return {
        key: tensor + 0.01 * torch.rand(tensor.shape, generator=generator) for key, tensor in tensors_of(detr).items()
    }


@pytest.fixture(scope="module")
def weights(trained: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its checkpoint."""
    content = {"model": trained, "category_names": NAMES, "category_ids": (7, 8, 9)}
    return saved(tmp_path_factory.mktemp("trained") / "trained.pth", content)


def other(**changes: Any) -> DETR:
    """A detector to fine-tune, without the time that a backbone takes to build."""
    model = build_detector(replace(SMALL, **changes))
    assert isinstance(model, DETR)
    return model


# Strictly


@pytest.mark.parametrize("names", ["original", "huggingface"])
def test_a_detector_takes_every_tensor_and_says_what_it_took(
    detr: DETR, tmp_path: Path, names: Any, trained: dict[str, Tensor]
) -> None:
    layout = DetectorLayout(names=names, resnet="huggingface", prefix="detr.")
    path = saved(tmp_path / "theirs.pth", from_original(trained, layout) | {"mask_head.bias": torch.ones(1)})
    report = load_detector(detr, path)

    assert all(torch.equal(tensor, trained[key]) for key, tensor in detr.state_dict().items())
    assert (report.layout, report.new, report.resized) == (layout, {}, {})
    assert report.dropped == {"mask_head": 1}
    assert sum(report.kept.values()) == len(detr.state_dict())
    assert report.kept["class_embed"] == 2
    assert "kept        2 tensors  class_embed" in str(report)
    assert "dropped     1 tensors  mask_head" in str(report)


@pytest.mark.parametrize(
    "dropped", ["transformer.decoder.bbox_embed.", "transformer.decoder.class_embed.", "class_embed."]
)
def test_heads_of_several_names_may_stand_in_a_file_once(tmp_path: Path, dropped: str) -> None:
    model = build_detector(replace(DEFORMABLE, with_box_refine=True, two_stage=True))
    state = tensors_of(model)
    path = saved(tmp_path / "weights.pth", {key: t for key, t in state.items() if not key.startswith(dropped)})
    load_detector(model, path)

    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_head_that_all_layers_share_may_stand_in_a_file_once(deformable: DeformableDETR, tmp_path: Path) -> None:
    state = tensors_of(deformable)
    once = {key: tensor for key, tensor in state.items() if not key.startswith(("class_embed.1", "bbox_embed.1"))}

    assert sum(load_detector(deformable, saved(tmp_path / "weights.pth", once)).kept.values()) == len(state)


def without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name != key}


FAULTS = {
    "lacks": (
        lambda s: without(s, "transformer.decoder.norm.bias"),
        r"lack 1 of 161 .* key=transformer\.decoder\.norm",
    ),
    "left over": (lambda s: s | {"transformer.x": torch.ones(1)}, r"hold 1 tensors that .* key=transformer\.x"),
    "deeper": (
        lambda s: s | {"transformer.encoder.layers.1.norm1.bias": torch.ones(1)},
        r"hold 1 tensors that .* key=transformer\.encoder\.layers\.1\.norm1\.bias",
    ),
    "classes": (
        lambda s: s | {"class_embed.weight": torch.ones(92, 32), "class_embed.bias": torch.ones(92)},
        r"of other classes .* key=class_embed\.weight \| got \[92, 32\] expected \[4, 32\] \| fix: .*init_classes",
    ),
    "queries": (lambda s: s | {"query_embed.weight": torch.ones(9, 32)}, r"another shape .* key=query_embed\.weight"),
    "nan": (lambda s: s | {"query_embed.weight": torch.full((6, 32), torch.nan)}, r"must be finite .* key=query_embed"),
    "integers": (lambda s: s | {"query_embed.weight": torch.ones(6, 32, dtype=torch.int64)}, "another dtype"),
    "no detector": (lambda s: {"fc.bias": torch.ones(1)}, "must be of DETR or Deformable DETR"),
    "half a projection": (
        lambda s: without(
            from_original(s, DetectorLayout(names="huggingface")), "model.encoder.layers.0.self_attn.q_proj.weight"
        ),
        r"lack a projection .* expected q, k, v",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(
    detr: DETR, tmp_path: Path, fault: str, trained: dict[str, Tensor]
) -> None:
    alter, message = FAULTS[fault]
    before = tensors_of(detr)
    path = saved(tmp_path / "weights.pth", alter(trained))
    with pytest.raises(WeightsError, match=message) as error:
        load_detector(detr, path)

    assert path in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in detr.state_dict().items())


def test_the_other_detector_is_refused_by_its_name(deformable: DeformableDETR, weights: str) -> None:
    with pytest.raises(WeightsError, match=r"another detector .* got DETR expected Deformable DETR"):
        load_detector(deformable, weights)


# To fine-tune


def test_new_classes_start_anew_and_everything_else_is_kept(weights: str, trained: dict[str, Tensor]) -> None:
    model = other(num_classes=2)
    before = tensors_of(model)
    report = load_detector(model, weights, init_classes="new", category_names=("cat", "cow"))
    after, theirs = model.state_dict(), trained

    assert torch.equal(after["class_embed.weight"], before["class_embed.weight"])
    assert all(torch.equal(after[key], theirs[key]) for key in after if "class_embed" not in key)
    assert (report.new, report.dropped) == ({"class_embed": 2}, {"class_embed": 2})
    assert "new         2 tensors  class_embed" in str(report)


def test_classes_of_equal_name_are_copied_with_no_object(weights: str, trained: dict[str, Tensor]) -> None:
    model = other(num_classes=2)
    before = tensors_of(model)
    report = load_detector(model, weights, init_classes="by_name", category_names=("cow", "Dog"))
    rows, theirs = model.state_dict()["class_embed.weight"], trained["class_embed.weight"]

    assert torch.equal(rows[0], before["class_embed.weight"][0])  # cow is new
    assert torch.equal(rows[1], theirs[1])  # dog
    assert torch.equal(rows[2], theirs[3])  # no object
    assert report.copied_classes == ("Dog",)
    assert report.resized == {"class_embed": 2}
    assert "classes copied by name: Dog" in str(report)


def test_every_decoder_layer_of_a_deformable_detr_copies_its_classes(tmp_path: Path) -> None:
    source = build_detector(replace(DEFORMABLE, with_box_refine=True, two_stage=True))
    path = saved(tmp_path / "weights.pth", {"model": tensors_of(source), "category_names": NAMES})
    model = build_detector(replace(DEFORMABLE, num_classes=2, with_box_refine=True, two_stage=True))
    load_detector(model, path, init_classes="by_name", category_names=("bird", "cat"))

    for layer in range(3):
        rows, theirs = model.class_embed[layer].weight, source.class_embed[layer].weight
        assert torch.equal(rows, theirs[[2, 0]])


@pytest.mark.parametrize("count", [4, 9])
def test_another_number_of_queries_keeps_the_first_ones(weights: str, count: int, trained: dict[str, Tensor]) -> None:
    model = other(num_queries=count)
    before = tensors_of(model)["query_embed.weight"]
    report = load_detector(model, weights, init_classes="same")
    queries, theirs = model.state_dict()["query_embed.weight"], trained["query_embed.weight"]

    assert torch.equal(queries[:6], theirs[:count])
    assert torch.equal(queries[6:], before[6:])
    assert report.resized == {"query_embed": 1}


def test_queries_and_training_aids_of_mixed_selection_follow_the_new_detector(tmp_path: Path) -> None:
    mixed = replace(DEFORMABLE, with_box_refine=True, two_stage=True, query_selection="mixed")
    source = tensors_of(build_detector(mixed))
    model = build_detector(replace(mixed, num_queries=4, num_classes=2, dn_number=2))
    report = load_detector(model, saved(tmp_path / "weights.pth", source), init_classes="new")
    queries = model.state_dict()["transformer.tgt_embed.weight"]

    assert torch.equal(queries, source["transformer.tgt_embed.weight"][:4])
    assert report.new["denoising"] == 1
    assert report.resized == {"transformer.tgt_embed": 1}


def test_the_same_classes_keep_their_head_whole(detr: DETR, weights: str, trained: dict[str, Tensor]) -> None:
    load_detector(detr, weights, init_classes="same")

    assert torch.equal(detr.class_embed.weight, trained["class_embed.weight"])


def test_a_start_that_copies_no_class_is_refused(detr: DETR, weights: str) -> None:
    with pytest.raises(WeightsError, match=r"no class has a name .* got \['cow'\] expected some of \['cat', 'dog'"):
        load_detector(detr, weights, init_classes="by_name", category_names=("cow",))


def test_a_start_by_name_from_a_file_without_names_is_refused(
    detr: DETR, tmp_path: Path, trained: dict[str, Tensor]
) -> None:
    path = saved(tmp_path / "nameless.pth", trained)
    with pytest.raises(WeightsError, match="nothing tells the names of the file's 3 classes"):
        load_detector(detr, path, init_classes="by_name", category_names=NAMES)


def test_the_rest_of_the_detector_stays_strict(weights: str) -> None:
    model = other(num_classes=2, dec_layers=1)
    with pytest.raises(WeightsError, match=r"tensors that the detector has not .* key=transformer\.decoder\.layers\.1"):
        load_detector(model, weights, init_classes="new")


def test_mean_and_std_of_the_weights_are_compared_with_ours(
    detr: DETR, weights: str, tmp_path: Path, trained: dict[str, Tensor]
) -> None:
    config = {"data": {"transforms": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}}}
    path = saved(tmp_path / "ours.pth", {"model": trained, "config": config})
    report = load_detector(detr, path)

    assert report.mean_std == ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert report.compare_images((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).endswith("as of the weights")
    assert report.compare_images((0.4, 0.5, 0.5), (0.2, 0.2, 0.2)).startswith("WARNING")
    assert "not known" in load_detector(detr, weights).compare_images((0.4,), (0.2,))


# Opened


def test_coco_has_80_categories_among_91_ids() -> None:
    assert len(COCO_NAMES) == 80
    # Spot checks against the annotations of COCO 2017.
    known = {1: "person", 11: "fire hydrant", 13: "stop sign", 25: "giraffe", 44: "bottle", 67: "dining table"}
    assert known.items() <= COCO_NAMES.items()
    assert (COCO_NAMES[70], COCO_NAMES[82], COCO_NAMES[90]) == ("toilet", "refrigerator", "toothbrush")


def test_names_match_whatever_their_case() -> None:
    assert matching_classes(["N/A", "person", "Traffic Light"], ["traffic light", "N/A", "tree"]) == {0: 2}


CONFIGS = {
    "detr": SMALL,
    "pre-norm": replace(SMALL, pre_norm=True),
    "learned": replace(SMALL, backbone=replace(RESNET, position_encoding=PositionEncodingConfig(type="learned"))),
    "resnet34": replace(SMALL, backbone=replace(RESNET, name="resnet34")),
    "deformable": DEFORMABLE,
    "two stages": replace(DEFORMABLE, with_box_refine=True, two_stage=True, num_queries=300),
    "mixed selection": replace(
        DEFORMABLE, with_box_refine=True, two_stage=True, query_selection="mixed", num_queries=7
    ),
    "one level": replace(
        DEFORMABLE, num_feature_levels=1, backbone=replace(DEFORMABLE.backbone, return_layers=("layer4",))
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_the_configuration_shows_in_the_tensors(tmp_path: Path, case: str) -> None:
    path = saved(tmp_path / "weights.pth", tensors_of(build_detector(CONFIGS[case])))

    assert detector_config(read_detector(path)) == CONFIGS[case]


def test_what_the_tensors_do_not_show_is_taken_from_the_arguments(detr: DETR, tmp_path: Path) -> None:
    args = argparse.Namespace(nheads=4, dilation=True, dropout=0.0)
    path = saved(tmp_path / "weights.pth", {"model": tensors_of(detr), "args": args})
    config = detector_config(read_detector(path))

    assert (config.nheads, config.backbone.dilation, config.dropout) == (4, True, 0.0)


def test_a_checkpoint_of_training_brings_its_own_configuration(detr: DETR, tmp_path: Path) -> None:
    saved_config = {
        "name": "detr",
        "num_classes": 3,
        "nheads": 2,
        "backbone": {"name": "resnet18", "weights": "gone.pth", "return_layers": ["layer4"], "hidden_dim": 32},
    }
    content = {"model": tensors_of(detr), "config": {"detector": saved_config}, "category_names": NAMES}
    config = detector_config(read_detector(saved(tmp_path / "weights.pth", content)))

    assert (config.nheads, config.backbone.weights, config.backbone.return_layers) == (2, None, ("layer4",))


def test_a_saved_configuration_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"saved configuration cannot be read: .*nhead"):
        dataclass_from_dict(DetectorConfig, {"nhead": 8})


TOLD = {
    "attention heads": ({"args": argparse.Namespace(nheads=4)}, SMALL, "nheads .* got 4 expected 8"),
    "dilation": ({"args": {"dilation": True}}, SMALL, r"backbone\.dilation .* got True expected False"),
    "positions": (
        {"args": argparse.Namespace(nheads=8)},
        replace(DEFORMABLE, backbone=replace(DEFORMABLE.backbone, position_encoding=PositionEncodingConfig())),
        r"backbone\.position_encoding .* offset=-0\.5\) expected .* offset=0\.0\)",
    ),
    "its own configuration": (
        {
            "config": {
                "detector": {"num_classes": 3, "backbone": {"name": "resnet18", "position_encoding": {"offset": 1}}}
            }
        },
        SMALL,
        r"backbone\.position_encoding .* offset=1\.0\) expected",
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_a_start_whose_file_tells_other_settings_is_refused(
    request: pytest.FixtureRequest, tmp_path: Path, case: str
) -> None:
    told, config, message = TOLD[case]
    model = request.getfixturevalue("detr" if config is SMALL else "deformable")
    source = read_detector(saved(tmp_path / "weights.pth", {"model": tensors_of(model)} | told))

    with pytest.raises(WeightsError, match=rf"other settings .* key=detector\.{message}") as error:
        refuse_other_settings(source, config)
    assert "\n" not in str(error.value)
    refuse_other_settings(source, detector_config(source))


def test_a_start_whose_file_tells_nothing_is_taken_as_it_is(detr: DETR, tmp_path: Path) -> None:
    source = read_detector(saved(tmp_path / "weights.pth", tensors_of(detr)))

    refuse_other_settings(source, replace(SMALL, nheads=4, backbone=replace(RESNET, name="timm/resnet18")))


@torch.no_grad()
@pytest.mark.parametrize("name", ["detr", "deformable"])
def test_a_detector_of_coco_opens_with_80_categories_and_their_scores(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    config = SMALL if name == "detr" else DEFORMABLE
    published = build_detector(replace(config, num_classes=91)).eval()
    opened = open_detector(saved(tmp_path / "weights.pth", {"model": tensors_of(published)}))
    images = [torch.randn(3, 64, 96)]
    logits, expected = opened.model(images)["pred_logits"], published(images)["pred_logits"]

    assert opened.categories == COCO_NAMES
    torch.testing.assert_close(logits[..., :80], expected[..., list(COCO_NAMES)], rtol=0, atol=1e-6)
    assert opened.config.num_classes == 80
    assert not opened.model.training


def test_a_detector_keeps_the_names_of_its_file(weights: str) -> None:
    assert open_detector(weights).categories == {7: "cat", 8: "dog", 9: "bird"}


def test_names_of_transformers_stand_beside_its_weights(tmp_path: Path, trained: dict[str, Tensor]) -> None:
    folder = tmp_path / "model"
    write_weights(from_original(trained, DetectorLayout(names="huggingface")), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "N/A", "1": "cat", "2": "dog"}}))

    assert open_detector(str(folder)).categories == {1: "cat", 2: "dog"}


def test_names_that_do_not_fit_the_class_head_are_refused(tmp_path: Path, trained: dict[str, Tensor]) -> None:
    path = saved(tmp_path / "two.pth", {"model": trained, "category_names": ("cat", "dog")})
    with pytest.raises(WeightsError, match="got 2 names expected 3"):
        open_detector(path)


def test_a_backbone_that_is_no_resnet_is_named(tmp_path: Path, trained: dict[str, Tensor]) -> None:
    state = {key: tensor for key, tensor in trained.items() if "layer4.1" not in key}
    with pytest.raises(WeightsError, match=r"must be a ResNet of torchvision, got \(2, 2, 2, 1\) blocks.* file=.*odd"):
        open_detector(saved(tmp_path / "odd.pth", state))


# Written


def test_the_script_writes_other_names_that_read_back_equal(
    script: Command, weights: str, tmp_path: Path, trained: dict[str, Tensor]
) -> None:
    options = ["--source", weights, "--output", "out/model.safetensors", "--names", "huggingface"]
    result = script(tmp_path, "convert_weights.py", *options, "--resnet", "huggingface")
    source = read_detector(str(tmp_path / "out"))

    assert result.stdout.startswith("181 tensors, found by original names, torchvision backbone")
    assert source.layout == DetectorLayout(names="huggingface", resnet="huggingface")
    assert source.state.keys() == trained.keys()
    assert all(torch.equal(source.state[key], tensor) for key, tensor in trained.items())


def test_tensors_of_unknown_names_are_not_converted() -> None:
    with pytest.raises(WeightsError, match=r"names that are known, got 1 tensors such as 'blocks\.0\.w'"):
        convert_weights({"blocks.0.w": torch.ones(1)}, names="huggingface")
