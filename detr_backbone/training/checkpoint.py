"""Checkpoints: all that a run needs to go on, and that a prediction needs to name what it sees."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from detr_backbone.errors import CheckpointError
from detr_backbone.training.config import TrainConfig, config_to_dict, flat

MAY_CHANGE = ("resume", "output_dir", "eval_every", "optimizer.epochs", "data.num_workers")
KEYS = ("model", "optimizer", "schedule", "epoch", "config", "category_ids", "category_names")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a run after a whole number of epochs.

    Attributes:
        model: the detector's state dict, under the published keys.
        optimizer, schedule: their state dicts.
        epoch: epochs that are done.
        config: the resolved configuration, as `config_to_dict` gives it.
        category_ids, category_names: the dataset's id and name of each label.
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    schedule: Mapping[str, Any]
    epoch: int
    config: Mapping[str, Any]
    category_ids: tuple[int, ...]
    category_names: tuple[str, ...]

    @property
    def categories(self) -> dict[int, str]:
        """Category id -> name, in the order of the labels."""
        return dict(zip(self.category_ids, self.category_names, strict=True))


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint; at every moment `path` holds either the old one or the new one, whole."""
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        torch.save({key: getattr(checkpoint, key) for key in KEYS}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint of `save_checkpoint`, on the CPU, running no code that the file might hold.

    Raises:
        CheckpointError: the file does not exist, is damaged, or is no such checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds, few of which name the file
        raise CheckpointError(f"checkpoint cannot be read | where: file={path} | got {error}") from error
    missing = [key for key in KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise CheckpointError(f"checkpoint lacks {', '.join(missing)} | where: file={path} | fix: was it saved here?")
    return Checkpoint(**{key: content[key] for key in KEYS})


def refuse_another_run(checkpoint: Checkpoint, config: TrainConfig, categories: Mapping[int, str]) -> None:
    """Refuse to continue a run with other settings or other categories; it may only become longer, or report otherwise.

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
        raise CheckpointError(f"a resumed run keeps its categories | got {categories} expected {checkpoint.categories}")


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> None:
    """Continue from a checkpoint: weights, optimiser and schedule.

    Raises:
        CheckpointError: it belongs to another detector.
    """
    load_model(checkpoint, model)
    optimizer.load_state_dict(dict(checkpoint.optimizer))
    schedule.load_state_dict(dict(checkpoint.schedule))


def load_model(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Load the detector of a checkpoint, every tensor of it.

    Raises:
        CheckpointError: it belongs to another detector; the message names the first difference.
    """
    try:
        model.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        first, *others = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        more = f" and {len(others)} more differences" if others else ""
        raise CheckpointError(f"checkpoint is of another detector | got {first[:200]}{more}") from error
