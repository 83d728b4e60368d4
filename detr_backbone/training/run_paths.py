"""Where the data of a run is, from any folder: its configuration names it relative to where the training ran."""

import logging
from dataclasses import replace
from pathlib import Path

from detr_backbone.training.data import SplitConfig

logger = logging.getLogger(__name__)


def find_split(split: SplitConfig, *, near: Path) -> SplitConfig:
    """Return a split whose paths lead to its files from the working folder, where they do not already.

    A path that does not exist here is looked for in each folder above a file of the run, the nearest first: a run in
    PROJECT/runs/NAME was started in PROJECT.

    Args:
        split: of the configuration of a run.
        near: a file of the run, its checkpoint or its configuration.
    """
    return replace(split, images=_find(split.images, near), annotations=_find(split.annotations, near))


def _find(path: str, near: Path) -> str:
    if not path or Path(path).is_absolute() or Path(path).exists():
        return path
    for folder in near.resolve().parents:
        if (folder / path).exists():
            logger.info("%s: %s", path, folder / path)
            return str(folder / path)
    return path
