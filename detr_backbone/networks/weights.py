"""Pretrained weights: found, checked, loaded completely, and reported.

Nothing stays random in silence: every tensor of the network comes from the file, or loading is an error.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from detr_backbone.errors import WeightsError, unknown_name
from detr_backbone.networks.input_channels import adapt_input_weight, first_convolution


@dataclass(frozen=True, kw_only=True)
class WeightsReport:
    """What was loaded from where: the file, its SHA-256, tensors loaded, and keys of the file that were left out."""

    source: Path
    sha256: str
    loaded: int
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        left_out = f"; left out {', '.join(self.left_out)}" if self.left_out else ""
        return f"loaded {self.loaded} tensors from {self.source} (SHA-256 {self.sha256[:16]}…){left_out}"


def load_weights(body: nn.Module, weights: str, *, name: str) -> WeightsReport:
    """Load all of `body` from a torchvision weights name or from a file.

    The first convolution of a network of N input channels takes weights of 3 as `adapt_input_weight` adapts them. The
    count of batches that BatchNorm has seen may be missing.

    A file may hold the tensors directly or under "model" or "state_dict", and every key of the network may stand behind
    one common prefix, as in a detector's checkpoint (`backbone.0.body.`).

    Args:
        body: the network; it takes every one of its parameters and buffers from the file.
        weights: the name of one of torchvision's weights of this network, such as "IMAGENET1K_V1", which is downloaded
            once into torch.hub's folder; or the path of a local file.
        name: the network's name in torchvision; weights of another network, such as timm/NAME, are a local file.

    Raises:
        WeightsError: the name or file does not exist, the download failed, the file's hash is not the published one,
            it holds code, it lacks tensors of the network, or its values are impossible (NaN, negative variance).
    """
    path = _find(weights, name)
    state = _read(path)
    own = {key: tensor for key, tensor in body.state_dict().items() if not key.endswith("num_batches_tracked")}
    prefix = _common_prefix(path, state, own)
    tensors = {key: state[prefix + key] for key in own}
    first = f"{first_convolution(body)[0]}.weight"
    in_channels = own[first].shape[1]
    if in_channels != tensors[first].shape[1] == 3:
        tensors[first] = adapt_input_weight(tensors[first], in_channels)
    for key, tensor in tensors.items():
        _check_tensor(path, prefix + key, tensor, own[key])
    body.load_state_dict(tensors)
    used = {prefix + key for key in own}
    # A checkpoint of a whole detector leaves out hundreds of keys: name the parts, not every tensor.
    rest = sorted(
        {".".join(key.split(".")[:2]) for key in state if key not in used and "num_batches_tracked" not in key}
    )
    return WeightsReport(source=path, sha256=_sha256(path), loaded=len(tensors), left_out=tuple(rest))


def rename_in_order(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a weights file under the keys of a network that holds the same ones in the same order.

    Libraries name the layers of one architecture differently, and mostly build them in the same order. Every tensor is
    checked for its shape and for the last part of its key, such as "running_var"; what the file holds after the last
    of them, such as a classifier, is left out.

    Args:
        path: the file; it may hold the tensors directly or under "model" or "state_dict".
        own: the network's state.

    Raises:
        WeightsError: the file cannot be read, or a tensor is not the one at its place in the network.
    """
    state = _read(path)
    renamed: dict[str, Tensor] = {}
    for (key, tensor), (own_key, own_tensor) in zip(state.items(), own.items(), strict=False):
        same = key.rpartition(".")[2] == own_key.rpartition(".")[2] and tensor.shape == own_tensor.shape
        if not same:
            raise WeightsError(
                f"weights in another order | where: file={path} key={key} | got {list(tensor.shape)} | expected "
                f"{own_key} {list(own_tensor.shape)}"
            )
        renamed[own_key] = tensor
    if len(renamed) < len(own):
        raise WeightsError(f"weights lack tensors | where: file={path} | got {len(renamed)} | expected {len(own)}")
    return renamed


def download(url: str, folder: Path) -> Path:
    """A weights file from the network, once, checked on every use against the hash that its name carries.

    Args:
        url: of a file named `NAME-HASH.EXT`, HASH being the first 8 or more hexadecimal digits of its SHA-256.
        folder: where the file is kept; one that is there already is not downloaded again.

    Raises:
        WeightsError: the file cannot be had, or has another hash; no damaged file is left behind by a download.
    """
    path = folder / url.rsplit("/", 1)[-1]
    match = re.fullmatch(r".+-([0-9a-f]{8,64})\.\w+", path.name)
    if match is None:
        raise WeightsError(f"a weights file must be named NAME-HASH.EXT to be checked, got {url}")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=match[1], progress=False)
        except (URLError, OSError, RuntimeError) as error:
            raise WeightsError(
                f"weights cannot be downloaded | where: url={url} | got {error} | "
                f"fix: fetch the file by other means and put it at {path}"
            ) from error
    if not _sha256(path).startswith(match[1]):
        raise WeightsError(
            f"weights file is damaged | where: file={path} | got SHA-256 {_sha256(path)} expected {match[1]}… | "
            "fix: delete the file and run again"
        )
    return path


def _find(weights: str, name: str) -> Path:
    from torchvision.models import get_model_weights

    path = Path(weights)
    if path.is_file():
        return path
    if path.suffix or "/" in name:
        allowed = "an existing file" if "/" in name else "an existing file or a torchvision name"
        raise WeightsError(f"`weights` of {name} must be {allowed}, got {weights}")
    known = [member.name for member in get_model_weights(name)]
    if weights not in known:
        raise WeightsError(f"`weights` of {name} must be a file or a torchvision name: {unknown_name(weights, known)}")
    return download(get_model_weights(name)[weights].url, Path(torch.hub.get_dir()) / "checkpoints")


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise a dozen kinds, few of which name the file
        raise WeightsError(f"weights cannot be read | where: file={path} | got {error}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise WeightsError(f"weights must be a mapping of names to tensors | where: file={path} | got {type(content)}")
    return dict(content)


def _common_prefix(path: Path, state: Mapping[str, Any], own: Mapping[str, Tensor]) -> str:
    """The one prefix behind which `state` holds every key of `own`."""
    keys = list(own)
    prefixes = {key.removesuffix(end) for key in state for end in (keys[0], keys[-1]) if f".{key}".endswith(f".{end}")}
    missing = {prefix: [key for key in keys if prefix + key not in state] for prefix in prefixes}
    complete = [prefix for prefix in sorted(prefixes) if not missing[prefix]]
    if len(complete) == 1:
        return complete[0]
    if complete:
        raise WeightsError(f"weights must hold the network once | where: file={path} | got it under {complete}")
    best = min(prefixes, key=lambda prefix: len(missing[prefix]), default="")
    lacked = missing.get(best, keys)
    raise WeightsError(
        f"weights lack {len(lacked)} of {len(keys)} tensors | where: file={path} prefix={best!r} key={lacked[0]} | "
        f"got keys such as {next(iter(state), None)!r} | fix: is this file of the same network?"
    )


def _check_tensor(path: Path, key: str, tensor: Tensor, own: Tensor) -> None:
    where = f"where: file={path} key={key}"
    if tensor.shape != own.shape:
        raise WeightsError(f"weights of another shape | {where} | got {list(tensor.shape)} expected {list(own.shape)}")
    if not tensor.isfinite().all():
        raise WeightsError(f"weights must be finite | {where} | got NaN or infinity")
    if key.endswith("running_var") and (tensor < 0).any():
        raise WeightsError(f"a variance must not be negative | {where} | got {tensor.min().item():g}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
