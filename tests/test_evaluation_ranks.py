"""Evaluation over several processes gives the numbers of one, however the images fall on them."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, multiprocessing, nn

from detr_backbone.coco.dataset import CocoDetection
from detr_backbone.coco.transforms import TransformConfig, make_transforms
from detr_backbone.detectors import PostProcess
from detr_backbone.evaluation.evaluator import CocoEvaluator
from detr_backbone.nested_tensor import NestedTensor
from detr_backbone.training.config import DataConfig
from detr_backbone.training.devices import build_accelerator
from detr_backbone.training.inference import evaluate

SIZES = (20, 24, 28, 32)


class Guess(nn.Module):
    """Two boxes and their scores from the mean of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images: NestedTensor) -> dict[str, Tensor]:
        mean = images.tensors.float().mean(dim=(1, 2, 3))[:, None]
        logits = torch.stack([mean, -mean, mean * 0], dim=2).expand(-1, 2, -1)
        boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.4, 0.4]]).expand(len(mean), -1, -1)
        return {"pred_logits": logits * torch.tensor([1.0, 0.7])[:, None], "pred_boxes": boxes}


def make_dataset(folder: Path, images: int) -> CocoDetection:
    content: dict[str, Any] = {
        "images": [
            {"id": 10 * i, "file_name": f"{i}.png", "width": s, "height": s} for i, s in enumerate(SIZES[:images])
        ],
        "categories": [{"id": i, "name": f"class {i}"} for i in (0, 4)],
        "annotations": [
            {"id": i, "image_id": 10 * i, "category_id": 4 * (i % 2), "bbox": [s / 4, s / 4, s / 2, s / 2]}
            for i, s in enumerate(SIZES[:images])
        ],
    }
    for i, side in enumerate(SIZES[:images]):
        Image.fromarray(np.full((side, side, 3), 40 + 50 * i, dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "x.json").write_text(json.dumps(content))
    return CocoDetection(folder, folder / "x.json", transforms=make_transforms(TransformConfig(), train=False))


def numbers(dataset: CocoDetection) -> tuple[list[float], CocoEvaluator]:
    postprocess = PostProcess(category_ids=dataset.category_ids)
    config = DataConfig(batch_size=1, num_workers=0)
    result, evaluator = evaluate(Guess(), postprocess, dataset, config, build_accelerator("no"))
    return [*result.stats.values(), *result.per_class.values(), result.num_images], evaluator


def worker(rank: int, processes: int, port: int, folder: Path, images: list[int]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    for count in images:
        found, evaluator = numbers(make_dataset(folder / str(rank), count))
        torch.save((found, evaluator.detections), folder / f"{rank}-{count}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("processes", "images"),
    [(2, [3, 1]), (3, [4, 2])],  # two images and one, one and none; two, one and one, one, one and none
)
def test_several_processes_give_the_numbers_of_one(tmp_path: Path, processes: int, images: list[int]) -> None:
    for rank in range(processes):
        (tmp_path / str(rank)).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["torchvision", "accelerate", "detr_backbone.training"])  # once for all
    multiprocessing.start_processes(
        worker, (processes, port, tmp_path, images), nprocs=processes, start_method="forkserver"
    )

    for count in images:
        expected, evaluator = numbers(make_dataset(tmp_path, count))
        assert expected[-1] == count
        assert (expected[0] > 0) == (count > 1)  # the first image alone is too dark for its object to be found
        for rank in range(processes):
            found, detections = torch.load(tmp_path / f"{rank}-{count}.pt")
            assert found == expected
            assert detections == evaluator.detections
