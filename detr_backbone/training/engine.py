"""Training a detector: one loop, on a CPU, a GPU, or several of them under DDP, that ends with COCO's numbers."""

import sys
from collections.abc import Mapping
from contextlib import closing, nullcontext

from detr_backbone.evaluation.result import CocoResult
from detr_backbone.training.config import TrainConfig, save_config
from detr_backbone.training.curves import draw_curves
from detr_backbone.training.devices import build_accelerator
from detr_backbone.training.dry_run import describe_run
from detr_backbone.training.finite import replay
from detr_backbone.training.normalisation import check_normalisation
from detr_backbone.training.overfit import overfit_config, overfit_verdict
from detr_backbone.training.progress import Means, in_percent, write_rows
from detr_backbone.training.ranks import Ranks
from detr_backbone.training.run import Run
from detr_backbone.training.run_folder import CURVES, METRICS, RunFolder
from detr_backbone.training.signals import Stopped, StopSignals
from detr_backbone.training.trackers import require_trackers, start_trackers, track


def train(config: TrainConfig) -> CocoResult | None:
    """Train the detector of a configuration and return its numbers on the validation split after the last epoch.

    Writes into `config.output_dir`: `config.yaml` (resolved), `metrics.csv` (a row per epoch), `curves.png`,
    `checkpoint.pt` (after every epoch, and as often as configured), those before it, and `checkpoint_best.pt`. Runs in
    one process, or in several under `torchrun`. With `dry_run`, `overfit` or `replay` it does what those say instead.

    Returns:
        None without a validation split, and where nothing was trained.

    Raises:
        ConfigError: the configuration contradicts itself or the data, or the folder cannot be used.
        AnnotationError, DataError: a dataset contradicts itself, or files are missing.
        NumericsError: a loss or an output is not finite; the message names it and the images.
        CheckpointError: `resume` finds no whole checkpoint or that of another run; without it, the folder holds one; or
            a checkpoint cannot be written.
        DistributedError: the processes were given different things, or one of them is gone.
        ResourceError: memory or the disk is full, or a process that reads images ended.
        Stopped: a signal came; the run goes on with `resume`.
    """
    if config.replay is not None:
        print(replay(config.replay))
        return None
    check_normalisation(config)
    require_trackers(config.trackers)
    if config.overfit:
        config = overfit_config(config)
    accelerator = build_accelerator(
        config.mixed_precision,
        timeout=config.collective_timeout,
        trackers=config.trackers,
        folder=config.output_dir,
    )
    ranks = Ranks(accelerator, timeout=config.collective_timeout)
    folder = RunFolder(config.output_dir, keep=config.keep_checkpoints)
    try:
        with ranks.together(), folder.claim() if accelerator.is_main_process else nullcontext():
            run = Run(config, folder, accelerator, ranks)
            if config.dry_run:
                run.log.say(describe_run(run))
                return None
            return run_to_the_end(run)
    except (Stopped, KeyboardInterrupt) as end:
        # Ctrl-C itself comes before the first step, or a second time while the last step is saved.
        stop = end if isinstance(end, Stopped) else Stopped("stopped by Ctrl-C at once | go on with --resume auto")
        if accelerator.is_main_process:
            print(stop.message, file=sys.stderr)
        raise stop from None
    finally:
        accelerator.end_training()
        accelerator.free_memory()


def run_to_the_end(run: Run) -> CocoResult | None:
    """Take the steps that are left of a run, and return the numbers of its last evaluation."""
    folder, config, is_main = run.folder, run.config, run.accelerator.is_main_process
    if is_main:
        save_config(config, folder.path / "config.yaml", remarks=run.remarks)
        if run.rows:  # of a run that goes on: it may have ended between its checkpoint and its table
            write_rows(run.rows, folder.path / METRICS)
    start_trackers(run.accelerator, config)
    run.ranks.watch()
    with StopSignals(f"go on with --resume auto | where: file={folder.newest}") as signals:
        while True:
            if len(run.rows) < run.step // run.steps_per_epoch:
                finish_epoch(run, signals)
            if run.step >= run.total_steps or run.has_stopped_improving():
                break
            train_epoch(run, signals)
        if run.result is None and run.val_set is not None:  # resumed after the last epoch
            with signals.at_once():
                run.evaluate(run.val_set)
    if run.result is not None:
        run.log.say(str(run.result))
    if config.overfit:
        run.log.say(overfit_verdict(run.rows, config))
    if is_main and run.rows:
        draw_curves(run.rows, folder.path / CURVES)
    return run.result


def train_epoch(run: Run, signals: StopSignals) -> None:
    """Take the steps that are left of an epoch, and save what they led to.

    Raises:
        Stopped: a signal came in some process; the last step is saved.
    """
    accumulate, per_epoch = run.config.optimizer.accumulate_steps, run.steps_per_epoch
    done, epoch = run.step % per_epoch, run.step // per_epoch + 1
    run.batches.start(epoch, batch=done * accumulate)
    if not done:
        run.means = Means()
    with closing(iter(run.loader)) as loaded:
        steps = run.log.steps(
            zip(*[loaded] * accumulate, strict=False),
            run.means,
            f"epoch {epoch}/{run.config.optimizer.epochs}",
            done=done,
            per_epoch=per_epoch,
            left_after=run.total_steps - epoch * per_epoch,
        )
        for batches in steps:
            losses = run.learner.step(batches, run.step)
            for one, (images, _) in zip(losses, batches, strict=True):
                run.means.add(one, images)
            run.step += 1
            stop, save = run.ranks.agree(bool(signals.name), run.step % per_epoch == 0 or run.is_due())
            if save or stop:
                run.save()
            if stop:
                run.ranks.close()
                raise signals.stopped()


def finish_epoch(run: Run, signals: StopSignals) -> None:
    """Evaluate where it is time to, and write the row of the epoch; what the epoch led to is saved before."""
    epoch = run.step // run.steps_per_epoch
    stats: Mapping[str, float] = {}
    is_time = epoch == run.config.optimizer.epochs or epoch % run.config.eval_every == 0
    if is_time and run.val_set is not None:
        with signals.at_once():
            stats = run.evaluate(run.val_set).stats
    row = {
        "epoch": epoch,
        "step": run.step,
        "seconds": run.log.seconds,
        "lr": run.learner.rate_at(run.step - run.steps_per_epoch),
        **run.means.values(),
        **stats,
    }
    is_best = bool(stats) and all(stats["AP"] > earlier["AP"] for earlier in run.rows if "AP" in earlier)
    run.rows.append(row)
    run.save(is_best=is_best)
    if run.accelerator.is_main_process:
        write_rows(run.rows, run.folder.path / METRICS)
    run.log.epoch(row)
    if run.config.trackers:
        track(run.accelerator, in_percent(row))
