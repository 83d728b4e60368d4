"""Weights files as people have them, read as data: no code that a file might hold is ever run."""

import argparse
import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from detr_backbone.errors import WeightsError

AVERAGED = ("average", "ema", "model_ema", "ema_state_dict", "ema_model", "ema_state", "teacher")
"""Where files keep averaged weights: what their authors evaluated, so it is read before `WRAPPERS`."""
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "student")
_WRAPPED_MODULES = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
"""What torch.compile, FSDP and activation checkpointing put into the keys of the modules they wrap."""
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What a folder that `save_pretrained` wrote may hold, the safest first."""
_PLAIN = (str, int, float, bool, type(None))
_FETCH = "fetch or copy the file again"
_SAVE = "give a file that holds what `model.state_dict()` returned"


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """The tensors of a weights file, and where they stood in it.

    Attributes:
        path: the file; an index where it is sharded.
        sha256: of the file's bytes; of an index and its shards, one after the other.
        inside: the keys that led to the tensors, such as "ema.module"; "" where the file holds them directly.
        tensors: name -> tensor as stored, wrappers such as `module.` and `_orig_mod.` taken off the names.
        extras: plain values saved beside them: `args` as a dict, `category_names`, `category_ids`, `config`.
    """

    path: Path
    sha256: str
    inside: str
    tensors: Mapping[str, Tensor]
    extras: Mapping[str, Any] = field(default_factory=dict)


def read_weights(path: Path | str) -> WeightsFile:
    """Return the tensors of a .pth, .pt, .bin or .safetensors file, of a sharded index, or of a folder of these.

    Besides tensors, a pickled file may hold what published checkpoints hold: an `argparse.Namespace`, paths and numpy
    scalars. They are let in for this one read, and dropped. Averaged weights are preferred where a file holds both.

    Raises:
        WeightsError: the file does not exist, is damaged or is something else, holds other objects, or no tensors; its
            SHA-256 is not the one that its name carries (NAME-HASH.EXT).
    """
    path = _file_in(Path(path))
    if path.name.endswith(".index.json"):
        content, sha256 = _read_shards(path)
    else:
        content, sha256 = _read_file(path), file_sha256(path)
        _check_name(path, sha256)
    inside, state = _find_tensors(path, content)
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    extras = _plain_values(content)
    return WeightsFile(path=path, sha256=sha256, inside=inside, tensors=_unwrap_names(tensors), extras=extras)


def read_index(index: Path) -> tuple[Mapping[str, str], list[str]]:
    """Return the shard of each tensor, and the shards, of a `.index.json` beside them.

    Raises:
        WeightsError: it cannot be read.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return weight_map, sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"weights index cannot be read | where: file={index} | got {_line(error)} | fix: {_FETCH}"
        ) from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_in(path: Path) -> Path:
    if path.is_dir():
        files = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not files:
            raise WeightsError(f"folder holds no weights | where: file={path} | expected one of {list(FOLDER_FILES)}")
        return files[0]
    if not path.is_file():
        raise WeightsError(f"weights file does not exist | where: file={path} | fix: give the path of an existing file")
    return path


def _read_file(path: Path) -> Any:
    if fault := fault_of_file(path):
        raise WeightsError(f"weights cannot be read | where: file={path} | got {fault} | fix: {_FETCH}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_harmless_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise a dozen kinds, few of which name the file
        foreign = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise WeightsError(
                f"weights cannot be read: the file holds objects that would run code | where: file={path} | got "
                f"{foreign[0]} expected tensors and plain values | fix: where the file was written, save "
                "`model.state_dict()` alone"
            ) from None  # torch's own message advises to run that code
        raise WeightsError(
            f"weights cannot be read: damaged file | where: file={path} | got {reason_of(error)} | fix: {_FETCH}"
        ) from None


def reason_of(error: Exception) -> str:
    """Return why a file could not be read as data, in a line, without torch's advice to run the code in it."""
    if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"{foreign[1]}, an object that would run code"
    return "bytes that torch.save does not write" if "weights_only" in str(error) else _line(error)


def fault_of_file(path: Path) -> str:
    """Return what a file is instead of one with tensors, as far as its bytes show it; empty where they show no fault.

    The checksum of every part of an archive is compared: torch would load a flipped bit as another weight.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "an empty file"
    if not head.strip(b"\0"):
        return "zeros, as of a file that was never written to its end"
    if head.lstrip().startswith(b"<"):
        return "a web page; a download that needs a login or a confirmation gives one"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; `git lfs pull` fetches the file itself"
    if path.suffix == ".safetensors":
        length = int.from_bytes(head[:8], "little")
        return f"{size} bytes, a header of {length}: a damaged or cut file" if length + 8 > size else ""
    if not head.startswith(b"PK"):
        return ""
    if not zipfile.is_zipfile(path):
        return f"{size} bytes without the end of the archive: a cut file"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        return f"another CRC-32 than recorded in {damaged}: damaged bytes" if damaged else ""
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        return f"a damaged archive: {_line(error)}"


def _harmless_globals() -> list[Any]:
    """Return what may stand in a checkpoint besides tensors: plain data of the standard library and of numpy."""
    import numpy as np

    allowed: list[Any] = [argparse.Namespace, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefdSU"}]
    for module in ("pathlib", "pathlib._local"):  # where Python 3.13 keeps them
        # A path of another system cannot be made, and none is needed: pure paths have no access to files.
        allowed += [(PurePosixPath, f"{module}.{kind}") for kind in ("PosixPath", "PurePosixPath")]
        allowed += [(PureWindowsPath, f"{module}.{kind}") for kind in ("WindowsPath", "PureWindowsPath")]
    make_scalar = np.float64(0).__reduce__()[0]
    return allowed + [(make_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


def _read_shards(index: Path) -> tuple[dict[str, Tensor], str]:
    weight_map, names = read_index(index)
    digest = hashlib.sha256(index.read_bytes())
    tensors: dict[str, Tensor] = {}
    for name in names:
        shard = index.parent / str(name)
        if Path(str(name)).name != name or not shard.is_file():
            raise WeightsError(f"weights shard is missing | where: file={index} | expected {name} beside it")
        tensors |= _read_file(shard)
        digest.update(bytes.fromhex(file_sha256(shard)))
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise WeightsError(f"weights shards lack {len(missing)} tensors | where: file={index} key={missing[0]}")
    return tensors, digest.hexdigest()


def _check_name(path: Path, sha256: str) -> None:
    match = re.search(r"-([0-9a-f]{8,64})\.\w+$", path.name)
    # Eight digits without a letter are as likely a date.
    if match and not match[1].isdigit() and not sha256.startswith(match[1]):
        raise WeightsError(
            f"weights file is damaged | where: file={path} | got SHA-256 {sha256[:16]}… expected {match[1]}… as in its "
            "name | fix: fetch it again, or rename a file that was changed on purpose"
        )


def _find_tensors(path: Path, content: Any, inside: tuple[str, ...] = ()) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"weights must be a mapping of names to tensors | where: file={path} | got {type(content).__name__} | "
            f"fix: {_SAVE}"
        )
    for wrapper in (*AVERAGED, *WRAPPERS):
        if isinstance(content.get(wrapper), Mapping):
            return _find_tensors(path, content[wrapper], (*inside, wrapper))
    if not any(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(
            f"weights file holds no tensors | where: file={path} | got keys {[str(key) for key in content][:8]} | "
            f"fix: {_SAVE}"
        )
    return ".".join(inside), {str(key): value for key, value in content.items()}


def _unwrap_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {_WRAPPED_MODULES.sub("", name).removeprefix("."): tensor for name, tensor in tensors.items()}
    tensors.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _plain_values(content: Any) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if isinstance(content, Mapping):
        for key in ("category_names", "category_ids", "config"):
            if isinstance(content.get(key), tuple | list | dict):
                extras[key] = content[key]
        args = content.get("args")
        if isinstance(args, argparse.Namespace | Mapping):
            values = vars(args) if isinstance(args, argparse.Namespace) else args
            extras["args"] = {str(key): value for key, value in values.items() if isinstance(value, _PLAIN)}
    return extras


def _line(error: BaseException) -> str:
    """Return the first line of an error, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or type(error).__name__
    return text.splitlines()[0][:200]
