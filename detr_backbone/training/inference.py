"""A trained detector, and its detections over a dataset for COCO's numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from detr_backbone.coco.dataset import CocoDetection, Target
from detr_backbone.detectors import DetectorConfig, PostProcess, build_detector
from detr_backbone.errors import NumericsError
from detr_backbone.evaluation.evaluator import CocoEvaluator
from detr_backbone.evaluation.result import CocoResult
from detr_backbone.training.checkpoint import Checkpoint, load_model
from detr_backbone.training.config import TrainConfig, config_from_dict, override_config
from detr_backbone.training.data import DataConfig, Loader, eval_loader

if TYPE_CHECKING:
    from accelerate import Accelerator

Detections = dict[str, Tensor]
"""`scores` [M], `labels` [M] as the dataset's category ids, `boxes` [M, 4] xyxy in pixels of the original image."""


def detector_of(checkpoint: Checkpoint, *, overrides: Sequence[str] = ()) -> tuple[nn.Module, TrainConfig]:
    """Return the trained detector of a checkpoint in eval mode, and the configuration it was trained with.

    Args:
        checkpoint: of a run.
        overrides: words of a command line that change the configuration, such as ["--data.batch_size", "8"].

    Raises:
        CheckpointError: the weights are not those of the configuration.
        ConfigError: an override is no key, or does not fit it.
    """
    config = override_config(config_from_dict(checkpoint.config), overrides)
    model = build_detector(without_pretrained(config.detector))
    load_model(checkpoint, model)
    return model.eval(), config


def evaluate(
    model: nn.Module, postprocess: PostProcess, dataset: CocoDetection, config: DataConfig, accelerator: "Accelerator"
) -> tuple[CocoResult, CocoEvaluator]:
    """COCO's numbers of a detector on a dataset, the same in every process, and the evaluator with all detections."""
    loader = eval_loader(dataset, config, world_size=accelerator.num_processes, rank=accelerator.process_index)
    ids, numbers, seen = [torch.zeros(0, 2, dtype=torch.int64)], [torch.zeros(0, 5)], []
    for target, found in _detections(model, postprocess, loader, accelerator):
        image_id = torch.full_like(found["labels"], target["image_id"])
        ids.append(torch.stack([image_id, found["labels"]], dim=1).cpu())
        numbers.append(torch.cat([found["scores"][:, None], found["boxes"]], dim=1).float().cpu())
        seen.append(target["image_id"])
    all_ids, all_numbers = (_gather(torch.cat(rows), accelerator) for rows in (ids, numbers))
    all_seen = _gather(torch.tensor(seen, dtype=torch.int64), accelerator)

    evaluator = CocoEvaluator(dataset.annotations, backend=config.eval_backend)
    order = all_ids[:, 0].argsort(stable=True)
    by_image, counts = torch.unique_consecutive(all_ids[order, 0], return_counts=True)
    parts = [torch.split(rows[order], counts.tolist()) for rows in (all_ids, all_numbers)]
    nothing = {"labels": all_ids[:0, 1], "scores": all_numbers[:0, 0], "boxes": all_numbers[:0, 1:]}
    evaluator.update(
        dict.fromkeys(all_seen.tolist(), nothing)
        | {
            image_id: {"labels": labels[:, 1], "scores": values[:, 0], "boxes": values[:, 1:]}
            for image_id, labels, values in zip(by_image.tolist(), *parts, strict=True)
        }
    )
    return evaluator.compute(), evaluator


def without_pretrained(config: DetectorConfig) -> DetectorConfig:
    """The same detector without its pretrained file, for a checkpoint that holds every weight."""
    return replace(config, backbone=replace(config.backbone, weights=None))


@torch.inference_mode()
def _detections(
    model: nn.Module, postprocess: PostProcess, loader: Loader, accelerator: "Accelerator"
) -> Iterator[tuple[Target, Detections]]:
    model.eval()
    for images, targets in loader:
        with accelerator.autocast():
            outputs = model(images.to(accelerator.device, non_blocking=True))
        sizes = torch.tensor([target["orig_size"] for target in targets], device=accelerator.device)
        try:
            found = postprocess(outputs, sizes)
        except NumericsError as error:
            raise NumericsError(f"{error} | where: image_id={[target['image_id'] for target in targets]}") from error
        yield from zip(targets, found, strict=True)


def _gather(rows: Tensor, accelerator: "Accelerator") -> Tensor:
    """The rows of all processes, which may have different numbers of them, in all processes."""
    if accelerator.num_processes == 1:
        return rows
    rows = rows.to(accelerator.device)
    counts = accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    gathered = accelerator.gather(accelerator.pad_across_processes(rows, dim=0)).cpu()
    return torch.cat([part[:count] for part, count in zip(gathered.chunk(len(counts)), counts, strict=True)])
