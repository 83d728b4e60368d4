"""A doctor for "AP stays 0": a detector that cannot learn a few images by heart will not learn many."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from detr_backbone.training.config import TrainConfig

STEPS = 300
LEARNT = 0.5
"""AP from which the images count as learnt; by heart it is near 1."""


def overfit_config(config: TrainConfig) -> TrainConfig:
    """Return the configuration of a run that learns some training images by heart, and is evaluated on the same.

    Nothing is varied: no crop, no flip, no dropout, one scale, one learning rate. It takes 300 steps, in a folder of
    its own beside that of the run.
    """
    transforms = replace(
        config.data.transforms,
        scales=(config.data.transforms.eval_size,),
        crop=False,
        horizontal_flip=0.0,
        vertical_flip=0.0,
        color_jitter=0.0,
    )
    subset = replace(config.data.train.subset, count=config.overfit, share=None)
    split = replace(config.data.train, subset=subset)
    batch_size = min(config.data.batch_size, config.overfit)
    epochs = math.ceil(STEPS / max(1, config.overfit // batch_size))
    return replace(
        config,
        output_dir=str(Path(config.output_dir) / f"overfit_{config.overfit}"),
        detector=replace(config.detector, dropout=0.0),
        data=replace(config.data, train=split, val=split, transforms=transforms, batch_size=batch_size, num_workers=0),
        optimizer=replace(
            config.optimizer, epochs=epochs, schedule="step", lr_drop=epochs, warmup_steps=0, accumulate_steps=1
        ),
        calibration_images=min(config.calibration_images, config.overfit),
        eval_every=epochs,
        early_stopping=0,
        ema_decay=0.0,
    )


def overfit_verdict(rows: Sequence[Mapping[str, float]], config: TrainConfig) -> str:
    """Return whether the images were learnt, and where to look if they were not."""
    first, last = rows[0], rows[-1]
    numbers = (
        f"AP {100 * last['AP']:.1f} on the {config.overfit} images it was trained on, "
        f"loss {first['loss']:.2f} -> {last['loss']:.2f}"
    )
    if last["AP"] >= LEARNT:
        return (
            f"it learns: {numbers}; if AP stays 0 on others, look at the data, the rates of the schedule, or the epochs"
        )
    if last["loss"] > 0.9 * first["loss"]:
        return (
            f"it does not learn: {numbers}; look at optimizer.lr ({config.optimizer.lr:g}), at what is frozen and what "
            "starts at random (the lines at the start of the run), and at the boxes (check_data.py)"
        )
    return f"it learns slowly: {numbers}; raise optimizer.lr, or train longer than {STEPS} steps to see where it ends"
