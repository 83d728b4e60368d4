"""The folder of a run: one run at a time, checked before any work, and the checkpoints in it."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from detr_backbone.errors import CheckpointError, ConfigError
from detr_backbone.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

CHECKPOINT = "checkpoint.pt"
BEST = "checkpoint_best.pt"
METRICS = "metrics.csv"
CURVES = "curves.png"
_LOCK = ".lock"


class RunFolder:
    """The checkpoints of a run: the newest, a few before it, and the one of the best AP.

    Args:
        path: the folder.
        keep: newest checkpoints that are kept; the one before `checkpoint.pt` is `checkpoint_1.pt`.
    """

    def __init__(self, path: Path | str, *, keep: int) -> None:
        self.path = Path(path)
        self.newest = self.path / CHECKPOINT
        self._keep = keep
        self._step = -1  # of the newest checkpoint, as far as this process wrote it

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Hold the folder for one run, and make it where it is missing.

        Raises:
            ConfigError: it cannot be written into, or another run holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            lock = (self.path / _LOCK).open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"output folder cannot be written | where: key=output_dir file={self.path} | got {error.strerror} | "
                "fix: another --output_dir, or its permissions"
            ) from error
        with lock:
            if not _lock(lock):
                raise ConfigError(
                    f"another run writes into this folder | where: key=output_dir file={self.path} | fix: wait for it, "
                    "or another --output_dir"
                )
            for leftover in self.path.glob("*.partial"):
                leftover.unlink()  # of a run that was killed while it wrote
            try:
                yield
            finally:
                (self.path / _LOCK).unlink(missing_ok=True)

    def require_space(self, checkpoint: int) -> None:
        """Refuse to begin where the disk has no room for the checkpoints that a run writes.

        Args:
            checkpoint: bytes of one checkpoint.

        Raises:
            ConfigError: naming the folder, the bytes needed, and the bytes free.
        """
        free, need = shutil.disk_usage(self.path).free, 2 * checkpoint
        if free < need:
            raise ConfigError(
                f"disk has no room for two checkpoints | where: key=output_dir file={self.path} | got {free:,} bytes "
                f"free expected {need:,} | fix: make room, or another --output_dir"
            )

    def files(self) -> list[Path]:
        """Return the checkpoints that stand in the folder, newest first; the best one, which may be old, last."""
        older = (self.path / f"checkpoint_{index}.pt" for index in range(1, 1000))
        present = [self.newest] if self.newest.exists() else []
        for file in older:
            if not file.exists():
                break
            present.append(file)
        return present + ([self.path / BEST] if (self.path / BEST).exists() else [])

    def newest_valid(self) -> tuple[Checkpoint, list[str]]:
        """Return the newest checkpoint that is whole, and what is wrong with each that is newer.

        Raises:
            CheckpointError: there is none.
        """
        damaged: list[str] = []
        for file in self.files():
            try:
                return load_checkpoint(file), damaged
            except CheckpointError as error:
                damaged.append(str(error))
        raise CheckpointError(
            damaged[0]
            if damaged
            else f"checkpoint cannot be read | where: file={self.newest} | got no such file | fix: give the output_dir "
            "of a run, or leave out `resume`"
        )

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the newest checkpoint; those before it move on by one, unless it is only a later state of its step.

        Raises:
            CheckpointError: it cannot be written.
        """
        if checkpoint.step != self._step and self.newest.exists():
            for index in range(self._keep - 1, 1, -1):
                source = self.path / f"checkpoint_{index - 1}.pt"
                if source.exists():
                    source.replace(self.path / f"checkpoint_{index}.pt")
            if self._keep > 1:
                _keep_as(self.newest, self.path / "checkpoint_1.pt")
        save_checkpoint(checkpoint, self.newest)
        self._step = checkpoint.step

    def save_best(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint of the best AP.

        Raises:
            CheckpointError: it cannot be written.
        """
        save_checkpoint(checkpoint, self.path / BEST)


def _keep_as(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system has no links; the first name stays."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _lock(file: IO[str]) -> bool:
    """Lock a file until it is closed or the process ends, however it ends; return whether nobody else holds it."""
    try:
        import fcntl
    except ImportError:  # pragma: no cover - Windows has no such locks, and its users no such protection
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), Path(file.name).stat())
    except OSError:  # another run holds it, or has just removed it
        return False
