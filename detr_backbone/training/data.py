"""Datasets and loaders of a run, and which images share a batch.

A batch is as high as its highest image and as wide as its widest; the rest is padding, which costs as much time as
pixels do. A wide image beside a tall one is the most expensive pair, so images of similar shape belong together.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler, Subset

from detr_backbone.coco.annotations import load_annotations
from detr_backbone.coco.dataset import CocoDetection, Target, collate
from detr_backbone.coco.subset import take_subset
from detr_backbone.coco.transforms import make_transforms
from detr_backbone.errors import ConfigError, DataError
from detr_backbone.nested_tensor import NestedTensor
from detr_backbone.training.config import DataConfig, SplitConfig

Batch: TypeAlias = tuple[NestedTensor, list[Target]]


def open_split(config: DataConfig, split: SplitConfig, *, train: bool) -> CocoDetection:
    """The dataset of one split or of its subset, with the transforms of training or of evaluation.

    Raises:
        ConfigError: the split is not configured, or its subset cannot be taken.
        AnnotationError, DataError: the dataset contradicts itself, or files are missing.
    """
    name = "train" if train else "val"
    if not (split.images and split.annotations):
        raise ConfigError(f"`data.{name}.images` and `data.{name}.annotations` must be set, got {split}")
    annotations = take_subset(load_annotations(split.annotations, policies=config.policies), split.subset)
    transforms = make_transforms(config.transforms, train=train)
    return CocoDetection(split.images, annotations, transforms=transforms, policies=config.policies)


class Loader(DataLoader[Any]):
    """A DataLoader that says after which images it stalled."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        last = "none"
        try:
            for images, targets in super().__iter__():
                last = f"image_id={[target['image_id'] for target in targets]}"
                yield images, targets
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            raise DataError(
                f"no batch came in time | where: key=data.timeout, the last batch was {last} | "
                f"got none for {self.timeout:g} seconds | fix: look at the storage, or raise data.timeout"
            ) from error


class AspectRatioBatches(BatchSampler):
    """Whole batches of images of similar shape, out of the images that a sampler gives.

    The sampler's order is cut into stretches of `STRETCH` batches. Each stretch is sorted by aspect ratio and cut into
    batches, and the batches of all stretches are shuffled. So an epoch has the same images as without, of every shape
    from its beginning to its end, and an image has other company in every epoch.

    The idea, with fixed groups instead of stretches, is that of torchvision's reference code for detection
    (references/detection/group_by_aspect_ratio.py).

    Args:
        sampler: gives indices in a random order.
        batch_size: images per batch; what is left over at the end of the sampler's order is dropped.
        ratios: height / width of each image of the dataset.
        generator: draws the order of the batches.
    """

    STRETCH = 20  # batches; longer stretches save 3 % of the pixels at most, for shapes as in COCO

    def __init__(
        self, sampler: Sampler[int], batch_size: int, *, ratios: npt.NDArray[np.float64], generator: torch.Generator
    ) -> None:
        super().__init__(sampler, batch_size, drop_last=True)
        self._ratios = ratios
        self._generator = generator

    def __iter__(self) -> Iterator[list[int]]:
        order = np.fromiter(self.sampler, dtype=np.int64)[: len(self) * self.batch_size]
        length = self.STRETCH * self.batch_size
        stretches = (order[start : start + length] for start in range(0, len(order), length))
        batches = [
            batch.tolist()
            for stretch in stretches
            for batch in stretch[self._ratios[stretch].argsort(kind="stable")].reshape(-1, self.batch_size)
        ]
        for place in torch.randperm(len(batches), generator=self._generator).tolist():
            yield batches[place]


def train_loader(
    dataset: CocoDetection, config: DataConfig, *, seed: int = 0, world_size: int = 1, rank: int = 0
) -> Loader:
    """Whole batches in a random order that `seed_epoch` sets; each process takes another part."""
    generator = torch.Generator()
    sampler: Sampler[int] = RandomSampler(dataset, generator=generator)
    if world_size > 1:
        sampler = DistributedSampler(dataset, num_replicas=world_size, rank=rank, seed=seed)
    batch_size = min(config.batch_size, max(1, len(dataset) // world_size))  # a tiny dataset is one small batch
    batches = BatchSampler(sampler, batch_size, drop_last=True)
    if config.group_by_aspect_ratio:
        batches = AspectRatioBatches(sampler, batch_size, ratios=_aspect_ratios(dataset), generator=generator)
    # Workers are started anew for every epoch: persistent ones would go on with the random numbers of the last epoch,
    # and `seed_epoch` could not repeat the transforms.
    return Loader(
        dataset,
        batch_sampler=batches,
        num_workers=config.num_workers,
        timeout=config.timeout if config.num_workers else 0,
        collate_fn=partial(collate, pad_to_multiple_of=config.pad_to_multiple_of),
        pin_memory=torch.cuda.is_available(),
        generator=generator,
    )


def seed_epoch(loader: Loader, seed: int, epoch: int, *, rank: int = 0) -> None:
    """Let all that is random in the next epoch follow from seed and epoch alone, so that a resumed run repeats it.

    That is the order of the images, their transforms, and dropout, which differs from process to process.
    """
    assert loader.generator is not None
    number = (seed * 1_000_003 + epoch) * 1_009 + rank
    loader.generator.manual_seed(number)
    torch.manual_seed(number)
    if isinstance(loader.batch_sampler, BatchSampler) and isinstance(loader.batch_sampler.sampler, DistributedSampler):
        loader.batch_sampler.sampler.set_epoch(epoch)


def eval_loader(dataset: CocoDetection, config: DataConfig, *, world_size: int = 1, rank: int = 0) -> Loader:
    """Every image once, in the order of their aspect ratios; each process takes every `world_size`-th one.

    With exact padding a detection does not depend on who shares its batch, so the order is free, and this one has the
    least padding. With the padding of the original code every order has numbers of its own.
    """
    order = _aspect_ratios(dataset).argsort(kind="stable").tolist()
    return Loader(
        Subset(dataset, order[rank::world_size]),
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        timeout=config.timeout if config.num_workers else 0,
        collate_fn=partial(collate, pad_to_multiple_of=config.pad_to_multiple_of),
        pin_memory=torch.cuda.is_available(),
    )


def _aspect_ratios(dataset: CocoDetection) -> npt.NDArray[np.float64]:
    """Height / width of each image."""
    heights, widths = dataset.annotations.sizes.T
    return heights / widths
