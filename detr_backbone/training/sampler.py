"""Which images make the batches of an epoch, and what is random in them: both follow from numbers, not from a state.

One order of all images holds for every process. It is cut into as many images as one step of all processes takes, and
each process takes its part of them. So a run goes on in the middle of an epoch, with other workers or with other
processes, as if it had never stopped: nothing needs to be replayed, and no state of a generator needs to be saved.

A batch is as high as its highest image and as wide as its widest; the rest is padding, which costs as much time as
pixels do. A wide image beside a tall one is the most expensive pair, so images of similar shape belong together.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

ORDER, IMAGE, STEP = range(3)  # what a number is drawn for


class Draw(NamedTuple):
    """One image of a batch.

    Attributes:
        image: its index in the dataset.
        seed: of its transforms.
    """

    image: int
    seed: int


class EpochBatches(Sampler[list[Draw]]):
    """The batches of one process in one epoch, from any batch on; `start` says of which.

    With `ratios`, images of similar shape share a batch. The order is cut into stretches of `STRETCH` steps. Each is
    sorted by aspect ratio and cut into steps, and the steps of all stretches are shuffled. So an epoch has the same
    images as without, of every shape from its beginning to its end, and an image has other company in every epoch. The
    idea, with fixed groups instead of stretches, is that of torchvision's reference code for detection
    (references/detection/group_by_aspect_ratio.py).

    Args:
        images: number of images in the dataset.
        batch_size: images per batch and process.
        seed: of the run.
        world_size: number of processes.
        rank: number of this process.
        ratios: height / width of each image, where images of similar shape share a batch.
    """

    STRETCH = 20  # steps; longer stretches save 3 % of the pixels at most, for shapes as in COCO

    def __init__(
        self,
        images: int,
        batch_size: int,
        *,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
        ratios: npt.NDArray[np.float64] | None = None,
    ) -> None:
        self.batch_size = batch_size
        self._images, self._seed, self._ratios = images, seed, ratios
        self._world_size, self._rank = world_size, rank
        self._epoch = self._first = 0

    def start(self, epoch: int, *, batch: int = 0) -> None:
        """Choose the epoch that the next iteration gives, and the batch in it that comes first."""
        self._epoch, self._first = epoch, batch

    @property
    def per_epoch(self) -> int:
        """Batches of this process in a whole epoch; images that fill no step of all processes are left out."""
        return self._images // (self.batch_size * self._world_size)

    def __len__(self) -> int:
        return self.per_epoch - self._first

    def __iter__(self) -> Iterator[list[Draw]]:
        mine = slice(self._rank * self.batch_size, (self._rank + 1) * self.batch_size)
        for indices in self._steps()[self._first :, mine].tolist():
            yield [Draw(index, derive_seed(IMAGE, self._seed, self._epoch, index)) for index in indices]

    def _steps(self) -> npt.NDArray[np.int64]:
        """Return the images of every step of all processes, [per_epoch, images per step]."""
        generator = torch.Generator().manual_seed(derive_seed(ORDER, self._seed, self._epoch))
        size = self.batch_size * self._world_size
        order = torch.randperm(self._images, generator=generator).numpy()[: self.per_epoch * size]
        if self._ratios is not None:
            length = self.STRETCH * size
            stretches = [order[start : start + length] for start in range(0, len(order), length)]
            order = np.concatenate([part[self._ratios[part].argsort(kind="stable")] for part in stretches])
            shuffled = torch.randperm(self.per_epoch, generator=generator).numpy()
            return order.reshape(-1, size)[shuffled]
        return order.reshape(-1, size)


def seed_step(seed: int, step: int, batch: int, rank: int) -> None:
    """Let what the model draws in training, as for dropout, follow from the run's seed and the place in it alone.

    Args:
        seed: of the run.
        step: number of the optimiser step.
        batch: number of the batch within the step.
        rank: number of the process.
    """
    torch.manual_seed(derive_seed(STEP, seed, step, batch, rank))


def derive_seed(*numbers: int) -> int:
    """Return a seed of 63 bits that depends on all numbers, and differs where one of them does.

    >>> derive_seed(1, 2) == derive_seed(1, 2), derive_seed(1, 2) == derive_seed(2, 1)
    (True, False)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
