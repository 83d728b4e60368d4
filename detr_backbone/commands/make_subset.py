"""`detr-backbone make-subset`."""

from collections.abc import Sequence
from typing import Any, Literal

from detr_backbone.coco.selection import SubsetConfig
from detr_backbone.coco.subset import write_subset
from detr_backbone.commands.command_line import Command
from detr_backbone.training.config_errors import OneLineParser, keys_of


def main(
    *,
    annotations: str,
    output: str,
    subset: SubsetConfig,
    images: str | None = None,
    pictures: Literal["link", "copy", "none"] = "link",
) -> None:
    """Write a subset of a COCO dataset as a COCO dataset, with a manifest that describes it.

    Args:
        annotations: the COCO file of the whole dataset.
        output: a new folder.
        subset: the selection.
        images: the folder of the image files; needed unless `pictures` is none.
        pictures: hard links, copies, or the JSON files alone.
    """
    manifest = write_subset(annotations, output, subset, images=images, pictures=pictures)
    ids = manifest["image_ids_sha256"][:12]
    print(
        f"{manifest['images']} of {manifest['source']['images']} images ({subset.in_words}, ids sha256 {ids}): {output}"
    )
    print(f"{'all categories':<20} {manifest['images']:>6} images {manifest['boxes']:>7} boxes")
    for name, count in manifest["per_class"].items():
        print(f"{name:<20} {count['images']:>6} images {count['boxes']:>7} boxes")


class _MakeSubsetCommand(Command):
    """The command that takes the keys of SubsetConfig as they are, `--count` for `--subset.count`."""

    def parser(self) -> OneLineParser:
        keys = {key: hint for key, hint in keys_of(main).items() if key.partition(".")[0] != "subset"}
        parser = OneLineParser(
            prog=self.name,
            description=(main.__doc__ or "").split("\n")[0],
            keys=keys | keys_of(SubsetConfig),
        )
        parser.add_function_arguments(main, skip={"subset"}, fail_untyped=True)
        parser.add_class_arguments(SubsetConfig, fail_untyped=True)
        return parser

    def options(self, words: Sequence[str]) -> dict[str, Any]:
        given = vars(self.parser().parse_args(words))
        subset = SubsetConfig(**{key: given.pop(key) for key in SubsetConfig.__dataclass_fields__})
        return {**given, "subset": subset}


COMMAND = _MakeSubsetCommand(
    name="detr-backbone make-subset",
    main=main,
    example="detr-backbone make-subset --annotations train.json --images train --output small --count 500",
    shown=("annotations", "images", "output", *SubsetConfig.__dataclass_fields__, "pictures"),
)
