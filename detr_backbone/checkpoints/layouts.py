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
class Layout:
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


def find_detector_layout(keys: Iterable[str]) -> Layout:
    """Return the layout that a detector's keys show.

    Raises:
        WeightsError: they are not those of DETR or Deformable DETR in a layout that is known.

    >>> str(find_detector_layout(["detr.transformer.encoder.layers.0.norm1.bias"]))
    "original names behind 'detr.', torchvision backbone"
    """
    keys = list(keys)
    for key in keys:
        m = re.match(r"(|.*?\.)(transformer|model)\.encoder\.layers\.0\.", key)
        if m is None:
            continue
        names: Names = "original"
        if m[2] == "model":
            in_memory = any(".layers.0.mlp.fc1." in other for other in keys)
            names = "huggingface_modules" if in_memory else "huggingface"
        return Layout(names=names, resnet=find_layout(keys), prefix=m[1])
    raise WeightsError(
        f"weights must be of DETR or Deformable DETR, in the original names or those of transformers, got "
        f"{len(keys)} tensors such as {keys[0] if keys else None!r}"
    )


def to_original(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return a detector's tensors under the original names; what is not behind the prefix keeps its name."""
    inner = {key: tensor for key, tensor in state.items() if key.startswith(layout.prefix)}
    outer = {key: tensor for key, tensor in state.items() if key not in inner}
    inner = {key.removeprefix(layout.prefix): tensor for key, tensor in inner.items()}
    if layout.names != "original":
        inner = _from_huggingface(inner, deformable=is_deformable(state))
    if layout.resnet == "detectron2":  # facebookresearch/detr's wrapper for it
        inner = {re.sub(r"^backbone\.0\.backbone\.", "backbone.0.body.", key): t for key, t in inner.items()}
    return to_torchvision(inner, layout.resnet) | outer


def from_original(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return a detector's tensors under the names of a layout; the inverse of `to_original`."""
    body = "backbone.0.body."
    resnet = {key: tensor for key, tensor in state.items() if key.startswith(body)}
    rest = {key: tensor for key, tensor in state.items() if key not in resnet}
    # The names of a stem and of blocks occur in transformers too, so only the backbone is renamed.
    renamed = from_torchvision(resnet, layout.resnet)
    if layout.resnet == "detectron2":
        renamed = {key.replace(body, "backbone.0.backbone.", 1): tensor for key, tensor in renamed.items()}
    inner = rest | renamed
    if layout.names != "original":
        inner = _to_huggingface(inner, deformable=is_deformable(state), in_memory=layout.names == "huggingface_modules")
    return {layout.prefix + key: tensor for key, tensor in inner.items()}


def is_deformable(keys: Iterable[str]) -> bool:
    """Return whether a detector's keys are those of Deformable DETR."""
    return any(key.endswith("sampling_offsets.weight") for key in keys)


_NORMS = {
    # (deformable, which transformer) -> its norms in the order in which the original numbers them, from 1
    (False, "encoder"): ("self_attn_layer_norm", "final_layer_norm"),
    (True, "encoder"): ("self_attn_layer_norm", "final_layer_norm"),
    (False, "decoder"): ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    (True, "decoder"): ("encoder_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm"),
}
_LAYER = r"(encoder|decoder)\.layers\.(\d+)\."


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


def _name_from_huggingface(key: str, *, deformable: bool) -> str:
    key = re.sub(r"^model\.backbone\.(conv_encoder\.)?model\.", "backbone.0.body.", key)
    if key.startswith("backbone.0.body."):
        return key
    key = re.sub(r"^model\.(?:backbone\.)?position_embedding\.(row|column)_embeddings\.", _learned_position, key)
    if not deformable:
        key = re.sub(r"^class_labels_classifier\.", "class_embed.", key)
        key = re.sub(r"^bbox_predictor\.", "bbox_embed.", key)
        key = re.sub(r"^model\.input_projection\.", "input_proj.", key)
    key = re.sub(r"^model\.query_position_embeddings\.", "query_embed.", key)
    key = re.sub(r"^model\.input_proj\.", "input_proj.", key)
    key = re.sub(r"^model\.", "transformer.", key)
    key = re.sub(r"^transformer\.(encoder|decoder)\.layernorm\.", r"transformer.\1.norm.", key)
    m = re.match(rf"transformer\.{_LAYER}(.+)$", key)
    if m is None:
        return key
    which, layer, rest = m.groups()
    rest = re.sub(r"^(?:mlp\.)?fc([12])\.", r"linear\1.", rest)
    rest = re.sub(r"^encoder_attn\.", "cross_attn." if deformable else "multihead_attn.", rest)
    rest = rest.replace("_attn.o_proj.", "_attn.out_proj.")
    for number, norm in enumerate(_NORMS[deformable, which], start=1):
        rest = re.sub(rf"^{norm}\.", f"norm{number}.", rest)
    return f"transformer.{which}.layers.{layer}.{rest}"


def _learned_position(match: re.Match[str]) -> str:
    return "backbone.1.row_embed." if match[1] == "row" else "backbone.1.col_embed."


def _to_huggingface(state: Mapping[str, Tensor], *, deformable: bool, in_memory: bool) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        m = re.match(r"(.+_attn\.)in_proj_(weight|bias)$", key)
        parts = {f"{m[1]}{part}_proj.{m[2]}": t for part, t in zip("qkv", tensor.chunk(3), strict=True)} if m else {}
        for name, part in (parts or {key: tensor}).items():
            renamed[_name_to_huggingface(name, deformable=deformable, in_memory=in_memory)] = part
    return renamed


def _name_to_huggingface(key: str, *, deformable: bool, in_memory: bool) -> str:
    body = "backbone.0.body."
    if key.startswith(body):
        return f"model.backbone.{'' if in_memory else 'conv_encoder.'}model.{key.removeprefix(body)}"
    key = re.sub(r"^backbone\.1\.row_embed\.", "model.position_embedding.row_embeddings.", key)
    key = re.sub(r"^backbone\.1\.col_embed\.", "model.position_embedding.column_embeddings.", key)
    if not deformable:
        key = re.sub(r"^class_embed\.", "class_labels_classifier.", key)
        key = re.sub(r"^bbox_embed\.", "bbox_predictor.", key)
        key = re.sub(r"^input_proj\.", "model.input_projection.", key)
    key = re.sub(r"^query_embed\.", "model.query_position_embeddings.", key)
    key = re.sub(r"^input_proj\.", "model.input_proj.", key)
    key = re.sub(r"^transformer\.", "model.", key)
    key = re.sub(r"^model\.(encoder|decoder)\.norm\.", r"model.\1.layernorm.", key)
    m = re.match(rf"model\.{_LAYER}(.+)$", key)
    if m is None:
        return key
    which, layer, rest = m.groups()
    rest = re.sub(r"^linear([12])\.", r"mlp.fc\1." if in_memory else r"fc\1.", rest)
    rest = re.sub(r"^(cross_attn|multihead_attn)\.", "encoder_attn.", rest)
    if in_memory:
        rest = rest.replace("_attn.out_proj.", "_attn.o_proj.")
    for number, norm in enumerate(_NORMS[deformable, which], start=1):
        rest = re.sub(rf"^norm{number}\.", f"{norm}.", rest)
    return f"model.{which}.layers.{layer}.{rest}"
