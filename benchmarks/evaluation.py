"""Seconds for COCO's numbers of a simulated detector, and peers: python benchmarks/evaluation.py."""

import contextlib
import io
import sys
import time
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from detr_backbone.commands.command_line import Command
from detr_backbone.evaluation.evaluator import CocoEvaluator
from detr_backbone.evaluation.intervals import resample_intervals
from detr_backbone.evaluation.simulation import simulate

Contender: TypeAlias = Literal["pycocotools", "matching", "faster_coco_eval", "hotcoco"]


def main(
    *,
    images: int = 5000,
    detections: int = 100,
    rounds: int = 1,
    resamples: int = 1000,
    contenders: tuple[Contender, ...] = ("pycocotools", "matching", "faster_coco_eval", "hotcoco"),
) -> None:
    """Give a simulated detector's tensors to an evaluator and wait for its numbers.

    The peers faster_coco_eval and hotcoco take a results file's content, or its arrays, which is not timed.

    Args:
        images: of the dataset, which has 80 classes and 7.2 objects per image, as COCO.
        detections: in each image.
        rounds: repetitions; contenders alternate.
        resamples: for the intervals.
        contenders: the evaluations to measure.
    """
    annotations, simulated = simulate(images, detections=detections)
    corners = np.concatenate([simulated.boxes[:, :2], simulated.boxes[:, :2] + simulated.boxes[:, 2:]], axis=1)
    bounds = np.searchsorted(simulated.image_index, np.arange(1, images))
    columns = (simulated.scores, np.array(annotations.category_ids)[simulated.labels], corners)
    parts = zip(*(np.split(column, bounds) for column in columns), strict=True)
    predictions = {
        image_id: {"scores": torch.tensor(scores), "labels": torch.tensor(labels), "boxes": torch.tensor(boxes)}
        for image_id, (scores, labels, boxes) in zip(annotations.image_ids.tolist(), parts, strict=True)
    }
    print(
        f"{images} images, {len(annotations.boxes)} objects, {len(simulated)} detections; "
        "seconds, and seconds of the processor"
    )
    evaluator = CocoEvaluator(annotations)
    evaluator.update(predictions)
    content, results = content_of(annotations), evaluator.detections
    for _ in range(rounds):
        for contender in contenders:
            start, start_cpu = time.perf_counter(), time.process_time()
            if contender in ("pycocotools", "matching"):
                timed = CocoEvaluator(annotations, backend=contender)
                timed.update(predictions)
                ap = timed.compute().stats["AP"]
            else:
                ap = peer_ap(contender, content, results)
            took = time.perf_counter() - start, time.process_time() - start_cpu
            print(f"{contender:<17} AP {ap:.12f} {took[0]:7.2f} {took[1]:7.2f}")
        matches = evaluator.matches()
        start, start_cpu = time.perf_counter(), time.process_time()
        resample_intervals(matches, resamples=resamples)
        print(
            f"{f'{resamples} resamples':<17} {time.perf_counter() - start:26.2f} {time.process_time() - start_cpu:7.2f}"
        )


def content_of(annotations: Any) -> dict[str, Any]:
    """Return simulated annotations as the content of a COCO file."""
    height, width = annotations.sizes[0].tolist()
    columns = (
        annotations.image_ids[annotations.image_index].tolist(),
        np.array(annotations.category_ids)[annotations.labels].tolist(),
        annotations.boxes.tolist(),
        annotations.areas.tolist(),
        annotations.is_crowd.astype(int).tolist(),
    )
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
    return {
        "images": [{"id": i, "height": height, "width": width} for i in annotations.image_ids.tolist()],
        "categories": [{"id": i, "name": str(i)} for i in annotations.category_ids],
        "annotations": [
            {"id": number, **dict(zip(keys, row, strict=True))}
            for number, row in enumerate(zip(*columns, strict=True), start=1)
        ],
    }


def peer_ap(library: str, content: dict[str, Any], results: list[Any]) -> float:
    """Return the AP that another library computes."""
    if library == "hotcoco":
        import hotcoco

        truth, evaluation_class = hotcoco.COCO(content), hotcoco.COCOeval
        loaded = truth.load_res(results)
    else:
        from faster_coco_eval import COCO, COCOeval_faster

        truth, evaluation_class = COCO(content), COCOeval_faster
        loaded = truth.loadRes(results)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = evaluation_class(truth, loaded, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


if __name__ == "__main__":
    EXAMPLE = "python benchmarks/evaluation.py"
    sys.exit(Command(name="python benchmarks/evaluation.py", main=main, example=EXAMPLE).run(sys.argv[1:]))
