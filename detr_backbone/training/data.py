"""The datasets and loaders of a run."""

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detr_backbone.coco.annotations import load_annotations
from detr_backbone.coco.dataset import CocoDetection, Target, collate
from detr_backbone.coco.findings import DataPolicies
from detr_backbone.coco.selection import SubsetConfig
from detr_backbone.coco.subset import take_subset
from detr_backbone.coco.transforms import TransformConfig, make_transforms
from detr_backbone.errors import ConfigError, DataError, DetrBackboneError
from detr_backbone.evaluation.evaluator import Backend
from detr_backbone.nested_tensor import NestedTensor
from detr_backbone.training.machine_faults import refuse_dead_worker
from detr_backbone.training.sampler import Draw, EpochBatches
from detr_backbone.training.signals import ignore_stop_signals

Sample: TypeAlias = tuple[Tensor, Target]
Batch: TypeAlias = tuple[NestedTensor, list[Target]]


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """One part of a dataset in COCO format.

    Args:
        images: the folder of the pictures.
        annotations: the JSON file.
        subset: which of its images; without any option, all of them.
    """

    images: str = ""
    annotations: str = ""
    subset: SubsetConfig = field(default_factory=SubsetConfig)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and what is evaluated.

    Args:
        train: the training split.
        val: the split that is evaluated; left out, the run trains without evaluating.
        policies: what is done about faults of the annotations that need not be refused.
        transforms: how pictures are resized, varied and normalised.
        batch_size: images per batch and process.
        pad_to_multiple_of: divides the sides of every batch; with `compile`, it bounds the number of sizes that are
            compiled.
        group_by_aspect_ratio: let images of similar shape share a batch in training, which leaves less padding but is
            not what the papers did. Evaluation always does so.
        num_workers: processes that read images; 0 reads them in the training process.
        timeout: seconds without a batch from the workers, as where storage stalls, that end a run; 0 waits for ever.
        eval_backend: what computes COCO's numbers: pycocotools, the reference, or this package's own matching, which
            gives the same to 1e-12 in a fraction of the time.
    """

    train: SplitConfig = field(default_factory=SplitConfig)
    val: SplitConfig = field(default_factory=SplitConfig)
    policies: DataPolicies = field(default_factory=DataPolicies)
    transforms: TransformConfig = field(default_factory=TransformConfig)
    batch_size: int = 2
    pad_to_multiple_of: int = 1
    group_by_aspect_ratio: bool = False
    num_workers: int = 2
    timeout: int = 0
    eval_backend: Backend = "pycocotools"

    def __post_init__(self) -> None:
        for key, least in (("batch_size", 1), ("num_workers", 0), ("pad_to_multiple_of", 1), ("timeout", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"`data.{key}` must be at least {least}, got {getattr(self, key)}")


def open_split(config: DataConfig, split: SplitConfig, *, train: bool) -> CocoDetection:
    """Open the dataset of one split or of its subset, with the transforms of training or of evaluation.

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
    """A DataLoader whose faults are one line each: which image, how long a stall, what ended a worker."""

    def __iter__(self) -> Generator[Batch, None, None]:  # type: ignore[override]
        last = "none"
        try:
            for batch in super().__iter__():
                if isinstance(batch, DetrBackboneError):
                    raise batch
                last = f"image_id={[target['image_id'] for target in batch[1]]}"
                yield batch
        except RuntimeError as error:
            if "timed out" in str(error):
                raise DataError(
                    f"no batch came in time | where: key=data.timeout, the last batch was {last} | "
                    f"got none for {self.timeout:g} seconds | fix: look at the storage, or raise data.timeout"
                ) from error
            refuse_dead_worker(error)
            raise


def train_loader(
    dataset: CocoDetection, config: DataConfig, *, seed: int = 0, world_size: int = 1, rank: int = 0
) -> tuple[Loader, EpochBatches]:
    """Return a loader of whole batches in random order, and what chooses them: its `start` sets epoch and batch.

    Raises:
        DataError: there are fewer images than processes.
    """
    if len(dataset) < world_size:
        raise DataError(
            f"dataset has fewer images than there are processes | where: file={dataset.annotations.source} | "
            f"got {len(dataset)} images expected at least {world_size}"
        )
    batches = EpochBatches(
        len(dataset),
        min(config.batch_size, len(dataset) // world_size),  # a tiny dataset is one small batch
        seed=seed,
        world_size=world_size,
        rank=rank,
        ratios=_aspect_ratios(dataset) if config.group_by_aspect_ratio else None,
    )
    return _loader(_Drawn(dataset), config, batch_sampler=batches), batches


def eval_loader(dataset: CocoDetection, config: DataConfig, *, world_size: int = 1, rank: int = 0) -> Loader:
    """Return a loader of every image once, by aspect ratio; each process takes every `world_size`-th one.

    With exact padding a detection does not depend on who shares its batch, so the order is free, and this one has the
    least padding. With the padding of the original code every order has numbers of its own.
    """
    order = _aspect_ratios(dataset).argsort(kind="stable").tolist()
    mine = [Draw(index, 0) for index in order[rank::world_size]]
    batches = [mine[i : i + config.batch_size] for i in range(0, len(mine), config.batch_size)]
    return _loader(_Drawn(dataset), config, batch_sampler=batches)


class _Drawn(Dataset[Sample | DetrBackboneError]):
    """The samples of a dataset by `Draw`: with transforms that follow from its seed, and faults as what they are.

    A fault that is raised in a worker comes out with the worker's traceback in its message; one that is returned
    does not.
    """

    def __init__(self, dataset: CocoDetection) -> None:
        self._dataset = dataset

    def __getitem__(self, draw: Draw) -> Sample | DetrBackboneError:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw.seed)
            try:
                image, target = self._dataset[draw.image]
            except DetrBackboneError as error:
                return error
        if not image.isfinite().all():
            return DataError(f"picture has pixels that are NaN or infinite | where: image_id={target['image_id']}")
        return image, target


def _loader(dataset: _Drawn, config: DataConfig, *, batch_sampler: Any) -> Loader:
    return Loader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=config.num_workers,
        timeout=config.timeout if config.num_workers else 0,
        collate_fn=partial(_collate, pad_to_multiple_of=config.pad_to_multiple_of),
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),  # what it draws decides nothing; without one, it would draw from the model's
    )


def _collate(samples: Sequence[Sample | DetrBackboneError], *, pad_to_multiple_of: int) -> Batch | DetrBackboneError:
    whole = [sample for sample in samples if not isinstance(sample, DetrBackboneError)]
    for sample in samples:
        if isinstance(sample, DetrBackboneError):
            return sample
    return collate(whole, pad_to_multiple_of=pad_to_multiple_of)


def content_sha256(dataset: CocoDetection) -> str:
    """Return the hash of what is trained on, pixels aside: images, sizes, categories, boxes, whatever their order in
    the file, its path, and the fields that no detector reads.
    """
    annotations = dataset.annotations
    digest = hashlib.sha256(repr((annotations.category_ids, annotations.category_names)).encode())
    digest.update("\n".join(annotations.file_names.tolist()).encode("utf-8", "surrogatepass"))
    integers = (annotations.image_ids, annotations.sizes, annotations.image_index, annotations.labels)
    for array in (*integers, annotations.is_crowd, annotations.boxes):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _aspect_ratios(dataset: CocoDetection) -> npt.NDArray[np.float64]:
    """Return height / width of each image."""
    heights, widths = dataset.annotations.sizes.T
    return heights / widths
