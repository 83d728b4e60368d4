"""One run: its data, detector and place in time, opened and checked before the first step."""

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from detr_backbone.checkpoints.config import refuse_other_settings
from detr_backbone.checkpoints.detector_file import read_detector
from detr_backbone.checkpoints.load import load_detector
from detr_backbone.coco.dataset import CocoDetection
from detr_backbone.detectors import build_detector, build_postprocess
from detr_backbone.errors import CheckpointError, ConfigError
from detr_backbone.evaluation.analysis import operating_point
from detr_backbone.evaluation.result import CocoResult
from detr_backbone.padding.plan import describe_batching
from detr_backbone.training.calibrate import calibrate, describe_start, needs_calibration
from detr_backbone.training.checkpoint import MAY_CHANGE, Checkpoint, refuse_another_run, restore
from detr_backbone.training.config import TrainConfig, config_to_dict, flat
from detr_backbone.training.data import train_loader
from detr_backbone.training.inference import evaluate, without_pretrained
from detr_backbone.training.optimizer import describe_groups
from detr_backbone.training.progress import Means, RunLog
from detr_backbone.training.ranks import Ranks
from detr_backbone.training.run_folder import RunFolder
from detr_backbone.training.splits import describe_dataset, describe_images, identify_data, open_splits, resolve_classes
from detr_backbone.training.step import Learner

if TYPE_CHECKING:
    from accelerate import Accelerator


class Run:
    """One run, at a step of it: everything is opened and checked when it is made.

    Args:
        config: of the run.
        folder: where it writes, held by this run.
        accelerator: where it computes.
        ranks: its processes.

    Attributes:
        config: resolved against the data.
        val_set: the validation split, if there is one.
        learner: the detector and what changes it.
        loader, batches: the training data, and what chooses the batches of this process.
        step: optimiser steps that are done.
        total_steps, steps_per_epoch: of the run and of an epoch.
        means: of the losses of the epoch so far.
        rows: of `metrics.csv`, one per epoch.
        result: of the last evaluation in this process.
        remarks: which images are trained on and evaluated.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder, accelerator: "Accelerator", ranks: Ranks) -> None:
        from accelerate.utils import set_seed

        self.folder, self.accelerator, self.ranks = folder, accelerator, ranks
        previous, damaged = load_previous(folder, config)
        self.log = RunLog(
            is_main=accelerator.is_main_process,
            seconds=0 if previous is None else previous.seconds,
            every=config.log_every,
        )
        for message in damaged:
            self.log.say(f"skipped: {message}")
        train_set, self.val_set = open_splits(config)
        self.config = config = resolve_classes(config, train_set, self.val_set)
        self._data = identify_data(train_set, self.val_set)
        self.remarks = describe_images(train_set, self.val_set)
        ranks.refuse_differences(identify(config, self._data, previous))

        set_seed(config.seed)
        self._open_loader(train_set)
        if previous is not None:
            refuse_another_run(
                previous, config, train_set.categories, data=self._data, images_per_step=self.images_per_step
            )
        is_whole = previous is not None or config.init_from is not None
        model = build_detector(without_pretrained(config.detector) if is_whole else config.detector)
        if previous is None and config.init_from is not None:  # before weights are averaged
            source = read_detector(config.init_from)
            refuse_other_settings(source, config.detector)
            loaded = load_detector(
                model, source, init_classes=config.init_classes, category_names=train_set.category_names
            )
            transforms = config.data.transforms
            self.log.say(f"{loaded}\n{loaded.compare_images(transforms.mean, transforms.std)}")
        if config.compile:
            model.compile()
        self.learner = Learner(
            model.to(accelerator.device),
            config,
            accelerator,
            steps_per_epoch=self.steps_per_epoch,
            folder=folder.path,
        )
        if accelerator.is_main_process:
            folder.require_space(self.learner.checkpoint_bytes)
        self.postprocess = build_postprocess(config.detector, category_ids=train_set.category_ids)
        self._categories = train_set.categories
        self.step = 0
        self.rows: list[dict[str, float]] = []
        self.means = Means(None if previous is None else previous.losses)
        self.result: CocoResult | None = None
        self._threshold: float | None = None
        self._saved = time.monotonic()
        self._describe(train_set)
        self._begin(train_set, previous)

    def save(self, *, is_best: bool = False) -> None:
        """Write the state of the run as its newest checkpoint, and as its best one too.

        Raises:
            CheckpointError: it cannot be written.
        """
        self._saved = time.monotonic()
        half_way = (
            bool(self.config.overfit) and self.step < self.total_steps
        )  # of no use, and an epoch is a step or two
        if half_way:
            return
        state = self.learner.state()
        if not self.accelerator.is_main_process:
            return
        checkpoint = Checkpoint(
            **state,
            step=self.step,
            epoch=self.step // self.steps_per_epoch,
            images_per_step=self.images_per_step,
            seconds=self.log.seconds,
            losses=self.means.state(),
            rows=self.rows,
            threshold=self._threshold,
            data=self._data,
            config=config_to_dict(self.config),
            category_ids=tuple(self._categories),
            category_names=tuple(self._categories.values()),
        )
        self.folder.save(checkpoint)
        if is_best:
            self.folder.save_best(checkpoint)

    def is_due(self) -> bool:
        """Return whether it is time for a checkpoint within the epoch."""
        every, minutes = self.config.checkpoint_every, self.config.checkpoint_minutes
        by_steps = bool(every) and self.step % every == 0
        return by_steps or bool(minutes and time.monotonic() - self._saved >= 60 * minutes)

    def evaluate(self, dataset: CocoDetection) -> CocoResult:
        """Evaluate the detector as it is, and keep the result and the score of the best F1."""
        self.result, evaluator = evaluate(
            self.learner.evaluated(), self.postprocess, dataset, self.config.data, self.accelerator
        )
        self._threshold = operating_point(evaluator.matches()).score
        return self.result

    def has_stopped_improving(self) -> bool:
        """Return whether as many evaluations as configured were no better than the best before them."""
        precision = [row["AP"] for row in self.rows if "AP" in row]
        patience = self.config.early_stopping
        return bool(patience and precision) and len(precision) - 1 - precision.index(max(precision)) >= patience

    def _open_loader(self, train_set: CocoDetection) -> None:
        processes, accumulate = self.ranks.count, self.config.optimizer.accumulate_steps
        self.loader, self.batches = train_loader(
            train_set, self.config.data, seed=self.config.seed, world_size=processes, rank=self.ranks.rank
        )
        self.steps_per_epoch = self.batches.per_epoch // accumulate
        if not self.steps_per_epoch:
            raise ConfigError(
                f"`optimizer.accumulate_steps` must be at most {self.batches.per_epoch}, the batches of an epoch, got "
                f"{accumulate}"
            )
        self.total_steps = self.steps_per_epoch * self.config.optimizer.epochs
        self.images_per_step = self.batches.batch_size * processes * accumulate

    def _describe(self, train_set: CocoDetection) -> None:
        """Say what is trained on, and with which rates."""
        evaluated = "nothing" if self.val_set is None else describe_dataset(self.val_set, self.config)
        self.log.say(
            f"{describe_dataset(train_set, self.config)} to train on, {evaluated} to evaluate, "
            f"{self.steps_per_epoch} steps per epoch"
        )
        self.log.say(describe_groups(self.learner.optimizer))
        backbone: Any = self.learner.model.backbone[0]
        self.log.say(f"backbone: {describe_batching(backbone.batching, backbone.leak)}")

    def _begin(self, train_set: CocoDetection, previous: Checkpoint | None) -> None:
        """Begin at the first step, or where a checkpoint ends."""
        learner, config = self.learner, self.config
        if previous is None:
            if config.init_from is None:
                self._start_backbone(train_set)
            learner.prepare(step=0)
            return
        self.step, self.rows, self._threshold = previous.step, [*map(dict, previous.rows)], previous.threshold
        restore(previous, learner.model, learner.optimizer, learner.schedule)
        learner.prepare(step=self.step, average=previous.average)
        self.log.say(f"resumed after step {self.step} of {self.total_steps}, epoch {previous.epoch}")

    def _start_backbone(self, train_set: CocoDetection) -> None:
        """Give a backbone without weights the statistics of the data, and say what the backbone starts from."""
        model, calibrated = self.learner.model, 0
        if self.config.calibration_images and needs_calibration(model):
            calibrated = calibrate(model, self.config, train_set, images_per_step=self.images_per_step)
        self.log.say(describe_start(model, calibrated=calibrated))


def load_previous(folder: RunFolder, config: TrainConfig) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint to continue from, and what is wrong with newer ones; None for a new run.

    Raises:
        CheckpointError: there is one and `resume` is false, or there is none that is whole and `resume` asks for one.
    """
    present = folder.files()
    if config.dry_run or (config.resume == "auto" and not present):
        return None, []
    if config.resume:
        return folder.newest_valid()
    if present:
        raise CheckpointError(
            f"a run must not overwrite another | where: file={present[0]} | fix: --resume true, or another --output_dir"
        )
    return None, []


def identify(config: TrainConfig, data: Mapping[str, str], previous: Checkpoint | None) -> dict[str, str]:
    """Return what all processes of a run must have in common: settings, data, and the step to go on from."""
    settings = {key: value for key, value in flat(config_to_dict(config)) if key not in MAY_CHANGE}
    settings |= {"data.batch_size": config.data.batch_size, "strategy": config.strategy}
    settings["optimizer"] = config_to_dict(config)["optimizer"]
    return {
        "config": json.dumps(settings, sort_keys=True),
        **{f"data.{split}": sha256 for split, sha256 in data.items()},
        "resume": "" if previous is None else str(previous.step),
    }
