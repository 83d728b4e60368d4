"""`detr-backbone evaluate`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import nn

from detr_backbone.backbone import fold_for_inference
from detr_backbone.coco.annotations import load_annotations
from detr_backbone.coco.categories import refuse_other_categories
from detr_backbone.coco.findings import DEFAULT_POLICIES, DataPolicies
from detr_backbone.coco.selection import SubsetConfig
from detr_backbone.commands.command_line import Command, output_folder, require
from detr_backbone.detectors import build_detector, build_postprocess
from detr_backbone.errors import ConfigError
from detr_backbone.evaluation.evaluator import Backend, CocoEvaluator
from detr_backbone.evaluation.intervals import resample_intervals
from detr_backbone.evaluation.result import CocoResult, write_result
from detr_backbone.evaluation.settings import COCO_AREAS, COCO_SETTINGS, COCO_THRESHOLDS, EvaluationSettings
from detr_backbone.export import EngineName, EnginePrecision, ExportedDetector
from detr_backbone.report import origin, write_report
from detr_backbone.training import (
    SplitConfig,
    TrainConfig,
    build_accelerator,
    check_normalisation,
    config_to_dict,
    evaluate,
    open_split,
    parse_config,
)
from detr_backbone.training.exported import open_detector
from detr_backbone.training.run_folder import CURVES
from detr_backbone.training.run_paths import find_split

AS_CONFIGURED = SubsetConfig()


def main(
    *,
    checkpoint: str | None = None,
    config: str | None = None,
    detections: str | None = None,
    images: str | None = None,
    annotations: str | None = None,
    subset: SubsetConfig = AS_CONFIGURED,
    output: str | None = None,
    report: str | None = None,
    backend: Backend | None = None,
    intervals: int = 1000,
    iou_thresholds: tuple[float, ...] = COCO_THRESHOLDS,
    area_ranges: dict[str, tuple[float, float]] | None = None,
    max_dets: tuple[int, ...] = (1, 10, 100),
    policies: DataPolicies = DEFAULT_POLICIES,
    engine: EngineName | None = None,
    threads: int | None = None,
    precision: EnginePrecision = "float32",
    overrides: Sequence[str] = (),
) -> None:
    """Evaluate a detector, or its detections, on a dataset in COCO format.

    Args:
        checkpoint: the trained detector, or a file of `detr-backbone export`; its own configuration says what it is.
        config: without a checkpoint, the configuration of a detector that is evaluated untrained.
        detections: without a detector, a COCO results file of any detector; --annotations says on what.
        images: the folder of the image files; the validation split of the configuration if left out.
        annotations: the COCO file of the images.
        subset: a selection of the images; if left out, that of the configuration, or all of --images.
        output: a folder for the numbers (results.json) and all detections (detections.json).
        report: a folder for a page with numbers, curves, mistakes and images (report.html), and the same as data.
        backend: what computes the numbers, pycocotools or the package's own matching, which gives the same faster; if
            left out, that of the configuration.
        intervals: halves of the images to draw for the 95 % intervals; 0 leaves them out.
        iou_thresholds: AP and recall are averaged over them, such as "[0.5]".
        area_ranges: least and largest area of objects in square pixels by name, such as "{tiny: [0, 256]}";
            COCO's if left out.
        max_dets: detections per image and class that count, such as "[1, 10, 300]": recall is given for each number,
            AP for the last one.
        policies: with --detections, how faults of the annotations are handled that need not be refused.
        engine: for an exported file, what runs it; if left out, onnxruntime for .onnx, openvino for .xml, torch for
            .pt2.
        threads: for an exported file, threads of one pass; if left out, what the engine takes.
        precision: for an exported file in OpenVINO, what it computes in.
        overrides: words that change the configuration.
    """
    if sum(given is not None for given in (checkpoint, config, detections)) != 1:
        raise ConfigError("give one of --checkpoint, --config and --detections")
    counting = EvaluationSettings(
        iou_thresholds=iou_thresholds, area_ranges=COCO_AREAS if area_ranges is None else area_ranges, max_dets=max_dets
    )
    if intervals < 0 or intervals == 1:
        raise ConfigError(f"`--intervals` must be 0 or at least 2, got {intervals}")
    if report is not None and counting != COCO_SETTINGS:
        raise ConfigError("--report shows COCO's settings: leave out --iou_thresholds, --area_ranges and --max_dets")
    if output is not None:
        output_folder(output)
    if report is not None:
        output_folder(report, option="report")
    settings, device = None, None
    if detections is not None:
        if annotations is None:
            raise ConfigError("--detections need the --annotations that they were made for")
        if subset != AS_CONFIGURED or overrides:
            what = "--subset" if subset != AS_CONFIGURED else overrides[0]
            raise ConfigError(f"{what} needs a detector; of --detections, all images of the --annotations count")
        truth = load_annotations(annotations, policies=policies)
        evaluator = CocoEvaluator(truth, backend=backend or "pycocotools", settings=counting)
        evaluator.load(detections)
        result, is_main = evaluator.compute(), True
    else:
        if (images is None) != (annotations is None):
            raise ConfigError("give --images and --annotations together or not at all")
        if policies != DEFAULT_POLICIES:
            raise ConfigError("--policies need --detections; a detector's configuration has its own, data.policies")
        require("accelerate", extra="train")
        split = None if images is None else SplitConfig(images=images, annotations=str(annotations))
        opened = None
        if checkpoint is not None:
            opened = open_detector(checkpoint, engine=engine, threads=threads, precision=precision, overrides=overrides)
        result, evaluator, settings, device, is_main = _detect(
            opened, str(checkpoint or config), split=split, subset=subset, backend=backend, overrides=overrides
        )
        if counting != COCO_SETTINGS:
            evaluator = evaluator.with_settings(counting)
            result = evaluator.compute()
        images = settings.data.val.images
    if not is_main:
        return
    matches = evaluator.matches()
    confidence = resample_intervals(matches, resamples=intervals) if intervals else None
    # Files first: whatever happens to the console, the numbers are there.
    if output is not None:
        write_result(
            output, result, detections=evaluator.detections, image_ids=evaluator.image_ids, intervals=confidence
        )
    if report is not None:
        what = checkpoint or detections or f"{config}, untrained"
        page = write_report(
            report,
            matches,
            title=f"{what} on {evaluator.annotations.source}",
            origin={"Detections of": what, **origin(evaluator.annotations, evaluator.image_ids, device=device)},
            images=images,
            config="" if settings is None else yaml.safe_dump(config_to_dict(settings), sort_keys=False),
            intervals=confidence,
            training_curves=_curves_of(checkpoint),
        )
    print(result.table(confidence) + _images_without_detections(evaluator, detections))
    if report is not None:
        print(f"report: {page}")


def _images_without_detections(evaluator: CocoEvaluator, file: str | None) -> str:
    """Return a line on the images that a file of detections does not name; empty for none, and without a file."""
    missing = len(evaluator.image_ids) - len({one["image_id"] for one in evaluator.detections})
    if file is None or not missing:
        return ""
    return f"\n{file} has no detection in {missing} of {len(evaluator.image_ids)} images, which count all the same"


def _curves_of(checkpoint: str | None) -> Path | None:
    """Return the picture that a run left beside its checkpoint, if there is one."""
    file = Path(checkpoint or "").parent / CURVES
    return file if checkpoint is not None and file.is_file() else None


def _detect(
    opened: tuple[nn.Module, TrainConfig, Mapping[int, str]] | None,
    source: str,
    *,
    split: SplitConfig | None,
    subset: SubsetConfig,
    backend: Backend | None,
    overrides: Sequence[str],
) -> tuple[CocoResult, CocoEvaluator, TrainConfig, torch.device, bool]:
    """Return the evaluation of a detector, its configuration and device, and whether this process reports it.

    Args:
        opened: the detector, its configuration and its categories; None for an untrained one.
        source: the file that it comes from, or for an untrained one its configuration.
        split: what it is evaluated on; None for what the configuration says.
        subset: a selection of it.
        backend: see `main`.
        overrides: for the configuration of an untrained one.
    """
    settings = parse_config(["--config", source, *overrides]) if opened is None else opened[1]
    split = split or find_split(settings.data.val, near=Path(source))
    if subset != AS_CONFIGURED:
        split = replace(split, subset=subset)
    backend = backend or settings.data.eval_backend
    settings = replace(settings, data=replace(settings.data, val=split, eval_backend=backend))
    dataset = open_split(settings.data, split, train=False)
    if opened is None:
        print("no checkpoint: this detector is untrained")
        check_normalisation(settings)
        torch.manual_seed(settings.seed)
        settings = replace(settings, detector=replace(settings.detector, num_classes=dataset.num_classes))
        model: nn.Module = build_detector(settings.detector)
    else:
        model, _, categories = opened
        refuse_other_categories(dataset.categories, categories, file=split.annotations)
    exported = isinstance(model, ExportedDetector)
    if opened is not None and not exported:
        fold_for_inference(model, dtype=torch.bfloat16 if settings.mixed_precision == "bf16" else None)
    accelerator = build_accelerator("no" if exported else settings.mixed_precision, cpu=exported)
    postprocess = build_postprocess(settings.detector, category_ids=dataset.category_ids)
    result, evaluator = evaluate(model.to(accelerator.device), postprocess, dataset, settings.data, accelerator)
    device, is_main = accelerator.device, accelerator.is_main_process
    accelerator.free_memory()
    return result, evaluator, settings, device, is_main


COMMAND = Command(
    name="detr-backbone evaluate",
    main=main,
    shown=(
        *("checkpoint", "config", "detections", "images", "annotations", "subset", "output", "report", "backend"),
        *("intervals", "iou_thresholds", "area_ranges", "max_dets", "engine"),
    ),
    example="detr-backbone evaluate --checkpoint runs/shapes/checkpoint.pt --report runs/shapes/report\n"
    "detr-backbone evaluate --detections detections.json --annotations val.json --images val",
)
