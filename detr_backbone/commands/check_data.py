"""`detr-backbone check-data`."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from detr_backbone.coco.check import check_split, compare_splits
from detr_backbone.coco.check_report import DataReport
from detr_backbone.coco.findings import DEFAULT_POLICIES, DataPolicies
from detr_backbone.coco.near_misses import rename_files
from detr_backbone.commands.command_line import Command, output_file
from detr_backbone.errors import ConfigError
from detr_backbone.training import SplitConfig, parse_config
from detr_backbone.training.run_paths import find_split


def main(
    *,
    images: str | None = None,
    annotations: str | None = None,
    config: str | None = None,
    output: str | None = None,
    policies: DataPolicies = DEFAULT_POLICIES,
    segmentations: bool = False,
    decode: bool = True,
    workers: int | None = None,
    rename: str | None = None,
) -> int:
    """Check a dataset in COCO format before training; the exit code is 2 where training would refuse it.

    Args:
        images: the folder of the image files.
        annotations: the COCO file of the images.
        config: instead of these two, a configuration whose splits, policies and number of queries are taken.
        output: a file for the report as JSON.
        policies: how faults are handled that need not be refused; overrides those of a configuration.
        segmentations: the masks will be used, so that their faults are errors.
        decode: read every image file.
        rename: a new JSON file, for a copy of --annotations in which file names that nearly match are corrected.
        workers: processes that read image files; one per processor if left out.
    """
    if (images is None) != (annotations is None) or (images is None) == (config is None):
        raise ConfigError("give --images and --annotations, or --config")
    if workers is not None and workers < 0:
        raise ConfigError(f"`--workers` must be 0 or more, got {workers}")
    file = None if output is None else output_file(output)
    if rename is not None:
        if annotations is None:
            raise ConfigError("--rename needs --images and --annotations")
        renamed = rename_files(annotations, str(images), rename)
        name, corrected = next(iter(renamed.items()))
        print(f"{len(renamed)} file names corrected, such as {name!r} to {corrected!r}: {rename}\n")
        annotations = rename
    splits, num_queries = {"data": SplitConfig(images=str(images), annotations=str(annotations))}, None
    if config is not None:
        settings = parse_config(["--config", config])
        splits = {
            name: find_split(split, near=Path(config))
            for name, split in (("train", settings.data.train), ("val", settings.data.val))
        }
        num_queries = settings.detector.num_queries
        given = {key: value for key, value in vars(policies).items() if value != getattr(DEFAULT_POLICIES, key)}
        policies = replace(settings.data.policies, **given)
    checked = [
        check_split(
            split.images,
            split.annotations,
            name=name,
            num_queries=num_queries,
            decode=decode,
            workers=len(os.sched_getaffinity(0)) if workers is None else workers,
            progress=show_progress,
        )
        for name, split in splits.items()
    ]
    if len(checked) == 2:
        checked = list(compare_splits(*checked))
    report = DataReport(splits=checked, policies=policies, segmentations=segmentations)
    if file is not None:
        file.write_text(json.dumps(report.as_dict(), indent=1), encoding="utf-8")
    print(report.table())
    return 2 if report.count("error") else 0


def show_progress(done: int, total: int) -> None:
    """Show on a terminal how many image files were read."""
    if sys.stderr.isatty():
        print(f"\r{done} of {total} images read", end="\n" if done == total else "", file=sys.stderr, flush=True)


COMMAND = Command(
    name="detr-backbone check-data",
    main=main,
    example="detr-backbone check-data --images data/val --annotations data/val.json",
)
