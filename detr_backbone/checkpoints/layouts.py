"""What libraries call the parts of DETR and Deformable DETR: the original names, and back.

The original names are those of facebookresearch/detr and fundamentalvision/Deformable-DETR, which are ours too. The
backbone inside, a ResNet, may have names of its own (`weights.resnet_keys`), whatever the names around it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from detr_backbone.errors import WeightsError
from detr_backbone.weights.resnet_keys import ResNetLayout, find_layout, from_torchvision, to_torchvision

Names = Literal["original", "huggingface", "huggingface_modules"]


@dataclass(frozen=True, kw_only=True)
class DetectorLayout:
    """The names of a detector's tensors.

    Attributes:
        names: "original"; "huggingface", of the files that transformers writes and reads; or "huggingface_modules", of
            the modules of transformers 5, which `state_dict()` gives.
        resnet: the names inside the backbone.
        prefix: what stands before every name, such as "detr." in panoptic models.
    """

    names: Names = "original"
    resnet: ResNetLayout = "torchvision"
    prefix: str = ""

    def __str__(self) -> str:
        inside = f" behind {self.prefix!r}" if self.prefix else ""
        return f"{self.names} names{inside}, {self.resnet} backbone"


def find_detector_layout(keys: Iterable[str]) -> DetectorLayout:
    """Return the layout that a detector's keys show.

    Raises:
        WeightsError: they are not those of DETR or Deformable DETR in a layout that is known.

    >>> str(find_detector_layout(["detr.transformer.encoder.layers.0.norm1.bias"]))
    "original names behind 'detr.', torchvision backbone"
    """
    keys = list(keys)
    if any(_CONDITIONAL.search(key) for key in keys):
        raise WeightsError(
            "weights must be of DETR or Deformable DETR, got those of Conditional, DAB or DN DETR | fix: their "
            "backbone alone is read by `detector.backbone.weights`"
        )
    for key in keys:
        m = re.match(r"(|.*?\.)(transformer|model)\.encoder\.layers\.0\.", key)
        if m is None:
            continue
        names: Names = "original"
        if m[2] == "model":
            in_memory = any(".layers.0.mlp.fc1." in other for other in keys)
            names = "huggingface_modules" if in_memory else "huggingface"
        return DetectorLayout(names=names, resnet=find_layout(keys), prefix=m[1])
    raise WeightsError(
        f"weights must be of DETR or Deformable DETR, in the original names or those of transformers, got "
        f"{len(keys)} tensors such as {keys[0] if keys else None!r}"
    )


def to_original(state: Mapping[str, Tensor], layout: DetectorLayout) -> dict[str, Tensor]:
    """Return a detector's tensors under the original names; what is not behind the prefix keeps its name."""
    inner = {key: tensor for key, tensor in state.items() if key.startswith(layout.prefix)}
    outer = {key: tensor for key, tensor in state.items() if key not in inner}
    inner = {key.removeprefix(layout.prefix): tensor for key, tensor in inner.items()}
    if layout.names != "original":
        inner = _from_huggingface(inner, deformable=is_deformable(state))
    if layout.resnet == "detectron2":  # facebookresearch/detr's wrapper for it
        inner = {re.sub(r"^backbone\.0\.backbone\.", _BODY, key): t for key, t in inner.items()}
    return to_torchvision(inner, layout.resnet) | outer


def from_original(state: Mapping[str, Tensor], layout: DetectorLayout) -> dict[str, Tensor]:
    """Return a detector's tensors under the names of a layout; the inverse of `to_original`."""
    resnet = {key: tensor for key, tensor in state.items() if key.startswith(_BODY)}
    rest = {key: tensor for key, tensor in state.items() if key not in resnet}
    # The names of a stem and of blocks occur in transformers too, so only the backbone is renamed.
    renamed = from_torchvision(resnet, layout.resnet)
    if layout.resnet == "detectron2":
        renamed = {key.replace(_BODY, "backbone.0.backbone.", 1): tensor for key, tensor in renamed.items()}
    inner = rest | renamed
    if layout.names != "original":
        inner = _to_huggingface(inner, deformable=is_deformable(state), in_memory=layout.names == "huggingface_modules")
    return {layout.prefix + key: tensor for key, tensor in inner.items()}


def is_deformable(keys: Iterable[str]) -> bool:
    """Return whether a detector's keys are those of Deformable DETR."""
    return any(key.endswith("sampling_offsets.weight") for key in keys)


_BODY = "backbone.0.body."
_CONDITIONAL = re.compile(r"\.decoder\.layers\.0\..*q(|_|uery_)content_proj\.")
"""Attention with projections of their own for content and position. Source: arXiv 2108.06152."""
_LAYER = re.compile(r"(?:model|transformer)\.(encoder|decoder)\.layers\.\d+\.")


def _from_huggingface(state: Mapping[str, Tensor], *, deformable: bool) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    projections: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name = _name_from_huggingface(key, deformable=deformable)
        m = re.match(r"(.+_attn\.)([qkv])_proj\.(weight|bias)$", name)
        if m:
            projections.setdefault(f"{m[1]}in_proj_{m[3]}", {})[m[2]] = tensor
        else:
            renamed[name] = tensor
    for name, parts in projections.items():
        if set(parts) != set("qkv"):
            raise WeightsError(f"weights lack a projection | where: key={name} | got {sorted(parts)} expected q, k, v")
        renamed[name] = torch.cat([parts[part] for part in "qkv"])
    return renamed


def _to_huggingface(state: Mapping[str, Tensor], *, deformable: bool, in_memory: bool) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        m = re.match(r"(.+_attn\.)in_proj_(weight|bias)$", key)
        parts = {f"{m[1]}{part}_proj.{m[2]}": t for part, t in zip("qkv", tensor.chunk(3), strict=True)} if m else {}
        for name, part in (parts or {key: tensor}).items():
            renamed[_name_to_huggingface(name, deformable=deformable, in_memory=in_memory)] = part
    return renamed


def _name_from_huggingface(key: str, *, deformable: bool) -> str:
    start, transformer, rest = _split(key)
    pairs = [(their, ours) for ours, theirs in _names(deformable, transformer) for their in theirs]
    return start.replace("model.", "transformer.", 1) + _rename(rest, pairs)


def _name_to_huggingface(key: str, *, deformable: bool, in_memory: bool) -> str:
    start, transformer, rest = _split(key)
    pairs = [(ours, theirs[-1 if in_memory else 0]) for ours, theirs in _names(deformable, transformer)]
    return start.replace("transformer.", "model.", 1) + _rename(rest, pairs)


def _split(key: str) -> tuple[str, str | None, str]:
    """Return what names a layer of a transformer, of which transformer it is, and the name within it."""
    layer = _LAYER.match(key)
    return ("", None, key) if layer is None else (layer[0], layer[1], key.removeprefix(layer[0]))


def _names(deformable: bool, transformer: str | None) -> list[tuple[str, tuple[str, ...]]]:
    """Return what original names begin with, and what stands for it in transformers: the first that fits counts.

    Of several names in transformers, the first is that of its files and the last that of its modules.

    Args:
        deformable: of Deformable DETR.
        transformer: within a layer of the "encoder" or "decoder"; None outside of them.
    """
    if transformer is None:
        names: list[tuple[str, tuple[str, ...]]] = [
            (_BODY, ("model.backbone.conv_encoder.model.", "model.backbone.model.")),
            ("query_embed.", ("model.query_position_embeddings.",)),
            ("transformer.encoder.norm.", ("model.encoder.layernorm.",)),
            ("transformer.decoder.norm.", ("model.decoder.layernorm.",)),
        ]
        for ours, theirs in (("row_embed.", "row_embeddings."), ("col_embed.", "column_embeddings.")):
            now, before_version_5 = f"model.position_embedding.{theirs}", f"model.backbone.position_embedding.{theirs}"
            names.append((f"backbone.1.{ours}", (now, before_version_5, now)))
        if deformable:
            names.append(("input_proj.", ("model.input_proj.",)))
        else:
            names += [
                ("input_proj.", ("model.input_projection.",)),
                ("class_embed.", ("class_labels_classifier.",)),
                ("bbox_embed.", ("bbox_predictor.",)),
            ]
        return [*names, ("transformer.", ("model.",))]
    cross = "cross_attn." if deformable else "multihead_attn."
    norms = ["self_attn_layer_norm."]
    if transformer == "decoder":  # Deformable DETR numbers the norm behind cross-attention first
        norms.insert(0 if deformable else 1, "encoder_attn_layer_norm.")
    return [
        ("linear1.", ("fc1.", "mlp.fc1.")),
        ("linear2.", ("fc2.", "mlp.fc2.")),
        ("self_attn.out_proj.", ("self_attn.out_proj.", "self_attn.o_proj.")),
        (f"{cross}out_proj.", ("encoder_attn.out_proj.", "encoder_attn.o_proj.")),
        (cross, ("encoder_attn.",)),
        *((f"norm{number}.", (norm,)) for number, norm in enumerate([*norms, "final_layer_norm."], start=1)),
    ]


def _rename(key: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key
