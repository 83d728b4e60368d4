"""Which images share a batch, in which order, and what follows from seed and epoch alone."""

import json
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from detr_backbone.coco.dataset import CocoDetection, collate
from detr_backbone.coco.selection import SubsetConfig
from detr_backbone.coco.transforms import TransformConfig, make_transforms
from detr_backbone.errors import DataError
from detr_backbone.training import DataConfig, SplitConfig, open_split
from detr_backbone.training.data import AspectRatioBatches, eval_loader, seed_epoch, train_loader
from detr_backbone.training.progress import Means

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


def epoch_of(loader: Any, epoch: int, *, rank: int = 0) -> list[list[int]]:
    """The images of the batches of an epoch, by their index, which is their id too."""
    seed_epoch(loader, 3, epoch, rank=rank)
    return list(loader.batch_sampler)


def flat(batches: list[list[int]]) -> list[int]:
    return [image_id for batch in batches for image_id in batch]


def test_grouped_batches_hold_images_of_one_shape_where_they_can(config: DataConfig, dataset: CocoDetection) -> None:
    batches = epoch_of(train_loader(dataset, replace(config, group_by_aspect_ratio=True)), 1)

    assert [len(batch) for batch in batches] == [4] * 10
    assert sum(len({image_id % 3 for image_id in batch}) > 1 for batch in batches) <= 2  # where one shape ends


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("epoch", [1, 2])
def test_grouping_leaves_every_process_its_images_of_the_epoch(
    config: DataConfig, dataset: CocoDetection, world_size: int, epoch: int
) -> None:
    for rank in range(world_size):
        plain, grouped = (
            epoch_of(train_loader(dataset, options, seed=3, world_size=world_size, rank=rank), epoch, rank=rank)
            for options in (config, replace(config, group_by_aspect_ratio=True))
        )

        assert len(grouped) == len(plain) == -(-COUNT // world_size) // 4
        assert sorted(flat(grouped)) == sorted(flat(plain))


@pytest.mark.parametrize("group", [False, True])
def test_processes_take_other_images_and_as_many_batches(
    config: DataConfig, dataset: CocoDetection, *, group: bool
) -> None:
    options = replace(config, group_by_aspect_ratio=group)
    parts = [epoch_of(train_loader(dataset, options, seed=3, world_size=2, rank=r), 1, rank=r) for r in range(2)]

    assert [len(part) for part in parts] == [5, 5]
    assert not set(flat(parts[0])) & set(flat(parts[1]))


@pytest.mark.parametrize("group", [False, True])
def test_an_epoch_follows_from_seed_and_number_alone(
    config: DataConfig, dataset: CocoDetection, *, group: bool
) -> None:
    options = replace(config, group_by_aspect_ratio=group)
    loader = train_loader(dataset, options)
    first, second = epoch_of(loader, 1), epoch_of(loader, 2)

    assert epoch_of(train_loader(dataset, options), 2) == second
    assert sorted(map(sorted, first)) != sorted(map(sorted, second))  # other company, not only another order


def test_the_transforms_of_workers_follow_from_seed_and_epoch_too(config: DataConfig) -> None:
    jitter = replace(config, transforms=replace(config.transforms, color_jitter=0.5), num_workers=1)
    dataset = open_split(jitter, replace(jitter.train, subset=SubsetConfig(count=8)), train=True)

    def pixels(loader: Any, epoch: int) -> torch.Tensor:
        seed_epoch(loader, 3, epoch)
        return torch.cat([images.tensors[:, 0, 0, 0] for images, _ in loader])

    loader = train_loader(dataset, jitter)
    first, second = pixels(loader, 1), pixels(loader, 2)
    assert torch.equal(pixels(train_loader(dataset, jitter), 2), second)
    assert not torch.equal(first, second)


def test_batches_of_every_shape_come_from_beginning_to_end() -> None:
    ratios = torch.linspace(0.5, 2, 8000, dtype=torch.float64).numpy()
    sampler = torch.utils.data.RandomSampler(ratios, generator=torch.Generator().manual_seed(0))
    batches = AspectRatioBatches(sampler, 4, ratios=ratios, generator=torch.Generator().manual_seed(0))

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
    batches = epoch_of(train_loader(dataset, options, world_size=world_size), 1)

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
