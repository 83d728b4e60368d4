"""The backbone as the DETR family takes it: from the options of its programs, and with channels for each level."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from detr_backbone.backbone import BackboneConfig, Joiner, build_backbone
from detr_backbone.backbone.base import TRAINED_STAGES
from detr_backbone.errors import ConfigError, unknown_name
from detr_backbone.networks.norms import Norm
from detr_backbone.padding.exact import Padding
from detr_backbone.position_encoding import PositionEncodingConfig

_ENCODINGS = {"sine": "sine", "v2": "sine", "learned": "learned", "v3": "learned"}
_NORMS: dict[str, Norm] = {"FrozenBatchNorm2d": "frozen", "SyncBatchNorm": "sync", "BatchNorm2d": "batch"}
_NEEDED = ("backbone", "lr_backbone", "hidden_dim", "position_embedding")
_OPTIONS = (
    *(*_NEEDED, "dilation", "masks", "num_feature_levels", "return_interm_indices", "return_interm_layers"),
    *("modelname", "pe_temperatureH", "pe_temperatureW", "position_embedding_scale", "batch_norm_type"),
)
_INDICES = ([0, 1, 2, 3], [1, 2, 3], [3])


def from_args(args: Any, *, weights: str | None = "IMAGENET1K_V1", padding: Padding = "exact") -> Joiner:
    """Return the backbone that the options of DETR, Deformable, Conditional, DAB, DN DETR or DINO ask for.

    It stands where `build_backbone(args)` of these programs does. Levels, frozen layers, positions and `num_channels`
    are those of the program that the options belong to: `return_interm_indices` is DINO's; `num_feature_levels` is
    Deformable DETR's, unless `modelname` says otherwise, as in DAB-DETR. Options of the detector are not looked at.

    Args:
        args: an `argparse.Namespace`, or what has these options as attributes: `backbone`, `lr_backbone` (0 freezes the
            backbone, otherwise layer2 to layer4 train), `hidden_dim`, `position_embedding`; where the program has them,
            `dilation`, `masks`, `num_feature_levels`, `return_interm_indices`, `return_interm_layers`, `modelname`,
            `pe_temperatureH` and `pe_temperatureW`, `position_embedding_scale`, `batch_norm_type`.
        weights: as BackboneConfig takes them; the programs start from torchvision's.
        padding: as BackboneConfig takes it; "zeros" computes what the programs compute.

    Raises:
        ConfigError: an option is missing, unknown or out of range, or two contradict each other.
        WeightsError: the weights cannot be loaded completely.

    Source: `build_backbone` and `build_position_encoding` of facebookresearch/detr 29901c5, Deformable-DETR 11169a6,
    ConditionalDETR 8ea7c3f, DAB-DETR 723ddb8, DN-DETR ff3902a and DINO faa8520.

    >>> from argparse import Namespace
    >>> args = Namespace(backbone="resnet18", lr_backbone=1e-5, hidden_dim=64, position_embedding="sine", masks=False)
    >>> from_args(args, weights=None, padding="zeros").num_channels
    512
    >>> args.num_feature_levels = 4
    >>> from_args(args, weights=None, padding="zeros").num_channels
    [128, 256, 512]
    """
    options: Mapping[str, Any] = vars(args)
    _refuse(options)
    name = str(options.get("modelname", "")).lower()
    dino = "return_interm_indices" in options
    deformable = not dino and "num_feature_levels" in options and (not name or "deformable" in name)
    layers = _layers(options, dino=dino, deformable=deformable)
    temperature = 10000.0 if deformable else float(options.get("pe_temperatureH", 10000.0))
    encoding = PositionEncodingConfig(type="learned")
    if _ENCODINGS[options["position_embedding"]] == "sine":
        encoding = PositionEncodingConfig(temperature=temperature, offset=-0.5 if deformable else 0.0)
    joiner = build_backbone(
        BackboneConfig(
            name=options["backbone"],
            weights=weights,
            return_layers=layers,
            train_layers=tuple(layer for layer in TRAINED_STAGES if layer <= layers[-1]) if _trains(options) else (),
            norm=_NORMS[options.get("batch_norm_type", "FrozenBatchNorm2d")],
            dilation=bool(options.get("dilation", False)),
            padding=padding,
            position_encoding=encoding,
            hidden_dim=options["hidden_dim"],
        )
    )
    return for_deformable_detr(joiner) if deformable or dino else joiner


def for_deformable_detr(joiner: Joiner) -> Joiner:
    """Return a backbone with `num_channels` and `strides` as lists of one entry per level, which are set in place.

    Deformable DETR, DAB- and DN-Deformable DETR, H-DETR, Anchor DETR and DINO read them so; DETR, Conditional and
    DAB-DETR read the channels of the one level they take, as every Joiner has them.
    """
    joiner.num_channels = list(joiner.channels)  # type: ignore[assignment]
    joiner.strides = list(joiner.strides)  # type: ignore[assignment]
    return joiner


def _trains(options: Mapping[str, Any]) -> bool:
    return bool(options["lr_backbone"] > 0)


def _layers(options: Mapping[str, Any], *, dino: bool, deformable: bool) -> tuple[str, ...]:
    masks = bool(options.get("masks", False))
    if dino:
        indices = list(options["return_interm_indices"])
        if indices not in _INDICES:
            raise ConfigError(f"`return_interm_indices` must be one of {list(_INDICES)}, got {indices}")
        layers = tuple(f"layer{index + 1}" for index in indices)
    elif deformable:
        several = masks or options["num_feature_levels"] > 1
        layers = ("layer2", "layer3", "layer4") if several else ("layer4",)
    else:
        several = masks or bool(options.get("return_interm_layers", False))
        layers = ("layer1", "layer2", "layer3", "layer4") if several else ("layer4",)
    if (dino or deformable) and options.get("num_feature_levels", len(layers)) < len(layers):
        raise ConfigError(
            f"`num_feature_levels` must be at least the {len(layers)} levels of the backbone, got "
            f"{options['num_feature_levels']}"
        )
    return layers


def _refuse(options: Mapping[str, Any]) -> None:
    missing = [name for name in _NEEDED if name not in options]
    for name in options:
        if name not in _OPTIONS and (near := difflib.get_close_matches(name, _OPTIONS, n=1, cutoff=0.85)):
            raise ConfigError(f"`args` must not hold {name!r}, which no program reads; did you mean {near[0]!r}?")
    if missing:
        raise ConfigError(f"`args` must hold {', '.join(_NEEDED)}, got none for {', '.join(missing)}")
    for name, known in (("position_embedding", _ENCODINGS), ("batch_norm_type", _NORMS)):
        if name in options and options[name] not in known:
            raise ConfigError(f"`{name}`: {unknown_name(str(options[name]), known)}")
    if not 0 <= options["lr_backbone"] < math.inf:
        raise ConfigError(f"`lr_backbone` must be 0 or more, got {options['lr_backbone']}")
    if options.get("pe_temperatureH") != options.get("pe_temperatureW"):
        raise ConfigError(
            f"`pe_temperatureH` must equal `pe_temperatureW`, got {options.get('pe_temperatureH')} and "
            f"{options.get('pe_temperatureW')}"
        )
    if not math.isclose(options.get("position_embedding_scale", 2 * math.pi), 2 * math.pi, rel_tol=1e-6):
        raise ConfigError(f"`position_embedding_scale` must be 2 pi, got {options['position_embedding_scale']}")
