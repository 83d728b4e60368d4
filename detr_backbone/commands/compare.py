"""`detr-backbone compare`."""

import json

from detr_backbone.coco.annotations import load_annotations
from detr_backbone.coco.findings import DEFAULT_POLICIES, DataPolicies
from detr_backbone.commands.command_line import Command, output_file
from detr_backbone.errors import ConfigError
from detr_backbone.evaluation.box_format import refuse_other_formats
from detr_backbone.evaluation.detections import load_detections
from detr_backbone.evaluation.intervals import compare
from detr_backbone.evaluation.matching import match
from detr_backbone.evaluation.result import UNIT


def main(
    *,
    annotations: str,
    a: str,
    b: str,
    resamples: int = 1000,
    level: float = 0.95,
    output: str | None = None,
    policies: DataPolicies = DEFAULT_POLICIES,
) -> None:
    """Compare two detectors on the same images, with an interval for every difference.

    Args:
        annotations: the COCO file of the images; an image that a file does not name has no detections.
        a: the detections.json of `evaluate`, or any COCO results file, of the first detector.
        b: the same of the second one.
        resamples: halves of the images to draw.
        level: the fraction of samples in which an interval covers.
        output: a JSON file for the numbers.
        policies: how faults of the annotations are handled that need not be refused.
    """
    if resamples < 2:
        raise ConfigError(f"`--resamples` must be at least 2, got {resamples}")
    if not 0 < level < 1:
        raise ConfigError(f"`--level` must be between 0 and 1, got {level}")
    file = None if output is None else output_file(output)
    truth = load_annotations(annotations, policies=policies)
    matched = []
    for path in (a, b):
        detections = load_detections(path, truth)
        refuse_other_formats(truth, detections, f"file={path}")
        matched.append(match(truth, detections))
    comparison = compare(*matched, resamples=resamples, level=level)
    if file is not None:
        file.write_text(json.dumps({"unit": UNIT, **comparison.to_dict()}, indent=1), encoding="utf-8")
    print(f"A {a}\nB {b}\n{len(truth.image_ids)} images, {resamples} resamples\n")
    print(comparison)
    for warning in truth.warnings:
        print(f"warning: {warning}")


COMMAND = Command(
    name="detr-backbone compare",
    main=main,
    example="detr-backbone compare --annotations val.json --a first/detections.json --b second/detections.json",
)
