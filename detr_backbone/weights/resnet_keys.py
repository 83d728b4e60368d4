"""What libraries call the layers of a ResNet: torchvision's names, and back.

torchvision's names are also those of timm, mmdetection and facebookresearch/detr, each behind a prefix of its own.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from torch import Tensor

ResNetLayout = Literal["torchvision", "detectron2", "huggingface", "presnet"]

_SIGNS: dict[ResNetLayout, re.Pattern[str]] = {
    "presnet": re.compile(r"(^|\.)(conv1\.conv1_1\.conv|res_layers\.0\.blocks\.0\.branch2a\.conv)\.weight$"),
    "detectron2": re.compile(r"(^|\.)(stem\.conv1|res2\.0\.conv1)\.weight$"),
    "huggingface": re.compile(r"(^|\.)embedder\.embedder\.convolution\.weight$"),
}
"""One key that each layout has and no other."""


def find_layout(keys: Iterable[str]) -> ResNetLayout:
    """Return the layout that the keys of a ResNet show; "torchvision" where they show no other.

    >>> find_layout(["backbone.bottom_up.res2.0.conv1.weight"])
    'detectron2'
    """
    for key in keys:
        for layout, sign in _SIGNS.items():
            if sign.search(key):
                return layout
    return "torchvision"


def to_torchvision(state: Mapping[str, Tensor], layout: ResNetLayout) -> dict[str, Tensor]:
    """Return the tensors of a ResNet under torchvision's names; keys of anything else stay, and prefixes too.

    RT-DETR's PResNet (`presnet`) is timm's ResNet-D, whose names are given.
    """
    return {_TO[layout](key): tensor for key, tensor in state.items()}


def from_torchvision(state: Mapping[str, Tensor], layout: ResNetLayout) -> dict[str, Tensor]:
    """Return the tensors of a ResNet under the names of a layout; the inverse of `to_torchvision`."""
    return {_FROM[layout](key): tensor for key, tensor in state.items()}


def _same(key: str) -> str:
    return key


# Prefixes end in a dot or are empty; `(?P<tail>.*)` is the name of the tensor.
_BLOCK = re.compile(
    r"^(?P<head>|.*\.)layer(?P<s>[1-4])\.(?P<b>\d+)\.(?P<kind>conv|bn|downsample\.)(?P<n>\d)\.(?P<tail>.*)$"
)
_STEM = re.compile(
    r"^(?P<head>|.*\.)(?P<kind>conv1|bn1)\.(?P<tail>weight|bias|running_mean|running_var|num_batches_tracked)$"
)


def _from_detectron2(key: str) -> str:
    m = re.match(r"^(|.*\.)stem\.conv1\.(norm\.)?(\w+)$", key)
    if m:
        return f"{m[1]}{'bn1' if m[2] else 'conv1'}.{m[3]}"
    m = re.match(r"^(|.*\.)res([2-5])\.(\d+)\.(?:conv(\d)|shortcut)\.(norm\.)?(\w+)$", key)
    if m is None:
        return key
    head, stage, block, number, norm, tail = m.groups()
    leaf = f"{'bn' if norm else 'conv'}{number}" if number else f"downsample.{1 if norm else 0}"
    return f"{head}layer{int(stage) - 1}.{block}.{leaf}.{tail}"


def _to_detectron2(key: str) -> str:
    m = _BLOCK.match(key)
    if m:
        is_norm = m["kind"] == "bn" or (m["kind"], m["n"]) == ("downsample.", "1")
        leaf = "shortcut" if m["kind"] == "downsample." else f"conv{m['n']}"
        return f"{m['head']}res{int(m['s']) + 1}.{m['b']}.{leaf}.{'norm.' if is_norm else ''}{m['tail']}"
    m = _STEM.match(key)
    return f"{m['head']}stem.conv1.{'norm.' if m['kind'] == 'bn1' else ''}{m['tail']}" if m else key


def _from_huggingface(key: str) -> str:
    m = re.match(r"^(|.*\.)embedder\.embedder\.(convolution|normalization)\.(\w+)$", key)
    if m:
        return f"{m[1]}{'conv1' if m[2] == 'convolution' else 'bn1'}.{m[3]}"
    m = re.match(
        r"^(|.*\.)encoder\.stages\.(\d)\.layers\.(\d+)\.(?:shortcut|layer\.(\d))\.(convolution|normalization)\.(\w+)$",
        key,
    )
    if m is None:
        return key
    head, stage, block, number, kind, tail = m.groups()
    is_norm = kind == "normalization"
    leaf = f"downsample.{int(is_norm)}" if number is None else f"{'bn' if is_norm else 'conv'}{int(number) + 1}"
    return f"{head}layer{int(stage) + 1}.{block}.{leaf}.{tail}"


def _to_huggingface(key: str) -> str:
    m = _BLOCK.match(key)
    if m:
        is_norm = m["kind"] == "bn" or (m["kind"], m["n"]) == ("downsample.", "1")
        kind = "normalization" if is_norm else "convolution"
        leaf = "shortcut" if m["kind"] == "downsample." else f"layer.{int(m['n']) - 1}"
        return f"{m['head']}encoder.stages.{int(m['s']) - 1}.layers.{m['b']}.{leaf}.{kind}.{m['tail']}"
    m = _STEM.match(key)
    if m is None:
        return key
    return f"{m['head']}embedder.embedder.{'convolution' if m['kind'] == 'conv1' else 'normalization'}.{m['tail']}"


_PRESNET_STEM = {
    "conv1_1.conv": "conv1.0",
    "conv1_1.norm": "conv1.1",
    "conv1_2.conv": "conv1.3",
    "conv1_2.norm": "conv1.4",
    "conv1_3.conv": "conv1.6",
    "conv1_3.norm": "bn1",
}


def _from_presnet(key: str) -> str:
    m = re.match(r"^(|.*\.)conv1\.(conv1_[123]\.(?:conv|norm))\.(\w+)$", key)
    if m:
        return f"{m[1]}{_PRESNET_STEM[m[2]]}.{m[3]}"
    m = re.match(
        r"^(|.*\.)res_layers\.(\d)\.blocks\.(\d+)\.(?:branch2([abc])|short(?:\.conv)?)\.(conv|norm)\.(\w+)$", key
    )
    if m is None:
        return key
    head, stage, block, branch, kind, tail = m.groups()
    is_norm = kind == "norm"
    # timm keeps a pooling, or nothing, at index 0 of the shortcut.
    leaf = f"{'bn' if is_norm else 'conv'}{'abc'.index(branch) + 1}" if branch else f"downsample.{1 + is_norm}"
    return f"{head}layer{int(stage) + 1}.{block}.{leaf}.{tail}"


def _to_presnet(key: str) -> str:
    m = _BLOCK.match(key)
    if m:
        stage = int(m["s"]) - 1
        is_norm = m["kind"] == "bn" or (m["kind"], m["n"]) == ("downsample.", "2")
        leaf = f"branch2{'abc'[int(m['n']) - 1]}"
        if m["kind"] == "downsample.":
            leaf = "short.conv" if stage else "short"  # the first stage has no stride, so no pooling before it
        return f"{m['head']}res_layers.{stage}.blocks.{m['b']}.{leaf}.{'norm' if is_norm else 'conv'}.{m['tail']}"
    for theirs, ours in _PRESNET_STEM.items():
        m = re.match(rf"^(|.*\.){re.escape(ours)}\.(\w+)$", key)
        if m:
            return f"{m[1]}conv1.{theirs}.{m[2]}"
    return key


_TO: dict[ResNetLayout, Callable[[str], str]] = {
    "torchvision": _same,
    "detectron2": _from_detectron2,
    "huggingface": _from_huggingface,
    "presnet": _from_presnet,
}
_FROM: dict[ResNetLayout, Callable[[str], str]] = {
    "torchvision": _same,
    "detectron2": _to_detectron2,
    "huggingface": _to_huggingface,
    "presnet": _to_presnet,
}
