"""Datasets and loaders of a run."""

from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, Sampler, Subset

from detr_backbone.coco.dataset import CocoDetection, Target, collate
from detr_backbone.coco.transforms import make_transforms
from detr_backbone.errors import ConfigError
from detr_backbone.nested_tensor import NestedTensor
from detr_backbone.training.config import DataConfig, SplitConfig

Batch: TypeAlias = tuple[NestedTensor, list[Target]]
Loader: TypeAlias = DataLoader[Any]  # of samples, which it collates to a Batch


def open_split(config: DataConfig, split: SplitConfig, *, train: bool) -> CocoDetection:
    """The dataset of one split, with the transforms of training or of evaluation.

    Raises:
        ConfigError: the split is not configured.
        AnnotationError, DataError: the dataset contradicts itself, or files are missing.
    """
    name = "train" if train else "val"
    if not (split.images and split.annotations):
        raise ConfigError(f"`data.{name}.images` and `data.{name}.annotations` must be set, got {split}")
    transforms = make_transforms(config.transforms, train=train)
    return CocoDetection(split.images, split.annotations, transforms=transforms, policies=config.policies)


def train_loader(
    dataset: CocoDetection, config: DataConfig, *, seed: int = 0, world_size: int = 1, rank: int = 0
) -> Loader:
    """Whole batches in a random order that `seed_epoch` sets; each process takes another part."""
    generator = torch.Generator()
    sampler: Sampler[int] = RandomSampler(dataset, generator=generator)
    if world_size > 1:
        sampler = DistributedSampler(dataset, num_replicas=world_size, rank=rank, seed=seed)
    return DataLoader(
        dataset,
        batch_size=min(config.batch_size, max(1, len(dataset) // world_size)),  # a tiny dataset is one small batch
        sampler=sampler,
        num_workers=config.num_workers,
        collate_fn=collate,
        drop_last=True,
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
    if isinstance(loader.sampler, DistributedSampler):
        loader.sampler.set_epoch(epoch)


def eval_loader(dataset: CocoDetection, config: DataConfig, *, world_size: int = 1, rank: int = 0) -> Loader:
    """Every image once, each process every `world_size`-th one."""
    part = Subset(dataset, range(rank, len(dataset), world_size))
    return DataLoader(
        part,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )
