"""The origin of numbers: command, commit, versions, device and data."""

import hashlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from detr_backbone.coco.annotations import CocoAnnotations
from detr_backbone.coco.subset import image_ids_sha256

_LIBRARIES = ("detr_backbone", "torch", "torchvision", "numpy", "pycocotools")
_PACKAGE = Path(__file__).parents[1]


def origin(
    annotations: CocoAnnotations, image_ids: Sequence[int], *, device: torch.device | None = None
) -> dict[str, str]:
    """Return the origin of numbers as text by name; `-` for what is unknown.

    Args:
        annotations: the ground truth; the SHA-256 of its file is stated.
        image_ids: of the images that count; see `image_ids_sha256`.
        device: where the detector ran; None for detections from a file.
    """
    file = Path(annotations.source)
    return {
        "Made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Command": shlex.join(["python", *sys.argv]),
        "Commit": _commit(),
        "Versions": ", ".join([f"Python {platform.python_version()}", *map(_version, _LIBRARIES)]),
        "Device": "-" if device is None else _device(device),
        "Annotations": annotations.source,
        "Images": annotations.part or "all",
        "SHA-256 of the annotations": hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "-",
        "SHA-256 of the image ids": image_ids_sha256(image_ids),
    }


def _version(library: str) -> str:
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:  # run from a checkout that is not installed
        return f"{library} -"


def _commit() -> str:
    """Return the commit of the checkout of this code, and whether it was changed since."""
    if not _git("ls-files", "__init__.py"):  # installed, perhaps somewhere inside of another checkout
        return "-"
    commit = _git("rev-parse", "HEAD") or "-"
    return f"{commit}, with changes" if _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*words: str) -> str:
    """Return the output of git in the package's folder; empty without git or checkout."""
    try:
        answer = subprocess.run(["git", "-C", str(_PACKAGE), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.stdout.strip()


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({_processor()}, {torch.get_num_threads()} threads)"


def _processor() -> str:
    """Return the name of the processor on Linux, or else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
