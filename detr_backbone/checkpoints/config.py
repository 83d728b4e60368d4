"""The configuration of a published detector, from the shapes of its tensors and from what is saved beside them."""

import re
from collections.abc import Collection, Mapping
from operator import attrgetter
from typing import Any, TypeVar

from jsonargparse import ArgumentParser
from torch import Tensor

from detr_backbone.backbone import BackboneConfig
from detr_backbone.checkpoints.categories import folder_config
from detr_backbone.checkpoints.detector_file import DetectorFile
from detr_backbone.checkpoints.layouts import is_deformable
from detr_backbone.detectors import DetectorConfig
from detr_backbone.errors import WeightsError
from detr_backbone.padding.exact import Padding
from detr_backbone.position_encoding import PositionEncodingConfig
from detr_backbone.weights.zoo import ZOO

T = TypeVar("T")
NOT_SHOWN = (
    "nheads",
    "enc_n_points",
    "dec_n_points",
    "anchor_size",
    "with_box_refine",
    "backbone.dilation",
    "backbone.position_encoding",
)
"""What changes the outputs of a detector, but not the names and shapes of its tensors."""
RESNETS = {
    # blocks of each stage, bottleneck -> name
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


def dataclass_from_dict(kind: type[T], content: Mapping[str, Any]) -> T:
    """Return the dataclass that `dataclasses.asdict` made plain, with tuples where JSON and YAML have lists.

    Raises:
        WeightsError: a key is unknown or a value does not fit.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "config")
    try:
        built: T = parser.instantiate(parser.parse_object({"config": dict(content)}))["config"]
        return built
    except Exception as error:
        raise WeightsError(f"a saved configuration cannot be read: {str(error).splitlines()[0]}") from error


def detector_config(source: DetectorFile, *, padding: Padding = "exact") -> DetectorConfig:
    """Return the configuration of a published detector.

    What the tensors do not show (heads of DETR's attention, a dilated backbone) is taken from the arguments or the
    `config.json` saved with them, or from `ZOO` by the file's hash; else it is the published default: 8 heads, no
    dilation, DETR's or Deformable DETR's sine positions.

    Args:
        source: the file.
        padding: of the backbone: "zeros" computes what the original code computes in a padded batch.

    Raises:
        WeightsError: a tensor is missing that shows a size, or the backbone is no ResNet of torchvision.
    """
    saved = _saved_config(source)
    if saved is not None:
        backbone = dict(saved.get("backbone", {})) | {"weights": None}
        return dataclass_from_dict(DetectorConfig, dict(saved) | {"backbone": backbone})
    state, told = source.state, _told(source)
    try:
        return _config(state, told, num_classes=source.num_classes, padding=padding)
    except KeyError as error:
        raise WeightsError(f"weights lack a tensor | where: file={source.file.path} key={error.args[0]}") from error
    except WeightsError as error:
        raise WeightsError(f"{error} | where: file={source.file.path}") from error


def refuse_other_settings(source: DetectorFile, config: DetectorConfig) -> None:
    """Raise where a file tells another value than a configuration of what tensors do not show.

    Args:
        source: the file; what is told neither in it nor beside it is not compared.
        config: of the detector of the same name that is to take its weights.

    Raises:
        WeightsError: attention would have other heads, the backbone another dilation, positions another scale, …
    """
    told = _told(source)
    compared: Collection[str] = [key for key in NOT_SHOWN if key.rpartition(".")[2] in told]
    if _saved_config(source) is not None:
        compared = NOT_SHOWN
    elif told:
        compared = [*compared, "backbone.position_encoding"]  # which is the detector's
    if not compared:
        return
    theirs = detector_config(source)
    for key in compared if theirs.name == config.name else ():
        value, ours = attrgetter(key)(theirs), attrgetter(key)(config)
        if value != ours:
            raise WeightsError(
                f"weights of other settings | where: file={source.file.path} key=detector.{key} | got {value} expected "
                f"{ours} | fix: set it as the file tells it"
            )


def _config(
    state: Mapping[str, Tensor], told: Mapping[str, Any], *, num_classes: int, padding: Padding
) -> DetectorConfig:
    deformable = is_deformable(state)
    learned = "backbone.1.row_embed.weight" in state
    encoder, decoder = "transformer.encoder.layers", "transformer.decoder.layers"
    projections = [state[f"input_proj.{n}.0.weight"] for n in range(_count(state, r"input_proj\.(\d+)\.0\."))]
    num_backbone_levels = sum(weight.shape[-1] == 1 for weight in projections) if deformable else 1
    hidden_dim = len(state[f"{encoder}.0.norm1.weight"])
    common: dict[str, Any] = {
        "num_classes": num_classes,
        "nheads": told.get("nheads", 8),
        "enc_layers": _count(state, r"transformer\.encoder\.layers\.(\d+)\."),
        "dec_layers": _count(state, r"transformer\.decoder\.layers\.(\d+)\."),
        "dim_feedforward": len(state[f"{encoder}.0.linear1.weight"]),
        "dropout": told.get("dropout", 0.1),
        "backbone": BackboneConfig(
            name=_resnet(state),
            return_layers=tuple(f"layer{n}" for n in range(5 - num_backbone_levels, 5)),
            dilation=bool(told.get("dilation", False)),
            padding=padding,
            position_encoding=PositionEncodingConfig(
                type="learned" if learned else "sine", offset=-0.5 if deformable and not learned else 0.0
            ),
            hidden_dim=hidden_dim,
        ),
    }
    if not deformable:
        return DetectorConfig(
            name="detr",
            num_queries=len(state["query_embed.weight"]),
            pre_norm="transformer.encoder.norm.weight" in state,
            **common,
        )
    levels = len(state["transformer.level_embed"])
    two_stage = "transformer.enc_output.weight" in state
    mixed = state.get("transformer.tgt_embed.weight")
    refine = told.get("with_box_refine", any(key.startswith("transformer.decoder.bbox_embed.") for key in state))
    if two_stage:
        num_queries = told.get("num_queries", 300) if mixed is None else len(mixed)
    else:
        num_queries = len(state["query_embed.weight"])
    per_point = levels * common["nheads"]
    return DetectorConfig(
        name="deformable_detr",
        num_queries=num_queries,
        query_selection="published" if mixed is None else "mixed",
        num_feature_levels=levels,
        enc_n_points=len(state[f"{encoder}.0.self_attn.attention_weights.weight"]) // per_point,
        dec_n_points=len(state[f"{decoder}.0.cross_attn.attention_weights.weight"]) // per_point,
        with_box_refine=bool(refine),
        two_stage=two_stage,
        set_cost_class=2.0,
        cls_loss_coef=2.0,
        **common,
    )


def _saved_config(source: DetectorFile) -> Mapping[str, Any] | None:
    """What this package saved of the detector's configuration in the file or beside it."""
    saved = source.file.extras.get("config")
    detector = saved.get("detector") if isinstance(saved, Mapping) else None
    return detector if isinstance(detector, Mapping) else None


def _told(source: DetectorFile) -> dict[str, Any]:
    """What stands beside the tensors, under our names: from the zoo, the original's arguments, transformers' config."""
    zoo: dict[str, Any] = {}
    for published in ZOO.values():
        if published.url is not None:
            start = published.url.rpartition("-")[2].partition(".")[0]
            if source.file.sha256.startswith(start):
                zoo = {"dilation": published.dilation}
    args = source.file.extras.get("args", {})
    names = ("nheads", "dilation", "dropout", "num_queries", "with_box_refine")
    theirs = folder_config(source.file)
    from_config = {
        "nheads": theirs.get("encoder_attention_heads"),
        "dilation": theirs.get("dilation"),
        "dropout": theirs.get("dropout"),
        "with_box_refine": theirs.get("with_box_refine"),
        "num_queries": theirs.get("two_stage_num_proposals"),
    }
    told = {name: args[name] for name in names if name in args} | zoo
    return told | {name: value for name, value in from_config.items() if value is not None}


def _resnet(state: Mapping[str, Tensor]) -> str:
    depths = tuple(_count(state, rf"backbone\.0\.body\.layer{stage}\.(\d+)\.") for stage in range(1, 5))
    bottleneck = "backbone.0.body.layer1.0.conv3.weight" in state
    try:
        return RESNETS[depths, bottleneck]  # type: ignore[index]
    except KeyError:
        raise WeightsError(
            f"the backbone must be a ResNet of torchvision, got {depths} blocks in stages 1 to 4"
        ) from None


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return how many numbers the first group of `pattern` takes in the keys."""
    return len({m[1] for key in state if (m := re.match(pattern, key))})
