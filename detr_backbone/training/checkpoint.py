"""Checkpoints: all that a run needs to go on, and that a prediction needs to name what it sees."""

import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from detr_backbone.coco.categories import different_categories
from detr_backbone.errors import CheckpointError
from detr_backbone.training.config import TrainConfig, config_to_dict, flat
from detr_backbone.weights.hub import PREFIX
from detr_backbone.weights.read import fault_of_file, reason_of

MAY_CHANGE = (
    *("resume", "output_dir", "eval_every", "optimizer.epochs", "early_stopping", "data.num_workers", "data.timeout"),
    *("data.train.images", "data.train.annotations", "data.val.images", "data.val.annotations", "data.eval_backend"),
    *("checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "trackers", "log_every", "collective_timeout"),
    "strategy",
    *("data.batch_size", "optimizer.accumulate_steps"),  # as long as their product with the processes stays
    *("dry_run", "overfit", "replay"),
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a run after any step. What is random needs no state: it follows from seed and step.

    Attributes:
        model: the detector's state dict, under the published keys.
        average: the state dict of the averaged detector, where `ema_decay` asks for one.
        optimizer, schedule: their state dicts.
        step: optimiser steps that are done.
        epoch: whole epochs that are done.
        images_per_step: images that one step takes over all processes.
        seconds: that the run took so far, over all its parts.
        losses: sums of the losses of the epoch so far.
        rows: the rows of `metrics.csv`, one per epoch.
        threshold: score from which detections have the best F1 on the validation split, as last evaluated.
        data: the hash of each split.
        config: the resolved configuration, as `config_to_dict` gives it.
        category_ids, category_names: the dataset's id and name of each label.
    """

    model: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None = None
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    step: int
    epoch: int
    images_per_step: int
    seconds: float
    losses: Mapping[str, Any]
    rows: Sequence[Mapping[str, float]]
    threshold: float | None
    data: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any]
    category_ids: tuple[int, ...]
    category_names: tuple[str, ...]

    @property
    def categories(self) -> dict[int, str]:
        """Category id -> name, in the order of the labels."""
        return dict(zip(self.category_ids, self.category_names, strict=True))


KEYS = tuple(entry.name for entry in fields(Checkpoint))


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint; at every moment `path` holds either the old one or the new one, whole.

    Raises:
        CheckpointError: the file cannot be written, as where the disk is full; nothing of it stays.
    """
    temporary = path.with_suffix(".partial")
    try:
        with temporary.open("wb") as file:
            torch.save({key: getattr(checkpoint, key) for key in KEYS}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError where the file could not be written
        temporary.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) and error.__context__ else error
        need, free = checkpoint_bytes(checkpoint), shutil.disk_usage(path.parent).free
        raise CheckpointError(
            f"checkpoint cannot be written | where: file={path} | got {cause} expected {need:,} bytes "
            f"of space, {free:,} are free | fix: make room; what stood there before is whole"
        ) from error


def checkpoint_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of a checkpoint's tensors, which are nearly all of its file."""
    stack: list[Any] = [checkpoint.model, checkpoint.average, checkpoint.optimizer]
    total = 0
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            total += value.nbytes
        elif isinstance(value, Mapping):
            stack += value.values()
    return total


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint of `save_checkpoint`, on the CPU, running no code that the file might hold.

    The checksum of every part of the file is compared first: torch would load a flipped bit as another weight.

    Raises:
        CheckpointError: the file does not exist, is damaged, or is no such checkpoint.
    """
    content = load_saved(path, "checkpoint", fix="copy the file again, or take an older checkpoint of its run")
    missing = [key for key in KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise CheckpointError(
            f"checkpoint lacks {', '.join(missing)} | where: file={path} | fix: give a checkpoint that training wrote"
        )
    return Checkpoint(**{key: content[key] for key in KEYS})


def load_saved(path: Path | str, what: str, *, fix: str) -> Any:
    """Return the plain content of a file that training wrote, on the CPU.

    Args:
        path: the file.
        what: the file is, for the error.
        fix: of a file that is damaged.

    Raises:
        CheckpointError: the file does not exist, or is damaged.
    """
    if not Path(path).is_file():
        raise CheckpointError(
            f"{what} cannot be read | where: file={path} | got no such file | fix: give the path of an existing file"
        )
    try:
        fault = fault_of_file(Path(path))
        content = None if fault else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds, few of which name the file
        fault = reason_of(error)
    if fault:
        raise CheckpointError(f"{what} cannot be read | where: file={path} | got {fault} | fix: {fix}") from None
    return content


def is_published(path: Path | str) -> bool:
    """Return whether this is no checkpoint of a run, but a detector from elsewhere: a name, a folder or another file.

    Nothing is loaded. What does not exist, or is a damaged archive, counts as a checkpoint, whose error says so.
    """
    if not Path(path).is_file():
        return Path(path).is_dir() or not Path(path).suffix or str(path).startswith((PREFIX, "https://"))
    with Path(path).open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return True
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    except (zipfile.BadZipFile, OSError, EOFError):
        return False
    return not any(b"images_per_step" in pickle for pickle in pickles)


def refuse_another_run(
    checkpoint: Checkpoint,
    config: TrainConfig,
    categories: Mapping[int, str],
    *,
    data: Mapping[str, str],
    images_per_step: int,
) -> None:
    """Refuse to continue a run with other settings, data or categories; it may become longer, or report otherwise.

    Args:
        checkpoint: of the run.
        config: what is asked for now.
        categories: id and name of each label of the data.
        data: the hash of each split.
        images_per_step: images that one step takes now, over all processes; the schedule and the order of the images
            count in such steps.

    Raises:
        CheckpointError: naming the first difference.
    """
    defaults = dict(flat(config_to_dict(TrainConfig())))  # of options that came after the checkpoint
    saved, asked = defaults | dict(flat(checkpoint.config)), dict(flat(config_to_dict(config)))
    for key in sorted(saved.keys() | asked.keys()):
        if key not in MAY_CHANGE and saved.get(key) != asked.get(key):
            raise CheckpointError(
                f"a resumed run keeps its settings | where: key={key} | got {asked.get(key)!r} expected "
                f"{saved.get(key)!r} as in the checkpoint | fix: take its value, or start a run of its own"
            )
    if categories != checkpoint.categories:
        got, expected = different_categories(categories, checkpoint.categories)
        raise CheckpointError(f"a resumed run keeps its categories | got {got} expected {expected}")
    for split, sha256 in data.items():
        if checkpoint.data.get(split, sha256) != sha256:
            raise CheckpointError(
                f"a resumed run keeps its data | where: key=data.{split} file={asked[f'data.{split}.annotations']} | "
                f"got sha256 {sha256[:12]} expected {checkpoint.data[split][:12]} | fix: restore the annotation file, "
                "or start a run of its own"
            )
    if images_per_step != checkpoint.images_per_step:
        raise CheckpointError(
            f"a resumed run keeps its images per step | where: key=data.batch_size | got {images_per_step} over all "
            f"processes expected {checkpoint.images_per_step} | fix: data.batch_size x optimizer.accumulate_steps x "
            "processes must be that number"
        )


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> None:
    """Continue from a checkpoint: weights, optimiser and schedule.

    Raises:
        CheckpointError: it belongs to another detector, or its optimiser does.
    """
    _load_state(model, checkpoint.model)
    try:
        optimizer.load_state_dict(dict(checkpoint.optimizer))
    except ValueError as error:
        raise CheckpointError(f"checkpoint holds another optimiser | where: key=optimizer | got {error}") from None
    for parameter, state in optimizer.state.items():  # which torch compares in the first step only
        shapes = [list(value.shape) for value in state.values() if isinstance(value, Tensor) and value.ndim]
        if any(shape != list(parameter.shape) for shape in shapes):
            raise CheckpointError(
                f"checkpoint holds another optimiser | where: key=optimizer | got a moment of {shapes[0]} expected "
                f"{list(parameter.shape)}"
            )
    schedule.load_state_dict(dict(checkpoint.schedule))


def load_model(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Load the detector of a checkpoint for use, every tensor of it: the averaged one where there is one.

    Raises:
        CheckpointError: it belongs to another detector, or is not finite; the message names the first difference.
    """
    _load_state(model, checkpoint.model if checkpoint.average is None else checkpoint.average)


def _load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise CheckpointError(f"checkpoint holds NaN or infinity | where: key={bad[0]} | got it in {len(bad)} tensors")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first, *others = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        more = f" and {len(others)} more differences" if others else ""
        raise CheckpointError(f"checkpoint is of another detector | got {first[:200]}{more}") from error
