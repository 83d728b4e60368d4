"""COCO's numbers of a checkpoint: python scripts/evaluate.py --checkpoint runs/shapes/checkpoint.pt."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from detr_backbone.coco.backends import Backend
from detr_backbone.coco.intervals import bootstrap
from detr_backbone.detectors import build_detector, build_postprocess
from detr_backbone.errors import ConfigError
from detr_backbone.training import (
    SplitConfig,
    build_accelerator,
    detector_of,
    evaluate,
    load_checkpoint,
    open_split,
    parse_config,
    parse_options,
    plain_errors,
)


def main(
    *,
    checkpoint: str | None = None,
    config: str | None = None,
    images: str | None = None,
    annotations: str | None = None,
    output: str | None = None,
    backend: Backend | None = None,
    intervals: int = 1000,
) -> None:
    """Evaluate a detector on a dataset in COCO format.

    Args:
        checkpoint: the trained detector; its own configuration says what it is.
        config: without a checkpoint, the configuration of a detector that is evaluated untrained.
        images: the folder of the pictures; the validation split of the configuration if left out.
        annotations: the COCO file of the pictures.
        output: a folder for the numbers (results.json) and all detections (detections.json).
        backend: the library that computes the numbers; that of the configuration if left out. All give the same.
        intervals: resamples of the images for the 95 % intervals; 0 leaves them out.
    """
    if (checkpoint is None) == (config is None) or (images is None) != (annotations is None):
        raise ConfigError("give --checkpoint or --config, and --images and --annotations together or not at all")
    if checkpoint is not None:
        loaded = load_checkpoint(checkpoint)
        model, settings = detector_of(loaded)
    else:
        settings = parse_config(["--config", str(config)])
    accelerator = build_accelerator(settings.mixed_precision)
    split = settings.data.val if images is None else SplitConfig(images=images, annotations=str(annotations))
    dataset = open_split(settings.data, split, train=False)
    if checkpoint is None:
        print("no checkpoint: this detector is untrained")
        torch.manual_seed(settings.seed)
        settings = replace(settings, detector=replace(settings.detector, num_classes=dataset.num_classes))
        model = build_detector(settings.detector)
    elif dataset.categories != loaded.categories:
        raise ConfigError(
            f"the dataset must have the categories of the checkpoint, {loaded.categories}, got {dataset.categories}"
        )
    if backend is not None:
        settings = replace(settings, data=replace(settings.data, eval_backend=backend))
    postprocess = build_postprocess(settings.detector, category_ids=dataset.category_ids)
    result, evaluator = evaluate(model.to(accelerator.device), postprocess, dataset, settings.data, accelerator)
    if accelerator.is_main_process:
        sure = bootstrap(evaluator.matches(), resamples=intervals) if intervals else None
        print(result.table(sure))
        if output is not None:
            folder = Path(output)
            folder.mkdir(parents=True, exist_ok=True)
            numbers = {"stats": dict(result.stats), "per_class": dict(result.per_class), "images": result.num_images}
            if sure is not None:
                numbers["intervals"] = sure.to_dict()
            (folder / "results.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
            (folder / "detections.json").write_text(json.dumps(evaluator.detections), encoding="utf-8")
    accelerator.free_memory()


if __name__ == "__main__":
    with plain_errors():
        main(**parse_options(main))
