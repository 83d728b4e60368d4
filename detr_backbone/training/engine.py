"""Training a detector: one loop, on a CPU, a GPU, or several of them under DDP, that ends with COCO's numbers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from detr_backbone.calibration import calibrate_frozen_batch_norm
from detr_backbone.checkpoints.load import load_detector
from detr_backbone.coco.annotations import refuse
from detr_backbone.coco.dataset import CocoDetection
from detr_backbone.coco.findings import KINDS
from detr_backbone.coco.rules import more_boxes_than_queries
from detr_backbone.coco.subset import image_ids_sha256
from detr_backbone.detectors import DETR, DeformableDETR, build_criterion, build_detector, build_postprocess
from detr_backbone.errors import CheckpointError, ConfigError
from detr_backbone.evaluation.result import CocoResult
from detr_backbone.frozen_batch_norm import FrozenBatchNorm2d
from detr_backbone.nested_tensor import NestedTensor
from detr_backbone.training.checkpoint import Checkpoint, load_checkpoint, refuse_another_run, restore, save_checkpoint
from detr_backbone.training.config import TrainConfig, config_to_dict, save_config
from detr_backbone.training.data import Loader, open_split, seed_epoch, train_loader
from detr_backbone.training.devices import build_accelerator
from detr_backbone.training.inference import evaluate, without_pretrained
from detr_backbone.training.normalisation import check_normalisation
from detr_backbone.training.optimizer import build_optimizer, build_schedule, clip_gradient, describe_groups
from detr_backbone.training.progress import Means, RunLog

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT = "checkpoint.pt"


def train(config: TrainConfig) -> CocoResult:
    """Train the detector of a configuration and return its numbers on the validation split after the last epoch.

    Writes into `config.output_dir`: `config.yaml` (resolved), `metrics.csv` (a row per epoch) and `checkpoint.pt`
    (after every epoch). Runs in one process, or in several under `torchrun`.

    Raises:
        ConfigError: the configuration contradicts itself or the data.
        AnnotationError, DataError: a dataset contradicts itself, or files are missing.
        NumericsError: a loss or an output is not finite; the message names it and the images.
        CheckpointError: `resume` finds no checkpoint or that of another run; without it, the folder holds one.
    """
    accelerator = build_accelerator(config.mixed_precision)
    try:
        return _train(config, accelerator)
    finally:
        accelerator.end_training()
        accelerator.free_memory()


def _train(config: TrainConfig, accelerator: "Accelerator") -> CocoResult:
    from accelerate.utils import set_seed

    folder = Path(config.output_dir)
    previous = _previous_checkpoint(folder / CHECKPOINT, resume=config.resume)
    train_set, val_set = _open_splits(config)
    config = _resolved(config, train_set, val_set)
    log = RunLog(folder, is_main=accelerator.is_main_process)

    set_seed(config.seed)
    rank = accelerator.process_index
    loader = train_loader(train_set, config.data, seed=config.seed, world_size=accelerator.num_processes, rank=rank)
    model = _build_model(config, resumed=previous is not None).to(accelerator.device)
    check_normalisation(config)
    criterion = build_criterion(config.detector).to(accelerator.device)
    postprocess = build_postprocess(config.detector, category_ids=train_set.category_ids)
    optimizer = build_optimizer(model, config.optimizer)
    schedule = build_schedule(optimizer, config.optimizer, len(loader))
    log.say(
        f"{_described(train_set, config)} to train on, {_described(val_set, config)} to evaluate, "
        f"{len(loader)} steps per epoch"
    )
    log.say(describe_groups(optimizer))
    if previous is not None:
        refuse_another_run(previous, config, train_set.categories)
        restore(previous, model, optimizer, schedule)
        log.say(f"resumed after epoch {previous.epoch}")
    else:
        seed_epoch(loader, config.seed, epoch=0, rank=rank)
        log.say(_start(model, config, loader, accelerator, train_set.category_names))
    if accelerator.is_main_process:
        save_config(config, folder / "config.yaml", remarks=_identities(train_set, val_set))
    # Accelerate wraps the model for autocast and DDP; the loader stays ours, so that a resumed run repeats it.
    prepared = accelerator.prepare(model)

    result: CocoResult | None = None
    for epoch in range(previous.epoch + 1 if previous else 1, config.optimizer.epochs + 1):
        seed_epoch(loader, config.seed, epoch, rank=rank)
        means, lr = Means(), float(schedule.get_last_lr()[0])
        prepared.train()
        for images, targets in log.steps(loader, means, f"epoch {epoch}/{config.optimizer.epochs}"):
            losses = criterion(prepared(images.to(accelerator.device, non_blocking=True), targets), targets)
            losses["loss"] = criterion.weighted_sum(losses)
            accelerator.backward(losses["loss"])
            clip_gradient(model, config.optimizer.clip_max_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            means.add(losses, images)
        if accelerator.is_main_process:
            state = Checkpoint(
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                schedule=schedule.state_dict(),
                epoch=epoch,
                config=config_to_dict(config),
                category_ids=train_set.category_ids,
                category_names=train_set.category_names,
            )
            save_checkpoint(state, folder / CHECKPOINT)
        stats: Mapping[str, float] = {}
        if epoch == config.optimizer.epochs or epoch % config.eval_every == 0:
            result, _ = evaluate(model, postprocess, val_set, config.data, accelerator)
            stats = result.stats
        log.epoch(epoch, step=epoch * len(loader), lr=lr, means=means, stats=stats)
    if result is None:  # resumed after the last epoch
        result, _ = evaluate(model, postprocess, val_set, config.data, accelerator)
    log.say(str(result))
    return result


def _build_model(config: TrainConfig, *, resumed: bool) -> DETR | DeformableDETR:
    whole = resumed or config.init_from is not None
    model = build_detector(without_pretrained(config.detector) if whole else config.detector)
    if config.compile:
        model.compile()
    return model


def _start(
    model: DETR | DeformableDETR,
    config: TrainConfig,
    loader: Loader,
    accelerator: "Accelerator",
    category_names: Sequence[str],
) -> str:
    """Give a new run what it starts from, and say what that is."""
    if config.init_from is not None:
        loaded = load_detector(model, config.init_from, init_classes=config.init_classes, category_names=category_names)
        return f"{loaded}\n{loaded.compare_images(config.data.transforms.mean, config.data.transforms.std)}"
    report = model.backbone[0].weights
    if report is not None:
        return f"backbone: {report}"
    if not any(isinstance(module, FrozenBatchNorm2d) for module in model.backbone.modules()):
        return "backbone: random weights"
    if not config.calibration_images:
        return "backbone: random weights, and frozen BatchNorm without statistics: expect it not to train"
    taken = calibrate_frozen_batch_norm(model.backbone, _images(loader, config.calibration_images, accelerator))
    return f"backbone: random weights, frozen BatchNorm took its statistics from {taken} training images"


def _open_splits(config: TrainConfig) -> tuple[CocoDetection, CocoDetection]:
    train_set = open_split(config.data, config.data.train, train=True)
    crowded = more_boxes_than_queries(
        train_set.boxes_per_image,
        train_set.image_ids,
        config.detector.num_queries,
        f"file={train_set.annotations.source}",
    )
    refuse(crowded, config.data.policies)
    train_set.findings |= {one.kind: one.count for one in crowded}
    return train_set, open_split(config.data, config.data.val, train=False)


def _described(dataset: CocoDetection, config: TrainConfig) -> str:
    done = {"drop": " dropped", "clamp": " clipped", "crowd": " taken as crowds"}
    notes = [
        f"{KINDS[kind].what}: {count}{done.get(config.data.policies.action(kind), '')}"
        for kind, count in dataset.findings.items()
    ]
    return (dataset.annotations.part or f"{len(dataset)} images") + (f" ({'; '.join(notes)})" if notes else "")


def _identities(train_set: CocoDetection, val_set: CocoDetection) -> list[str]:
    """What tells later whether another run saw the same images."""
    return [
        f"data.{split}: {len(dataset)} images, ids sha256 {image_ids_sha256(dataset.image_ids)}"
        for split, dataset in (("train", train_set), ("val", val_set))
    ]


def _previous_checkpoint(path: Path, *, resume: bool) -> Checkpoint | None:
    if resume:
        return load_checkpoint(path)
    if path.exists():
        raise CheckpointError(
            f"a run must not overwrite another | where: file={path} | fix: --resume true, or another --output_dir"
        )
    return None


def _resolved(config: TrainConfig, train_set: CocoDetection, val_set: CocoDetection) -> TrainConfig:
    """The configuration with the number of classes that the data has."""
    if train_set.categories != val_set.categories:
        raise ConfigError(
            f"`data.train` and `data.val` must have the same categories, got {train_set.categories} and "
            f"{val_set.categories}"
        )
    asked = config.detector.num_classes
    if asked not in (None, train_set.num_classes):
        raise ConfigError(f"`detector.num_classes` must be null or {train_set.num_classes} as in the data, got {asked}")
    return replace(config, detector=replace(config.detector, num_classes=train_set.num_classes))


def _images(loader: Loader, count: int, accelerator: "Accelerator") -> Iterator[NestedTensor]:
    """Batches of images until `count` of them came."""
    for images, _ in loader:
        yield images.to(accelerator.device)
        count -= len(images)
        if count <= 0:
            return
