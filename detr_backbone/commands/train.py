"""`detr-backbone train`."""

from collections.abc import Sequence
from typing import Any

from detr_backbone.commands.command_line import Command, output_folder, require
from detr_backbone.errors import ConfigError
from detr_backbone.training.config import TrainConfig, config_parser, parse_config
from detr_backbone.training.config_errors import OneLineParser


def main(config: TrainConfig) -> None:
    """Train a detector on a dataset in COCO format, and evaluate it."""
    for split in ("train", "val"):
        given = getattr(config.data, split)
        for key in ("images", "annotations"):
            if not getattr(given, key) and (split == "train" or given.images or given.annotations):
                raise ConfigError(
                    f"`data.{split}.{key}` must be set | fix: --config NAME, or --data.{split}.{key} PATH"
                )
    require("accelerate", "rich", extra="train")
    if config.detector.backbone.name.startswith("timm/"):
        require("timm", extra="timm")
    output_folder(config.output_dir, option="output_dir")
    from detr_backbone.training.engine import train

    train(config)


class _TrainCommand(Command):
    """The command whose options are the keys of a configuration."""

    def parser(self) -> OneLineParser:
        parser = config_parser(main.__doc__ or "")
        parser.prog = self.name
        return parser

    def options(self, words: Sequence[str]) -> dict[str, Any]:
        return {"config": parse_config(words)}


COMMAND = _TrainCommand(
    name="detr-backbone train",
    main=main,
    example="detr-backbone train --config shapes --output_dir runs/mine \\\n"
    "    --data.train.images mine/train --data.train.annotations mine/train.json \\\n"
    "    --data.val.images mine/val --data.val.annotations mine/val.json",
    shown=(
        "config",
        "output_dir",
        "resume",
        "seed",
        "mixed_precision",
        "data.train.images",
        "data.train.annotations",
        "data.val.images",
        "data.val.annotations",
        "data.batch_size",
        "data.num_workers",
        "detector.backbone.name",
        "detector.backbone.weights",
        "detector.backbone.return_layers",
        "optimizer.lr",
        "optimizer.lr_backbone",
        "optimizer.epochs",
    ),
)
