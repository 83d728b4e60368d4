"""What the machine could not give: memory, or a process that reads images. One line each, with what to change."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from detr_backbone.coco.dataset import Target
from detr_backbone.errors import ResourceError
from detr_backbone.nested_tensor import NestedTensor

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
_DEAD_WORKER = ("killed by signal", "exited unexpectedly", "Unexpected bus error", "unable to mmap", "unable to write")


@contextmanager
def explain_memory(images: NestedTensor, targets: Sequence[Target]) -> Iterator[None]:
    """Turn torch's error of memory into one that names the batch.

    Raises:
        ResourceError: memory ran out within the context.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not _says(error, _OUT_OF_MEMORY):
            raise
        raise ResourceError(
            f"out of memory | where: image_id={[target['image_id'] for target in targets]} | got a batch of "
            f"{list(images.tensors.shape)} on {images.tensors.device} and {sum(len(t['labels']) for t in targets)} "
            "boxes | fix: lower data.batch_size (and raise optimizer.accumulate_steps), data.transforms.max_size or "
            "scales, or name backbone.checkpointed_layers"
        ) from error


def refuse_dead_worker(error: RuntimeError) -> None:
    """Say what ended a process that reads images, if that is what an error is about.

    Raises:
        ResourceError: a worker of a DataLoader died.
    """
    if not _says(error, _DEAD_WORKER):
        return
    shared = Path("/dev/shm")
    free = f" ({shutil.disk_usage(shared).free / 2**20:,.0f} MiB are free)" if shared.is_dir() else ""
    first = str(error).splitlines()[0]
    raise ResourceError(
        f"a process that reads images ended | where: key=data.num_workers | got {first} | fix: the system ends it "
        f"where memory runs out, or /dev/shm{free}: lower data.num_workers or data.batch_size, or enlarge /dev/shm"
    ) from error


def _says(error: BaseException, words: Sequence[str]) -> bool:
    return any(word in str(error) for word in words)
