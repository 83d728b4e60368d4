"""A trained detector for pictures and datasets, from whatever file holds it; as an exported file, and in int8."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detr_backbone.checkpoints.open import OpenedDetector
from detr_backbone.checkpoints.open import open_detector as open_published_detector
from detr_backbone.coco.dataset import CocoDetection
from detr_backbone.coco.subset import image_ids_sha256
from detr_backbone.coco.transforms import TransformConfig
from detr_backbone.detectors import build_postprocess
from detr_backbone.errors import ConfigError, EvaluationError, ExportError
from detr_backbone.evaluation.intervals import Difference, compare
from detr_backbone.export import (
    ENGINES,
    EngineName,
    EnginePrecision,
    ExportedDetector,
    ExportMetadata,
    ExportReport,
    export,
    load_exported,
    quantize,
)
from detr_backbone.training.checkpoint import is_published, load_checkpoint
from detr_backbone.training.config import TrainConfig, config_from_dict, config_to_dict, override_config
from detr_backbone.training.data import DataConfig
from detr_backbone.training.devices import build_accelerator
from detr_backbone.training.inference import detector_of, evaluate
from detr_backbone.training.normalisation import check_normalisation

logger = logging.getLogger(__name__)


def export_checkpoint(checkpoint: Path | str, path: Path | str, *, masks: bool = False) -> ExportReport:
    """Export the detector of a checkpoint with all that `predict` and `evaluate` need; see `export`.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ExportError: the detector cannot be exported.
    """
    loaded = load_checkpoint(checkpoint)
    model, config = detector_of(loaded)
    transforms = config.data.transforms
    return export(
        model,
        path,
        masks=masks,
        mean=transforms.mean,
        std=transforms.std,
        categories=loaded.categories,
        config=config_to_dict(config),
    )


def open_detector(
    path: Path | str,
    *,
    engine: EngineName | None = None,
    threads: int | None = None,
    precision: EnginePrecision = "float32",
    overrides: Sequence[str] = (),
) -> tuple[nn.Module, TrainConfig, Mapping[int, str]]:
    """Return a trained detector, its configuration, and category id -> name in the order of the labels.

    Warns where pictures would be normalised otherwise than in training, or in the pretraining of the backbone.

    Args:
        path: a checkpoint of a run; a file of `export_checkpoint`, which its ending tells; or a published detector, as
            `read_detector` takes it: a file of DETR, Deformable DETR or transformers, or a name such as detr_r50.
        engine: see `load_exported`; for exported files only, as are `threads` and `precision`.
        threads: see `load_exported`.
        precision: see `load_exported`.
        overrides: words of a command line that change the configuration; of an exported or a published
            one, all but its detector.

    Raises:
        CheckpointError, ExportError, WeightsError: the file cannot be used.
        ConfigError: an override or an option does not fit the file.
    """
    if Path(path).suffix not in ENGINES:
        if (engine, threads, precision) != (None, None, "float32"):
            raise ConfigError(
                f"`engine`, `threads` and `precision` are for exported files ({', '.join(ENGINES)}) | where: "
                f"file={path} | got {engine}, {threads}, {precision}"
            )
        if not is_published(path):
            loaded = load_checkpoint(path)
            model, config = detector_of(loaded, overrides=overrides)
            check_normalisation(config, trained=config_from_dict(loaded.config))
            return model, config, loaded.categories
        opened = open_published_detector(str(path))
        logger.info("%s", opened.report)
        published = _config_of(opened)
        config = _changed(published, overrides, path)
        check_normalisation(config, trained=published)
        return opened.model, config, opened.categories
    detector, exported = open_exported_detector(path, engine=engine, threads=threads, precision=precision)
    config = _changed(exported, overrides, path)
    check_normalisation(config, trained=exported)
    return detector, config, detector.metadata.categories


def _config_of(opened: OpenedDetector) -> TrainConfig:
    """The configuration in which a published detector predicts: images resized as DETR's, normalised as its weights."""
    transforms = TransformConfig()
    if opened.report.mean_std is None:
        logger.warning("%s", opened.report.compare_images(transforms.mean, transforms.std))
    else:
        mean, std = opened.report.mean_std
        transforms = config_from_dict({"data": {"transforms": {"mean": list(mean), "std": list(std)}}}).data.transforms
    return TrainConfig(detector=opened.config, data=DataConfig(transforms=transforms))


def _changed(config: TrainConfig, overrides: Sequence[str], path: Path | str) -> TrainConfig:
    changed = override_config(config, overrides)
    if changed.detector != config.detector:
        raise ConfigError(f"the detector of this file cannot be changed | where: file={path} key=detector")
    return changed


def open_exported_detector(
    path: Path | str,
    *,
    engine: EngineName | None = None,
    threads: int | None = None,
    precision: EnginePrecision = "float32",
) -> tuple[ExportedDetector, TrainConfig]:
    """Return a detector of `export_checkpoint` and the configuration that it was trained with.

    Its category ids and names stand in `detector.metadata.categories`. See `load_exported` for the arguments.

    Raises:
        ExportError: the file cannot be run, or is no detector with its configuration and categories.
        FileNotFoundError: there is no such file.
    """
    detector = load_exported(path, engine=engine, threads=threads, precision=precision)
    if not isinstance(detector, ExportedDetector):
        raise ExportError(f"file is no detector | where: file={path} key=kind | got a backbone expected a detector")
    for key in ("config", "categories"):
        if not getattr(detector.metadata, key):
            raise ExportError(
                f"file does not say what it detects | where: file={path} key={key} | got none | fix: export the "
                "checkpoint, or give `config` and `categories` to `export`"
            )
    return detector, config_from_dict(detector.metadata.config or {})


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What int8 costs a detector on a dataset.

    Attributes:
        ap: A is the float32 file, B the int8 file, with the paired interval of the difference.
        ap50: the same at IoU 0.5.
        images: how many.
        of: which, in words.
        image_ids_sha256: which, by their ids.
    """

    ap: Difference
    ap50: Difference
    images: int
    of: str
    image_ids_sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as the metadata of a file hold them; intervals are of int8 - float32."""
        numbers = {
            name: {
                "float32": difference.a,
                "int8": difference.b,
                "interval": [None if math.isnan(bound) else bound for bound in (one.low, one.high)],
                "p": None if math.isnan(difference.p) else difference.p,
            }
            for name, difference in (("AP", self.ap), ("AP50", self.ap50))
            for one in (difference.interval,)
        }
        return {**numbers, "images": self.images, "of": self.of, "image_ids_sha256": self.image_ids_sha256}

    def __str__(self) -> str:
        return (
            f"AP {100 * self.ap.a:.2f} in float32 (A), {100 * self.ap.b:.2f} in int8 (B), on {self.images} images of "
            f"{self.of}: {self.ap.sentence('AP')}"
        )


def quantize_detector(
    source: Path | str,
    path: Path | str,
    *,
    calibration: CocoDetection,
    validation: CocoDetection,
    calibration_images: int = 300,
    max_loss: float = 0.01,
    allow_loss: bool = False,
) -> tuple[ExportMetadata, Cost]:
    """Write an exported detector in int8 if that costs little, and return the file's metadata and the cost.

    Args:
        source: the .xml file of `export_checkpoint`.
        path: the .xml file to write.
        calibration: images of the training data, transformed as in evaluation, on which ranges are measured.
        validation: other images, on which both files are evaluated; their AP, the interval of the difference and which
            images they are go into the metadata.
        calibration_images: how many of `calibration` are taken, drawn with seed 0; all where there are fewer.
        max_loss: the file is refused where AP falls by more than this, as a fraction: 0.01 is one point.
        allow_loss: keep it all the same.

    Raises:
        ExportError: AP falls by more, or a library is not installed.
        EvaluationError: both datasets share images, so that AP would be that of what was calibrated on.
    """
    if calibration_images < 1:
        raise ExportError(f"`calibration_images` must be at least 1, got {calibration_images}")
    drawn = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(0))[:calibration_images].tolist()
    shared = {int(calibration.annotations.image_ids[index]) for index in drawn}
    shared &= set(validation.annotations.image_ids.tolist())
    if calibration.annotations.source == validation.annotations.source and shared:
        raise EvaluationError(
            f"int8 must be judged on other images than it was calibrated on | where: image_id={min(shared)} | got "
            f"{len(shared)} in both"
        )
    detector, config = open_exported_detector(source)
    images: list[Tensor] = [calibration[index][0] for index in drawn]
    costs: list[Cost] = []

    def measure(quantized: nn.Module) -> Mapping[str, Any]:
        cost = _compare(detector, quantized, validation, config)
        costs.append(cost)
        if cost.ap.a - cost.ap.b > max_loss and not allow_loss:
            raise ExportError(
                f"int8 loses too much, and is not kept | where: file={path} key=AP | got {100 * cost.ap.b:.2f} "
                f"expected at least {100 * cost.ap.a:.2f} - {100 * max_loss:g} | fix: calibrate on more images, or "
                "set `allow_loss`"
            )
        return cost.to_dict()

    metadata = quantize(source, path, images, measure=measure, description=_words(calibration))
    return metadata, costs[0]


def _compare(first: nn.Module, second: nn.Module, dataset: CocoDetection, config: TrainConfig) -> Cost:
    accelerator = build_accelerator(cpu=True)
    postprocess = build_postprocess(config.detector, category_ids=dataset.category_ids)
    data = replace(config.data, num_workers=0)
    evaluators = [evaluate(model, postprocess, dataset, data, accelerator)[1] for model in (first, second)]
    comparison = compare(*(evaluator.matches() for evaluator in evaluators))
    return Cost(
        ap=comparison.stats["AP"],
        ap50=comparison.stats["AP50"],
        images=len(dataset.annotations.image_ids),
        of=_words(dataset),
        image_ids_sha256=image_ids_sha256(dataset.annotations.image_ids.tolist()),
    )


def _words(dataset: CocoDetection) -> str:
    part = f", {dataset.annotations.part}" if dataset.annotations.part else ""
    return f"{dataset.annotations.source}{part}"
