"""How fast variants of Deformable DETR learn: python benchmarks/convergence.py --seeds 3 --parallel 8 --device cuda.

Every variant is trained with every seed on the recipe's data, several runs beside each other, and judged on its
validation split. Runs of one seed see the same images in the same order, so that variants are compared in pairs. A run
whose detections are in the output folder is not repeated: an interrupted command goes on, and several commands, such as
one on a GPU and one on the CPU, may fill one folder. `convergence.md` there is written after every run.
"""

import json
import math
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch

from detr_backbone.coco.annotations import CocoAnnotations, load_annotations
from detr_backbone.coco.shapes import draw_shapes
from detr_backbone.commands.command_line import Command
from detr_backbone.detectors import build_postprocess
from detr_backbone.errors import ConfigError
from detr_backbone.evaluation.evaluator import CocoEvaluator
from detr_backbone.evaluation.intervals import compare, resample_intervals
from detr_backbone.evaluation.matching import Matches
from detr_backbone.training import (
    TrainConfig,
    build_accelerator,
    detector_of,
    evaluate,
    load_checkpoint,
    open_split,
    parse_config,
    train,
)

_PUBLISHED = (
    "two_stage=false",
    "anchor_size=0.05",
    "query_selection=published",
    "dn_number=0",
    "label_loss=focal",
)  # whatever the recipe says
_TWO_STAGE = (*_PUBLISHED, "two_stage=true")
_ANCHORS = (*_TWO_STAGE, "anchor_size=0.25")
_MIXED = (*_ANCHORS, "query_selection=mixed")
_DENOISING = (*_MIXED, "dn_number=30")
VARIANTS: dict[str, tuple[str, ...]] = {
    "published": _PUBLISHED,
    "mal": (*_PUBLISHED, "label_loss=mal"),
    "two_stage": _TWO_STAGE,
    "anchors": _ANCHORS,
    "anchors_mal": (*_ANCHORS, "label_loss=mal"),
    "mixed": _MIXED,
    "mixed_mal": (*_MIXED, "label_loss=mal"),
    "denoising": _DENOISING,
    "denoising_mal": (*_DENOISING, "label_loss=mal"),
}
"""Options of the detector by name; each separates one technique from the others."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A variant trained with a seed, and what came of it."""

    variant: str
    seed: int
    recipe: str
    """All that the runs of a table share: configuration, steps, precision."""
    device: str
    seconds: float
    """Of training and its evaluation, among the other runs."""
    ap: float

    def path(self, folder: Path) -> Path:
        """The file of its detections; beside it, under another ending, the run itself."""
        return _detections(folder, self.variant, self.seed)


def main(
    *,
    config: str = "configs/shapes.yaml",
    variants: str = ",".join(VARIANTS),
    seeds: int = 3,
    steps: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    parallel: int = 1,
    threads: int = 1,
    mixed_precision: Literal["no", "bf16"] = "no",
    reference: str = "published",
    output: str = "runs/convergence",
) -> None:
    """Train variants with several seeds, and write a table of their AP and of their paired differences.

    Args:
        config: the recipe that is varied; the data of shapes.yaml is drawn where it is missing.
        variants: names out of VARIANTS, with commas between them.
        seeds: how many: 0, 1, ...
        steps: optimiser steps of each run, below an epoch or whole epochs; the recipe's if left out.
        device: where runs compute; auto takes a GPU where there is one.
        parallel: runs beside each other.
        threads: of each run.
        mixed_precision: bf16 computes the detector under autocast.
        reference: the variant that all others are compared with.
        output: the folder of runs and table.
    """
    names = variants.split(",")
    unknown = [name for name in (*names, reference) if name not in VARIANTS]
    if unknown:
        raise ConfigError(f"`variants` must be among {list(VARIANTS)}, got {unknown}")
    if min(seeds, parallel, threads) < 1:
        raise ConfigError(f"`seeds`, `parallel`, `threads` must be at least 1, got {seeds}, {parallel}, {threads}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("`device` must be auto or cpu without a CUDA device, got cuda")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the processes that are started below
    os.environ["OMP_NUM_THREADS"] = str(threads)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    precision = ["--mixed_precision", mixed_precision]
    base = parse_config(["--config", config, *precision])
    if base.data.train.images == "data/shapes/train":
        draw_shapes("data/shapes")
    epochs, length = _length(base, steps)
    recipe = f"{config}, {epochs}, {mixed_precision}"

    missing = [(name, seed) for seed in range(seeds) for name in names if not _detections(folder, name, seed).exists()]
    print(f"{len(missing)} runs to train, {parallel} beside each other", flush=True)
    failed = []
    with ProcessPoolExecutor(parallel, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = {
            pool.submit(_train, name, seed, recipe, output, ["--config", config, *precision, *length]): (name, seed)
            for name, seed in missing
        }
        for job in as_completed(jobs):
            name, seed = jobs[job]
            if error := job.exception():  # the other runs go on
                failed.append(f"{name} seed {seed}: {error} | where: file={_detections(folder, name, seed, '.log')}")
                continue
            run = job.result()
            print(f"{name} seed {seed}: AP {100 * run.ap:.1f}, {run.seconds:.0f} s on {run.device}", flush=True)
            _write_table(folder, base, recipe, reference)
    _write_table(folder, base, recipe, reference)
    print((folder / "convergence.md").read_text(encoding="utf-8"))
    if failed:
        raise SystemExit("\n".join(failed))


def _length(base: TrainConfig, steps: int | None) -> tuple[str, list[str]]:
    """Return the length of a run in words, and the options that make it."""
    images = len(load_annotations(base.data.train.annotations, policies=base.data.policies).image_ids)
    per_epoch = images // base.data.batch_size
    epochs = base.optimizer.epochs if steps is None else max(1, steps // per_epoch)
    options = ["--optimizer.epochs", str(epochs), "--eval_every", str(epochs)]
    if steps is not None and steps < per_epoch:
        options += ["--data.train.subset.count", str(steps * base.data.batch_size)]
    elif steps is not None and steps % per_epoch:
        raise ConfigError(f"`steps` must be below the {per_epoch} of an epoch or a multiple of them, got {steps}")
    return f"{steps or epochs * per_epoch} steps", options


def _train(variant: str, seed: int, recipe: str, output: str, arguments: list[str]) -> Run:
    """Train one run in this process, and write its detections and what it was."""
    path = _detections(Path(output), variant, seed)
    with path.with_suffix(".log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    run_folder = path.with_suffix("")
    shutil.rmtree(run_folder, ignore_errors=True)  # of a run that was cut off
    options = [f"--detector.{option}" for option in VARIANTS[variant]]
    config = parse_config([*arguments, *options, "--output_dir", str(run_folder), "--seed", str(seed)])
    start = time.perf_counter()
    result = train(config)
    seconds = time.perf_counter() - start
    assert result is not None  # the recipe evaluates

    model, config = detector_of(load_checkpoint(run_folder / "checkpoint.pt"))
    accelerator = build_accelerator(config.mixed_precision)
    validation = open_split(config.data, config.data.val, train=False)
    postprocess = build_postprocess(config.detector, category_ids=validation.category_ids)
    _, evaluator = evaluate(model.to(accelerator.device), postprocess, validation, config.data, accelerator)
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    run = Run(variant=variant, seed=seed, recipe=recipe, device=device, seconds=seconds, ap=float(result.stats["AP"]))
    path.with_suffix(".run").write_text(json.dumps(asdict(run)), encoding="utf-8")
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(evaluator.detections), encoding="utf-8")
    unfinished.rename(path)
    return run


def _detections(folder: Path, variant: str, seed: int, ending: str = ".json") -> Path:
    return folder / f"{variant}-{seed}{ending}"


def _write_table(folder: Path, base: TrainConfig, recipe: str, reference: str) -> None:
    """Write what is in the folder: AP of each run with its interval, and differences to the reference in pairs."""
    found = [Run(**json.loads(path.with_suffix(".run").read_text())) for path in sorted(folder.glob("*-*.json"))]
    others = {run.recipe for run in found} - {recipe}
    if others:
        raise ConfigError(
            f"`output` holds runs of another recipe: got {sorted(others)}, expected {recipe}; name another"
        )
    annotations = load_annotations(base.data.val.annotations, policies=base.data.policies)
    runs = {(run.variant, run.seed): run for run in found}
    matches = {key: _matches(run.path(folder), annotations) for key, run in runs.items()}
    lines = [
        f"{recipe}; torch {torch.__version__}; {', '.join(sorted({run.device for run in found}))}.",
        f"AP in percent on {len(annotations.image_ids)} images: of each run with the 95 % interval over images; of",
        f"a variant the mean over seeds, its difference to {reference} with the same seeds as mean and 95 % interval",
        "over seeds, and how many of these pairs differ by more than chance over images (p < 0.05).",
        "",
        "| variant | runs | mean | difference | pairs that differ | seconds of a run |",
        "|---|---|---|---|---|---|",
    ]
    for variant in [name for name in VARIANTS if any(name == key[0] for key in runs)]:
        mine = {seed: run for (name, seed), run in sorted(runs.items()) if name == variant}
        each = ", ".join(str(resample_intervals(matches[variant, seed], resamples=200).stats["AP"]) for seed in mine)
        pairs = [
            compare(matches[reference, seed], matches[variant, seed], resamples=200).stats["AP"]
            for seed in mine
            if variant != reference and (reference, seed) in matches
        ]
        told = f"{sum(pair.p < 0.05 for pair in pairs)} of {len(pairs)}" if pairs else "-"
        mean = statistics.mean(run.ap for run in mine.values())
        seconds = statistics.mean(run.seconds for run in mine.values())
        difference = _over_seeds([100 * (pair.b - pair.a) for pair in pairs])
        lines.append(f"| {variant} | {each} | {100 * mean:.1f} | {difference} | {told} | {seconds:.0f} |")
    (folder / "convergence.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _matches(path: Path, annotations: CocoAnnotations) -> Matches:
    evaluator = CocoEvaluator(annotations)
    evaluator.load(path)
    return evaluator.matches()


def _over_seeds(values: list[float]) -> str:
    """Return mean and interval by Student's distribution; the mean alone of one seed."""
    from scipy.special import stdtrit

    if not values:
        return "-"
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:+.1f}"
    half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


if __name__ == "__main__":
    EXAMPLE = "python benchmarks/convergence.py"
    sys.exit(Command(name="python benchmarks/convergence.py", main=main, example=EXAMPLE).run(sys.argv[1:]))
