"""What starting from a trained detector is worth: AP by epoch on two new classes, from scratch and fine-tuned.

    python benchmarks/fine_tuning.py FOLDER

Trains a small Deformable DETR on drawn ellipses, rectangles, triangles and stars, then on few pictures of hexagons and
crosses: from scratch, and from the first detector with everything training, with a frozen backbone, with a rate of the
backbone that is a tenth, and with one that falls from layer to layer.
"""

import argparse
import csv
import time
from dataclasses import replace
from pathlib import Path

from detr_backbone import BackboneConfig
from detr_backbone.coco.shapes import draw_shapes
from detr_backbone.coco.transforms import TransformConfig
from detr_backbone.detectors import DetectorConfig
from detr_backbone.position_encoding import PositionEncodingConfig
from detr_backbone.training import DataConfig, OptimizerConfig, SplitConfig, TrainConfig, train

SIZE = 64
LAYERS = ("conv1", "layer1", "layer2", "layer3")


def data(folder: Path) -> DataConfig:
    train_split, val_split = (
        SplitConfig(images=str(folder / split), annotations=str(folder / "annotations" / f"instances_{split}.json"))
        for split in ("train", "val")
    )
    transforms = TransformConfig(scales=(SIZE,), max_size=SIZE, crop=False, eval_size=SIZE)
    return DataConfig(train=train_split, val=val_split, transforms=transforms, batch_size=8, num_workers=0)


def detector(train_layers: tuple[str, ...] = LAYERS) -> DetectorConfig:
    return DetectorConfig(
        name="deformable_detr",
        backbone=BackboneConfig(
            name="resnet18",
            return_layers=("layer2", "layer3"),
            train_layers=train_layers,
            position_encoding=PositionEncodingConfig(offset=-0.5),
            hidden_dim=64,
        ),
        num_queries=20,
        nheads=4,
        enc_layers=1,
        dec_layers=2,
        dim_feedforward=128,
        dropout=0.0,
        with_box_refine=True,
        set_cost_class=2.0,
        cls_loss_coef=2.0,
    )


def average_precisions(folder: Path) -> list[float]:
    """Return the AP of each epoch that was evaluated, in percent."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row["AP"]) for row in csv.DictReader(file) if row["AP"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=600, help="to train the first detector on")
    parser.add_argument("--few", type=int, default=120, help="images of the new classes to train on")
    parser.add_argument("--epochs", type=int, default=8, help="of every training")
    arguments = parser.parse_args()
    folder: Path = arguments.folder

    draw_shapes(folder / "four", train=arguments.images, val=50, image_size=SIZE, max_objects=3)
    draw_shapes(
        folder / "two",
        train=arguments.few,
        val=100,
        image_size=SIZE,
        max_objects=3,
        seed=1,
        classes=("hexagon", "cross"),
    )
    rates = OptimizerConfig(lr=5e-4, lr_backbone=5e-4, epochs=arguments.epochs, warmup_steps=20, schedule="cosine")
    first = TrainConfig(
        output_dir=str(folder / "first"),
        detector=detector(),
        data=data(folder / "four"),
        optimizer=rates,
        eval_every=arguments.epochs,
    )
    started = time.process_time()
    train(first)
    print(f"first detector: {time.process_time() - started:.0f} s of CPU, AP {average_precisions(folder / 'first')}")

    new = replace(first, data=data(folder / "two"), eval_every=1)
    start = replace(new, init_from=str(folder / "first" / "checkpoint.pt"))
    runs = {
        "scratch": new,
        "fine-tuned": start,
        "fine-tuned, frozen backbone": replace(start, detector=detector(train_layers=())),
        "fine-tuned, backbone at a tenth": replace(start, optimizer=replace(rates, lr_backbone=5e-5)),
        "fine-tuned, layer-wise rates": replace(start, optimizer=replace(rates, layer_decay=0.7)),
    }
    for name, config in runs.items():
        output = folder / name.replace(" ", "_").replace(",", "")
        started = time.process_time()
        train(replace(config, output_dir=str(output)))
        curve = "  ".join(f"{value:.1f}" for value in average_precisions(output))
        print(f"{name:<32} {time.process_time() - started:4.0f} s of CPU   AP by epoch  {curve}")


if __name__ == "__main__":
    main()
