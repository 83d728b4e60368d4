"""The two splits of a run, held against each other and against the configuration."""

from dataclasses import replace

from detr_backbone.coco.annotations import refuse
from detr_backbone.coco.categories import different_categories
from detr_backbone.coco.dataset import CocoDetection
from detr_backbone.coco.findings import KINDS
from detr_backbone.coco.rules import more_boxes_than_queries
from detr_backbone.coco.subset import image_ids_sha256
from detr_backbone.errors import ConfigError
from detr_backbone.training.config import TrainConfig
from detr_backbone.training.data import SplitConfig, content_sha256, open_split


def open_splits(config: TrainConfig) -> tuple[CocoDetection, CocoDetection | None]:
    """Open the training split, and the validation split where one is set, with the policies of the configuration.

    Raises:
        ConfigError: a split is set by half.
        AnnotationError, DataError: a dataset contradicts itself, or files are missing.
    """
    train_set = open_split(config.data, config.data.train, train=True)
    crowded = more_boxes_than_queries(
        train_set.boxes_per_image,
        train_set.image_ids,
        config.detector.num_queries,
        f"file={train_set.annotations.source}",
    )
    refuse(crowded, config.data.policies)
    train_set.findings |= {one.kind: one.count for one in crowded}
    if config.data.val == SplitConfig():
        return train_set, None
    return train_set, open_split(config.data, config.data.val, train=False)


def resolve_classes(config: TrainConfig, train_set: CocoDetection, val_set: CocoDetection | None) -> TrainConfig:
    """Return the configuration with the number of classes that the data has.

    Raises:
        ConfigError: the splits have other categories, or the configuration another number.
    """
    if val_set is not None and train_set.categories != val_set.categories:
        got, expected = different_categories(val_set.categories, train_set.categories)
        raise ConfigError(
            f"`data.val` must have the categories of `data.train` | where: file={val_set.annotations.source} "
            f"key=categories | got {got} expected {expected} | fix: {KINDS['category_mismatch'].fix}"
        )
    asked = config.detector.num_classes
    if asked not in (None, train_set.num_classes):
        raise ConfigError(f"`detector.num_classes` must be null or {train_set.num_classes} as in the data, got {asked}")
    return replace(config, detector=replace(config.detector, num_classes=train_set.num_classes))


def describe_dataset(dataset: CocoDetection, config: TrainConfig) -> str:
    """Return the number of images of a dataset and the faults of its annotations that were let through."""
    done = {"drop": " dropped", "clamp": " clipped", "crowd": " taken as crowds"}
    notes = [
        f"{KINDS[kind].what}: {count}{done.get(config.data.policies.action(kind), '')}"
        for kind, count in dataset.findings.items()
    ]
    return (dataset.annotations.part or f"{len(dataset)} images") + (f" ({'; '.join(notes)})" if notes else "")


def identify_data(train_set: CocoDetection, val_set: CocoDetection | None) -> dict[str, str]:
    """Return the hash of each split: of its images, categories and boxes; empty for a split that is not there."""
    return {"train": content_sha256(train_set), "val": "" if val_set is None else content_sha256(val_set)}


def describe_images(train_set: CocoDetection, val_set: CocoDetection | None) -> list[str]:
    """Return one line per split that identifies its images, for a comparison with other runs."""
    return [
        f"data.{split}: {len(dataset)} images, ids sha256 {image_ids_sha256(dataset.image_ids)}"
        for split, dataset in (("train", train_set), ("val", val_set))
        if dataset is not None
    ]
