"""Pretrained weights of a network, loaded completely and reported.

Nothing stays random in silence: every tensor of the network comes from the file, or loading is an error; and a file of
another network, which holds more blocks than this one, is an error too.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from detr_backbone.errors import WeightsError
from detr_backbone.networks.build import build_network
from detr_backbone.networks.input_channels import adapt_input_weight, first_convolution
from detr_backbone.weights.locate import MeanStd, locate_weights
from detr_backbone.weights.read import read_weights
from detr_backbone.weights.resnet_keys import find_layout, to_torchvision

COUNTER = "num_batches_tracked"
"""What BatchNorm counts and frozen BatchNorm does not; it may be missing and may be left over."""
CLASSIFIERS = ("fc", "classifier")
"""What most networks call their classifier, which no backbone has."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class WeightsReport:
    """What was loaded from where.

    Attributes:
        source: the file.
        sha256: of its bytes.
        layout: whose names it uses: "torchvision" (also timm's, mmdetection's, DETR's), "detectron2", "huggingface" or
            "presnet".
        inside: the keys of the file and the prefix of the names behind which the network stood, such as
            "model.backbone.0.body"; "" where it stood alone.
        loaded: the number of tensors.
        left_out: parts of the file that are not of this network.
        mean_std: mean and std of the images that the weights were trained with, where known.
    """

    source: Path
    sha256: str
    layout: str
    inside: str
    loaded: int
    left_out: tuple[str, ...]
    mean_std: MeanStd | None

    def __str__(self) -> str:
        inside = f" under {self.inside}" if self.inside else ""
        left_out = f"; left out {', '.join(self.left_out)}" if self.left_out else ""
        mean_std = f"; mean {list(self.mean_std[0])}, std {list(self.mean_std[1])}" if self.mean_std else ""
        origin = f"{self.source} (SHA-256 {self.sha256[:16]}…, {self.layout} names{inside})"
        return f"loaded {self.loaded} tensors from {origin}{mean_std}{left_out}"


def load_weights(body: nn.Module, weights: str, *, name: str) -> WeightsReport:
    """Load all of `body` from a file, which is downloaded where `weights` is the name of published weights.

    The file may be a whole detector's, of any layout of `resnet_keys`; every key of the network must stand behind one
    common prefix, as in `backbone.0.body.`. The first convolution of a network of N input channels takes weights of 3
    as `adapt_input_weight` adapts them. The count of batches that BatchNorm has seen may be missing.

    Args:
        body: the network; it takes every one of its parameters and buffers from the file.
        weights: as `locate_weights` takes it.
        name: the network, as `build_network` takes it.

    Raises:
        WeightsError: there are no such weights, the download failed, the file is damaged or holds code, it lacks
            tensors of the network or has blocks that the network has not, a tensor has another shape or dtype, or its
            values are impossible (NaN, infinity, negative variance).
    """
    located = locate_weights(weights, name=name)
    file = read_weights(located.path)
    layout = find_layout(file.tensors)
    state = to_torchvision(file.tensors, layout)
    own = {key: tensor for key, tensor in body.state_dict().items() if not key.endswith(COUNTER)}
    prefix = _common_prefix(file.path, state, own)
    rest = [key for key in state if not key.endswith(COUNTER) and key.removeprefix(prefix) not in own]
    inner = [key.removeprefix(prefix) for key in rest if key.startswith(prefix)]
    _refuse_another_network(file.path, prefix, inner, name)
    tensors = {key: state[prefix + key] for key in own}
    first = f"{first_convolution(body)[0]}.weight"
    in_channels = own[first].shape[1]
    if in_channels != 3 and tensors[first].dim() == 4 and tensors[first].shape[1] == 3:
        check_tensor(file.path, prefix + first, tensors[first])
        tensors[first] = adapt_input_weight(tensors[first], in_channels)
    for key, tensor in tensors.items():
        check_tensor(file.path, prefix + key, tensor, own[key])
    body.load_state_dict(tensors)
    return WeightsReport(
        source=file.path,
        sha256=file.sha256,
        layout=layout,
        inside=".".join(part for part in (file.inside, prefix.removesuffix(".")) if part),
        loaded=len(tensors),
        left_out=parts_of(rest),
        mean_std=located.mean_std,
    )


def check_tensor(path: Path, key: str, tensor: Tensor, own: Tensor | None = None) -> None:
    """Raise a WeightsError where a tensor of a file cannot be a network's, or cannot be `own`, for which it stands."""
    where = f"where: file={path} key={key}"
    if own is not None and tensor.shape != own.shape:
        raise WeightsError(f"weights of another shape | {where} | got {list(tensor.shape)} expected {list(own.shape)}")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise WeightsError(f"weights must be dense tensors | {where} | got {tensor.layout} on {tensor.device}")
    if own is not None and not own.is_floating_point():
        if tensor.dtype != own.dtype:
            raise WeightsError(f"weights of another dtype | {where} | got {tensor.dtype} expected {own.dtype}")
        return
    if tensor.dtype not in FLOATS:
        expected = [str(dtype) for dtype in FLOATS]
        raise WeightsError(f"weights of another dtype | {where} | got {tensor.dtype} expected one of {expected}")
    if not tensor.isfinite().all():
        raise WeightsError(f"weights must be finite | {where} | got NaN or infinity")
    if key.endswith("running_var") and (tensor < 0).any():
        raise WeightsError(f"a variance must not be negative | {where} | got {tensor.min().item():g}")


def parts_of(keys: Iterable[str]) -> tuple[str, ...]:
    """Return the parts that keys belong to: a detector has hundreds of keys, and few parts.

    >>> parts_of(["fc.weight", "fc.bias", "layer1.2.conv1.weight", "layer1.2.bn1.weight"])
    ('fc.bias', 'fc.weight', 'layer1.2')
    """
    return tuple(sorted({".".join(key.split(".")[:2]) for key in keys}))


def _common_prefix(path: Path, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The one prefix behind which `state` holds every key of `own`."""
    keys = list(own)
    prefixes = {key.removesuffix(end) for key in state for end in (keys[0], keys[-1]) if f".{key}".endswith(f".{end}")}
    missing = {prefix: [key for key in keys if prefix + key not in state] for prefix in prefixes}
    complete = [prefix for prefix in sorted(prefixes) if not missing[prefix]]
    if len(complete) == 1:
        return complete[0]
    if complete:
        raise WeightsError(
            f"weights must hold the network once | where: file={path} | got it under {complete} | fix: keep one"
        )
    best = min(prefixes, key=lambda prefix: len(missing[prefix]), default="")
    lacked = missing.get(best, keys)
    raise WeightsError(
        f"weights lack {len(lacked)} of {len(keys)} tensors | where: file={path} prefix={best!r} key={lacked[0]} | "
        f"got keys such as {next(iter(state), None)!r} | fix: is this file of the same network?"
    )


def _refuse_another_network(path: Path, prefix: str, inner: Collection[str], name: str) -> None:
    """Raise where keys left over are of parts that the network has: of blocks that a deeper one would have."""
    if all(key.partition(".")[0] in CLASSIFIERS for key in inner):
        return
    network = build_network(name)  # whole, with the stages after the last level
    known, children = set(network.state_dict()), {child for child, _ in network.named_children()}
    classifier = getattr(network, "pretrained_cfg", {}).get("classifier") or ()  # timm builds networks without it
    heads = {classifier} if isinstance(classifier, str) else set(classifier)
    foreign = [
        key
        for key in inner
        if key not in known
        and key.partition(".")[0] in children
        and not any(f"{key}.".startswith(f"{head}.") for head in heads)
    ]
    if foreign:
        raise WeightsError(
            f"weights of another network | where: file={path} key={prefix}{foreign[0]} | got {len(foreign)} tensors "
            f"that {name} has not, in {', '.join(parts_of(foreign)[:5])} | fix: is this file of a deeper network?"
        )
