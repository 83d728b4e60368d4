"""A subset as a dataset of its own: python scripts/make_subset.py --annotations F --images D --output O --count 500."""

from typing import Literal

from jsonargparse import ArgumentParser

from detr_backbone.coco.selection import SubsetConfig
from detr_backbone.coco.subset import write_subset
from detr_backbone.training import plain_errors


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


def options() -> ArgumentParser:
    """Return the parser of `main`, with the keys of SubsetConfig as options."""
    parser = ArgumentParser(description=(main.__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_function_arguments(main, skip={"subset"}, fail_untyped=True)
    parser.add_argument("--categories", nargs="+", type=int | str, default=(), help="only images with one of these")
    parser.add_argument("--image_ids", nargs="+", type=int, default=(), help="only these images")
    parser.add_class_arguments(SubsetConfig, skip={"categories", "image_ids"}, fail_untyped=True)
    return parser


if __name__ == "__main__":
    with plain_errors():
        given = vars(options().parse_args())
        subset = SubsetConfig(**{key: given.pop(key) for key in SubsetConfig.__dataclass_fields__})
        main(**given, subset=subset)
