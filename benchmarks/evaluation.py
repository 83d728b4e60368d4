"""Seconds for COCO's numbers of a simulated detector, by every backend: python benchmarks/evaluation.py."""

import time

import numpy as np
import torch

from detr_backbone.evaluation.backends import Backend
from detr_backbone.evaluation.evaluator import CocoEvaluator
from detr_backbone.evaluation.intervals import resample_intervals
from detr_backbone.evaluation.simulation import simulate
from detr_backbone.training import parse_options


def main(
    *,
    images: int = 5000,
    detections: int = 100,
    rounds: int = 1,
    resamples: int = 1000,
    backends: tuple[Backend, ...] = ("pycocotools", "faster_coco_eval", "hotcoco"),
) -> None:
    """Give a simulated detector's tensors to an evaluator and wait for its numbers, as a user does.

    Args:
        images: of the dataset, which has 80 classes and 7.2 objects per image, as COCO.
        detections: in each image.
        rounds: how often; backends alternate.
        resamples: for the intervals.
        backends: which are measured.
    """
    annotations, found = simulate(images, detections=detections)
    corners = np.concatenate([found.boxes[:, :2], found.boxes[:, :2] + found.boxes[:, 2:]], axis=1)
    bounds = np.searchsorted(found.image_index, np.arange(1, images))
    columns = (found.scores, np.array(annotations.category_ids)[found.labels], corners)
    parts = zip(*(np.split(column, bounds) for column in columns), strict=True)
    predictions = {
        image_id: {"scores": torch.tensor(scores), "labels": torch.tensor(labels), "boxes": torch.tensor(boxes)}
        for image_id, (scores, labels, boxes) in zip(annotations.image_ids.tolist(), parts, strict=True)
    }
    print(
        f"{images} images, {len(annotations.boxes)} objects, {len(found)} detections; seconds, of them processor time"
    )
    for _ in range(rounds):
        for backend in backends:
            start, start_cpu = time.perf_counter(), time.process_time()
            evaluator = CocoEvaluator(annotations, backend=backend)
            evaluator.update(predictions)
            updated, updated_cpu = time.perf_counter(), time.process_time()
            ap = evaluator.compute().stats["AP"]
            took = time.perf_counter() - start, time.process_time() - start_cpu
            print(
                f"{backend:<17} AP {ap:.12f} {took[0]:7.2f} {took[1]:7.2f}, "
                f"of them update {updated - start:.2f} {updated_cpu - start_cpu:.2f}"
            )
        start, start_cpu = time.perf_counter(), time.process_time()
        matches = evaluator.matches()
        matched, matched_cpu = time.perf_counter(), time.process_time()
        resample_intervals(matches, resamples=resamples)
        print(f"{'matches':<17} {matched - start:24.2f} {matched_cpu - start_cpu:7.2f}")
        print(
            f"{f'{resamples} resamples':<17} {time.perf_counter() - matched:24.2f} "
            f"{time.process_time() - matched_cpu:7.2f}"
        )


if __name__ == "__main__":
    main(**parse_options(main))
