"""Compare two detectors: python scripts/compare.py --annotations val.json --a 1.json --b 2.json."""

import json
from pathlib import Path

from detr_backbone.coco.annotations import load_annotations
from detr_backbone.coco.findings import DEFAULT_POLICIES, DataPolicies
from detr_backbone.evaluation.box_format import refuse_other_formats
from detr_backbone.evaluation.detections import load_detections
from detr_backbone.evaluation.intervals import compare
from detr_backbone.evaluation.matching import match
from detr_backbone.evaluation.result import UNIT
from detr_backbone.training import parse_options, plain_errors


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
        a: the detections.json of scripts/evaluate.py, or any COCO results file, of the first detector.
        b: the same of the second one.
        resamples: halves of the images to draw.
        level: the fraction of samples in which an interval covers.
        output: a JSON file for the numbers.
        policies: how faults of the annotations are handled that need not be refused.
    """
    truth = load_annotations(annotations, policies=policies)
    matched = []
    for path in (a, b):
        detections = load_detections(path, truth)
        refuse_other_formats(truth, detections, f"file={path}")
        matched.append(match(truth, detections))
    comparison = compare(*matched, resamples=resamples, level=level)
    if output is not None:
        Path(output).write_text(json.dumps({"unit": UNIT, **comparison.to_dict()}, indent=1), encoding="utf-8")
    print(f"A {a}\nB {b}\n{len(truth.image_ids)} images, {resamples} resamples\n")
    print(comparison)
    for warning in truth.warnings:
        print(f"warning: {warning}")


if __name__ == "__main__":
    with plain_errors():
        main(**parse_options(main))
