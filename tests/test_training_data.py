"""Which images share a batch, in which order, and what follows from seed and epoch alone."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from detr_backbone.coco.dataset import CocoDetection, collate
from detr_backbone.coco.selection import SubsetConfig
from detr_backbone.coco.transforms import TransformConfig, make_transforms
from detr_backbone.errors import DataError, ResourceError
from detr_backbone.training import DataConfig, SplitConfig, open_split
from detr_backbone.training.data import content_sha256, eval_loader, train_loader
from detr_backbone.training.progress import Means
from detr_backbone.training.sampler import EpochBatches
from detr_backbone.training.signals import ignore_stop_signals

COUNT = 41
SHAPES = ((20, 40), (40, 20), (30, 30))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """41 pictures in landscape, portrait and square by turns."""
    folder = tmp_path_factory.mktemp("shapes")
    images = [
        {"id": i, "file_name": f"{i}.png", "height": SHAPES[i % 3][0], "width": SHAPES[i % 3][1]} for i in range(COUNT)
    ]
    for image in images:
        Image.new("RGB", (image["width"], image["height"]), (image["id"], 0, 0)).save(folder / image["file_name"])
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (folder / "x.json").write_text(json.dumps(content), encoding="utf-8")
    split = SplitConfig(images=str(folder), annotations=str(folder / "x.json"))
    transforms = TransformConfig(scales=(20,), max_size=40, crop=False, eval_size=20)
    return DataConfig(train=split, val=split, transforms=transforms, batch_size=4, num_workers=0)


@pytest.fixture(scope="module")
def dataset(config: DataConfig) -> CocoDetection:
    return open_split(config, config.train, train=True)


def epoch_of(dataset: Any, config: DataConfig, epoch: int, *, batch: int = 0, **processes: int) -> list[list[int]]:
    """The images of the batches of an epoch, by their index, which is their id too."""
    _, batches = train_loader(dataset, config, seed=3, **processes)
    batches.start(epoch, batch=batch)
    return [[draw.image for draw in batch] for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [image_id for batch in batches for image_id in batch]


def test_grouped_batches_hold_images_of_one_shape_where_they_can(config: DataConfig, dataset: CocoDetection) -> None:
    batches = epoch_of(dataset, replace(config, group_by_aspect_ratio=True), 1)

    assert [len(batch) for batch in batches] == [4] * 10
    assert sum(len({image_id % 3 for image_id in batch}) > 1 for batch in batches) <= 2  # where one shape ends


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("epoch", [1, 2])
def test_grouping_takes_the_same_images_into_an_epoch(
    config: DataConfig, dataset: CocoDetection, world_size: int, epoch: int
) -> None:
    plain, grouped = (
        [
            epoch_of(dataset, replace(config, group_by_aspect_ratio=group), epoch, world_size=world_size, rank=rank)
            for rank in range(world_size)
        ]
        for group in (False, True)
    )

    assert [len(part) for part in grouped] == [len(part) for part in plain] == [COUNT // (4 * world_size)] * world_size
    assert sorted(flat(flat(grouped))) == sorted(flat(flat(plain)))


@pytest.mark.parametrize("group", [False, True])
def test_several_processes_take_the_images_of_one_in_every_step(
    config: DataConfig, dataset: CocoDetection, *, group: bool
) -> None:
    options = replace(config, group_by_aspect_ratio=group)
    parts = [epoch_of(dataset, options, 1, world_size=2, rank=rank) for rank in range(2)]
    alone = epoch_of(dataset, replace(options, batch_size=8), 1)

    assert [first + second for first, second in zip(*parts, strict=True)] == alone


@pytest.mark.parametrize("group", [False, True])
def test_an_epoch_follows_from_seed_and_number_alone(
    config: DataConfig, dataset: CocoDetection, *, group: bool
) -> None:
    options = replace(config, group_by_aspect_ratio=group)
    first, second = epoch_of(dataset, options, 1), epoch_of(dataset, options, 2)

    assert epoch_of(dataset, options, 2) == second
    assert sorted(map(sorted, first)) != sorted(map(sorted, second))  # other company, not only another order


@pytest.mark.parametrize("group", [False, True])
def test_an_epoch_goes_on_at_any_batch(config: DataConfig, dataset: CocoDetection, *, group: bool) -> None:
    options = replace(config, group_by_aspect_ratio=group)

    assert epoch_of(dataset, options, 2, batch=7) == epoch_of(dataset, options, 2)[7:]


def test_transforms_follow_from_seed_and_epoch_whoever_reads_the_images(config: DataConfig) -> None:
    jitter = replace(config, transforms=replace(config.transforms, color_jitter=0.5))
    dataset = open_split(jitter, replace(jitter.train, subset=SubsetConfig(count=8)), train=True)

    def pixels(epoch: int, *, workers: int, batch: int = 0) -> torch.Tensor:
        loader, batches = train_loader(dataset, replace(jitter, num_workers=workers), seed=3)
        batches.start(epoch, batch=batch)
        return torch.cat([images.tensors[:, 0, 0, 0] for images, _ in loader])

    second = pixels(2, workers=0)
    assert torch.equal(pixels(2, workers=2), second)  # however many workers read them
    assert torch.equal(pixels(2, workers=1, batch=1), second[4:])  # and wherever the epoch begins
    assert not torch.equal(pixels(1, workers=0), second)


def test_batches_of_every_shape_come_from_beginning_to_end() -> None:
    ratios = torch.linspace(0.5, 2, 8000, dtype=torch.float64).numpy()
    batches = [[draw.image for draw in batch] for batch in EpochBatches(8000, 4, ratios=ratios)]

    means = torch.tensor([ratios[batch].mean() for batch in batches])

    # 2,000 batches with ratios between 0.5 and 2, a deviation of 0.43: each half is within 4 deviations of its mean
    assert means.view(2, 1000).mean(dim=1).tolist() == pytest.approx([1.25, 1.25], abs=4 * 0.43 / 1000**0.5)
    spread = torch.tensor([ratios[batch].max() - ratios[batch].min() for batch in batches])
    assert spread.mean() < 1.5 / 20  # a stretch of 20 batches covers the range 20 times


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 64), (2, 64), (1, 41), (1, 1)])
def test_a_small_dataset_makes_whole_batches(
    config: DataConfig, dataset: CocoDetection, world_size: int, batch_size: int
) -> None:
    options = replace(config, batch_size=batch_size, group_by_aspect_ratio=True)
    batches = epoch_of(dataset, options, 1, world_size=world_size)

    size = min(batch_size, COUNT // world_size)
    assert [len(batch) for batch in batches] == [size] * (COUNT // (size * world_size))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_evaluation_sees_every_image_once(config: DataConfig, world_size: int) -> None:
    dataset = open_split(config, config.val, train=False)
    loaders = [eval_loader(dataset, config, world_size=world_size, rank=rank) for rank in range(world_size)]

    seen = [target["image_id"] for loader in loaders for _, targets in loader for target in targets]

    assert sorted(seen) == list(range(COUNT))


def test_an_evaluation_pads_little(config: DataConfig) -> None:
    dataset = open_split(config, config.val, train=False)

    padded = [images.is_padded for images, _ in eval_loader(dataset, config)]

    assert len(padded) == 11
    assert sum(padded) <= 2  # where one shape ends and the next begins


def test_a_split_may_be_a_subset_of_its_file(config: DataConfig) -> None:
    split = replace(config.val, subset=SubsetConfig(count=5))

    dataset = open_split(config, split, train=False)

    assert len(dataset) == 5
    assert set(dataset.image_ids) < set(range(COUNT))


def test_the_padding_of_an_epoch_is_counted(dataset: CocoDetection) -> None:
    landscape, portrait = dataset[0], dataset[1]
    means = Means()
    losses = dict.fromkeys(
        ("loss", "loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error"), torch.ones(())
    )

    means.add(losses, collate([landscape, portrait])[0])  # 20 x 40 and 40 x 20 in 40 x 40
    means.add(losses, collate([landscape, landscape])[0])

    assert means.values()["padding"] == pytest.approx(1600 / 4800)


class Stalled(CocoDetection):
    """The second picture of an evaluation, which takes wide ones first, never comes."""

    def __getitem__(self, index: int) -> Any:
        if index == 3:
            time.sleep(60)
        return super().__getitem__(index)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking beside threads
def test_a_storage_that_stalls_ends_the_run_and_the_error_says_where(config: DataConfig) -> None:
    transforms = make_transforms(config.transforms, train=False)
    dataset = Stalled(config.val.images, config.val.annotations, transforms=transforms)
    loader = eval_loader(dataset, replace(config, batch_size=1, num_workers=1, timeout=5))

    with pytest.raises(DataError, match=r"key=data.timeout, the last batch was image_id=\[0\] \| got none for 5 sec"):
        list(loader)


def test_an_epoch_of_fewer_images_than_processes_is_refused(config: DataConfig) -> None:
    dataset = open_split(config, replace(config.train, subset=SubsetConfig(count=2)), train=True)

    with pytest.raises(DataError, match=r"got 2 images expected at least 3"):
        train_loader(dataset, config, world_size=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_one_line(config: DataConfig, tmp_path: Path, workers: int) -> None:
    for file in Path(config.train.images).glob("*.png"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "3.png").write_bytes(b"<html>404</html>")
    torn = replace(config, train=replace(config.train, images=str(tmp_path)), num_workers=workers)
    loader, _ = train_loader(open_split(torn, torn.train, train=True), torn)

    with pytest.raises(DataError, match=r"image_id=3") as error:
        list(loader)
    assert "\n" not in str(error.value)


class Unfinite(CocoDetection):
    def __getitem__(self, index: int) -> Any:
        image, target = super().__getitem__(index)
        image[0, 0, 0] = float("nan")
        return image, target


def test_pixels_that_are_not_finite_are_refused(config: DataConfig) -> None:
    transforms = make_transforms(config.transforms, train=False)
    dataset = Unfinite(config.val.images, config.val.annotations, transforms=transforms)

    with pytest.raises(DataError, match=r"NaN or infinite \| where: image_id=0$"):
        next(iter(eval_loader(dataset, config)))


class Killed(CocoDetection):
    def __getitem__(self, index: int) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking beside threads
def test_a_worker_that_is_killed_says_memory_or_shared_memory(config: DataConfig) -> None:
    transforms = make_transforms(config.transforms, train=False)
    dataset = Killed(config.val.images, config.val.annotations, transforms=transforms)

    with pytest.raises(ResourceError, match=r"key=data.num_workers .* memory runs out, or /dev/shm") as error:
        list(eval_loader(dataset, replace(config, num_workers=1)))
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking beside threads
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_worker_goes_on_when_every_process_is_told_to_stop(config: DataConfig, name: str) -> None:
    class Signalled(CocoDetection):
        def __getitem__(self, index: int) -> Any:
            os.kill(os.getpid(), getattr(signal, name))
            return super().__getitem__(index)

    transforms = make_transforms(config.transforms, train=False)
    annotations = open_split(config, replace(config.val, subset=SubsetConfig(count=1)), train=False).annotations
    dataset = Signalled(config.val.images, annotations, transforms=transforms)

    assert len(list(eval_loader(dataset, replace(config, num_workers=1)))) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking beside threads
def test_a_worker_ends_when_the_process_that_trains_says_so(config: DataConfig) -> None:
    context = torch.multiprocessing.get_context("fork")
    worker = context.Process(target=wait_as_worker, daemon=True)
    worker.start()
    time.sleep(1)
    worker.terminate()
    worker.join(20)

    assert worker.exitcode == 0


def wait_as_worker() -> None:
    ignore_stop_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def test_the_hash_of_a_split_follows_its_content_and_not_its_path(config: DataConfig, tmp_path: Path) -> None:
    content = json.loads(Path(config.train.annotations).read_text(encoding="utf-8"))
    box = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}

    def hashed(**changes: Any) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps(content | changes), encoding="utf-8")
        return content_sha256(open_split(config, replace(config.train, annotations=str(path)), train=True))

    images = content["images"]
    assert hashed() == hashed(images=images[::-1]) == hashed(info={"year": 2026})
    others = [
        hashed(),
        hashed(annotations=[box]),
        hashed(annotations=[box | {"bbox": [1, 2, 3, 5]}]),
        hashed(categories=[{"id": 1, "name": "dog"}]),
        hashed(images=[images[0] | {"file_name": "3.png"}, *images[1:3], *images[4:]]),
    ]
    assert len(set(others)) == len(others)
