"""`detr-backbone predict`."""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image

from detr_backbone.coco.findings import KINDS, Finding
from detr_backbone.coco.images import examine_image
from detr_backbone.commands.command_line import Command, output_folder, require
from detr_backbone.errors import ConfigError, DataError
from detr_backbone.export import EngineName, EnginePrecision
from detr_backbone.prediction import (
    ImageFiles,
    Prediction,
    coco_results,
    find_images,
    load_predictor,
    prediction_records,
    read_image_list,
)
from detr_backbone.training.checkpoint import is_published, load_checkpoint

Item = TypeVar("Item")
Result = TypeVar("Result")
_SHOWN = 5  # files that are named on the screen; the JSON file names all
_QUALITY = 90  # of a JPEG, 1 to 95
_LONGEST_JPEG = 65500
"""Pixels of the longest side that a JPEG has here. Source: JPEG_MAX_DIMENSION of libjpeg's jmorecfg.h."""
_NOTED = ("picture_animated", "picture_16_bit", "picture_alpha")


def main(
    *,
    checkpoint: str,
    images: str,
    output: str,
    threshold: float | Literal["best"] = 0.5,
    report: str | None = None,
    limit: int | None = None,
    recursive: bool = False,
    annotations: str | None = None,
    pictures: Literal["jpg", "png", "none"] = "jpg",
    batch_size: int = 1,
    strict: bool = False,
    engine: EngineName | None = None,
    threads: int | None = None,
    precision: EnginePrecision = "float32",
    overrides: Sequence[str] = (),
) -> int:
    """Detect objects in pictures, and write them as JSON and as annotated images.

    Files that cannot be read are skipped and named, and the exit code is 1.

    Args:
        checkpoint: the trained detector, a file of `detr-backbone export`, or a published detector: a file or folder of
            DETR, Deformable DETR or transformers, or a name such as detr_r50.
        images: a picture, or a folder of pictures.
        output: the folder for predictions.json and the annotated images.
        threshold: detections with a lower score are left out, 0 to 1; `best` takes the score with the best F1 on the
            validation split, from the report of the detector or from its checkpoint.
        report: for `best`, the report's folder; if left out, the folder `report` beside the checkpoint, and where
            there is none, what training wrote into the checkpoint.
        limit: pictures to take, in the order of their names; all if left out.
        recursive: take the folders in the folder too.
        annotations: a COCO file, also one without annotations; its images are taken, and all their detections, of any
            score, are written as COCO results (detections.json) for `evaluate`.
        pictures: the format of the annotated images; none writes JSON only.
        batch_size: pictures in one forward pass.
        strict: stop at the first file that cannot be read.
        engine: for an exported file, what runs it; if left out, onnxruntime for .onnx, openvino for .xml, torch for
            .pt2.
        threads: for an exported file, threads of one pass; if left out, what the engine takes.
        precision: for an exported file in OpenVINO, what it computes in.
        overrides: words that change the configuration of the run.
    """
    if threshold != "best" and not 0 <= threshold <= 1:
        raise ConfigError(f"`--threshold` must be 0 to 1, or best, got {threshold}")
    for option, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"`--{option}` must be at least 1, got {value}")
    if pictures != "none":
        require("matplotlib", extra="train")  # its font
    score = _best_score(report, checkpoint) if threshold == "best" else float(threshold)
    folder = output_folder(output)
    source = Path(images) if Path(images).is_dir() else Path(images).parent
    if folder.resolve() == source.resolve():
        raise ConfigError(f"`--output` must be another folder than that of the pictures, got {output}")
    files = find_images(images, recursive=recursive) if annotations is None else None
    predictor = load_predictor(checkpoint, engine=engine, threads=threads, precision=precision, overrides=overrides)
    files = files or read_image_list(images, str(annotations), predictor.categories)
    run = _Run(files, folder, score=score, pictures=pictures, strict=strict, checkpoint=checkpoint)
    with ThreadPoolExecutor(1) as readers, ThreadPoolExecutor(1) as writers:
        read = ahead(readers, run.read, files.names[:limit], count=2 * batch_size)
        readable = ((name, picture) for name, picture in read if picture is not None)
        written: deque[Future[None]] = deque()
        try:
            while batch := list(islice(readable, batch_size)):
                found = predictor([picture for _, picture in batch], batch_size=batch_size)
                for (name, picture), prediction in zip(batch, found, strict=True):
                    written.append(writers.submit(run.write, name, picture, prediction))
                while len(written) > 2 * batch_size:
                    written.popleft().result()
            for future in written:
                future.result()
            run.is_complete = True
        finally:
            readers.shutdown(cancel_futures=True)
            writers.shutdown()
            run.save(predictor.categories, with_results=annotations is not None)
    if not run.count:
        name, reason = next(iter(sorted(run.skipped.items())))
        raise DataError(
            f"no picture could be read | where: file={files.folder / name} | got {reason}, {len(run.skipped)} skipped "
            "| fix: give pictures that can be read"
        )
    print(run.summary())
    if pictures != "none":
        from detr_backbone.visualize.fonts import font_warning

        if warning := font_warning(predictor.categories.values()):
            print(warning)
    return 1 if run.skipped else 0


class _Run:
    """What is read, detected and written; the steps run in threads of their own, one for each of `read` and `write`."""

    def __init__(
        self, files: ImageFiles, folder: Path, *, score: float, pictures: str, strict: bool, checkpoint: str
    ) -> None:
        self.files = files
        self.folder = folder
        self.score = score
        self.pictures = pictures
        self.strict = strict
        self.checkpoint = checkpoint
        self.skipped = dict(files.skipped)
        self.is_complete = False
        self._notes: Counter[str] = Counter()
        self._images: list[dict[str, Any]] = []
        self._records: list[dict[str, Any]] = []
        self._results: list[dict[str, Any]] = []
        self._empty = 0
        self._too_long = 0
        stems = Counter(Path(name).with_suffix("") for name in files.names)
        self._drawn = {
            name: Path(name).with_suffix("") if stems[Path(name).with_suffix("")] == 1 else Path(name)
            for name in files.names
        }
        if strict and self.skipped:
            name, reason = next(iter(self.skipped.items()))
            raise DataError(
                f"a file is no picture | where: file={files.folder / name} | got {reason} | fix: remove it, or leave "
                "out --strict"
            )

    def read(self, name: str) -> Image.Image | None:
        """Return a picture, or None where the file is skipped."""
        picture, findings = examine_image(self.files.folder / name, size=self.files.sizes.get(name))
        if picture is None:
            if self.strict:
                raise findings[-1].error
            self.skipped[name] = _reason(findings[-1])
        else:
            self._notes.update(finding.kind for finding in findings if finding.kind in _NOTED)
        return picture

    def write(self, name: str, picture: Image.Image, prediction: Prediction) -> None:
        """Take the detections of a picture down, and draw them."""
        shown = prediction.above(self.score).clipped()
        self._images.append({"file_name": name, "width": picture.width, "height": picture.height})
        self._records += prediction_records(shown, name)
        self._empty += not len(shown)
        if name in self.files.image_ids:
            self._images[-1]["id"] = self.files.image_ids[name]
            self._results += coco_results(prediction, self.files.image_ids[name])
        if self.pictures != "none":
            from detr_backbone.visualize import draw_detections

            labels = shown.category_ids.tolist()
            drawn = draw_detections(picture, shown.boxes, shown.names, shown.scores.tolist(), labels)
            ending = "png" if max(drawn.size) > _LONGEST_JPEG else self.pictures
            self._too_long += ending != self.pictures
            path = self.folder / f"{self._drawn[name]}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn.save(path, quality=_QUALITY, subsampling=0)

    def save(self, categories: Any, *, with_results: bool) -> None:
        """Write the JSON files; where something is missing in them, they say so."""
        content = {
            "checkpoint": self.checkpoint,
            "threshold": self.score,
            "partial": bool(self.skipped) or not self.is_complete,
            "skipped": [{"file_name": name, "reason": reason} for name, reason in sorted(self.skipped.items())],
            "categories": [{"id": category_id, "name": name} for category_id, name in categories.items()],
            "images": self._images,
            "predictions": self._records,
        }
        (self.folder / "predictions.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        if with_results:
            (self.folder / "detections.json").write_text(json.dumps(self._results), encoding="utf-8")

    @property
    def count(self) -> int:
        """How many pictures were read."""
        return len(self._images)

    def summary(self) -> str:
        """Return what is said on the screen at the end."""
        detections, images = len(self._records), len(self._images)
        lines = [
            f"{detections} detections with a score of at least {self.score:.3g} in {images} pictures: {self.folder}",
            f"{self._empty} of the pictures have none",
        ]
        lines += [f"{KINDS[kind].what}: {count} pictures" for kind, count in self._notes.items()]
        if self._too_long:
            lines.append(
                f"drawn as PNG, since a JPEG has at most {_LONGEST_JPEG} pixels a side: {self._too_long} pictures"
            )
        if self.skipped:
            lines.append(f"files skipped, so that predictions.json is partial: {len(self.skipped)}")
            lines += [f"  {name}: {reason}" for name, reason in sorted(self.skipped.items())[:_SHOWN]]
            if len(self.skipped) > _SHOWN:
                lines.append(f"  and {len(self.skipped) - _SHOWN} more, named in predictions.json")
        if self.files.others:
            endings = ", ".join(f"{ending} {count}" for ending, count in self.files.others.items())
            lines.append(f"files that are no pictures, left out: {endings}")
        if self.files.folders:
            lines.append(f"folders not entered: {self.files.folders} (--recursive takes them)")
        return "\n".join(lines)


def ahead(
    executor: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], *, count: int
) -> Iterator[tuple[Item, Result]]:
    """Return each item with what the function gives for it, computed ahead of its use by at most `count` items."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        waiting.append((item, executor.submit(function, item)))
        if len(waiting) > count:
            first, future = waiting.popleft()
            yield first, future.result()
    for item, future in waiting:
        yield item, future.result()


def _reason(finding: Finding) -> str:
    return finding.got if finding.kind == "picture_unreadable" else f"{KINDS[finding.kind].what}: {finding.got}"


def _best_score(report: str | None, checkpoint: str) -> float:
    """Return the score with the best F1 on the validation split, of a report or as training found it.

    Raises:
        ConfigError: neither knows one, or the report is damaged.
    """
    file = (Path(checkpoint).parent / "report" if report is None else Path(report)) / "report.json"
    if report is None and not file.exists() and not is_published(checkpoint):
        threshold = load_checkpoint(checkpoint).threshold
        if threshold is not None:
            return threshold
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["operating_point"]["score"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "`--threshold best` needs the report of the detector, or a checkpoint that was evaluated in training | "
            f"where: file={file} | got {type(error).__name__} | fix: detr-backbone evaluate --report, and give its "
            "folder as --report"
        ) from error


COMMAND = Command(
    name="detr-backbone predict",
    main=main,
    example="detr-backbone predict --checkpoint runs/shapes/checkpoint.pt --images data/shapes/val --output found",
)
