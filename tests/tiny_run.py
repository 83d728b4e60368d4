"""A run of a second or two, in this process or in processes of its own that may be killed."""

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from detr_backbone import BackboneConfig
from detr_backbone.coco.shapes import draw_shapes
from detr_backbone.coco.transforms import TransformConfig
from detr_backbone.detectors import DetectorConfig
from detr_backbone.training import DataConfig, OptimizerConfig, SplitConfig, TrainConfig, load_checkpoint, train
from detr_backbone.training.run_folder import CHECKPOINT
from detr_backbone.training.step import Learner
from tests.quick_draws import draw_quickly

StepHook = Callable[[int], None]


def tiny(shapes: Path, output: Path, **changes: Any) -> TrainConfig:
    """A configuration that trains in a second or two."""
    config = TrainConfig(
        output_dir=str(output),
        detector=DetectorConfig(
            name="deformable_detr",
            backbone=BackboneConfig(name="resnet18", return_layers=("layer1", "layer2"), hidden_dim=32),
            num_queries=5,
            nheads=4,
            enc_layers=1,
            dec_layers=2,
            dim_feedforward=32,
            with_box_refine=True,
        ),
        data=DataConfig(
            train=SplitConfig(
                images=str(shapes / "train"), annotations=str(shapes / "annotations" / "instances_train.json")
            ),
            val=SplitConfig(images=str(shapes / "val"), annotations=str(shapes / "annotations" / "instances_val.json")),
            transforms=TransformConfig(scales=(48, 64), max_size=64, crop=False, eval_size=64),
            batch_size=4,
            num_workers=0,
        ),
        optimizer=OptimizerConfig(epochs=2, lr_drop=1),
        calibration_images=4,
    )
    return replace(config, **changes)


def twelve_steps(shapes: Path, output: Path, **changes: Any) -> TrainConfig:
    """Two epochs of six steps on twelve pictures, without an evaluation, with a checkpoint after every step."""
    config = tiny(shapes, output)
    data = replace(config.data, batch_size=2, val=SplitConfig())
    return replace(config, **{"data": data, "checkpoint_every": 1, **changes})


def six_steps(folder: Path) -> TrainConfig:
    """One epoch of six steps on twelve pictures that are drawn into the folder, whose loss no random number decides."""
    draw_shapes(folder, train=12, val=4, image_size=64)
    config = twelve_steps(folder, folder / "run", checkpoint_every=0, calibration_images=0)
    detector = replace(config.detector, dropout=0.0)
    return replace(config, detector=detector, optimizer=OptimizerConfig(epochs=1))


def in_two(config: TrainConfig, output: Path) -> list[TrainConfig]:
    """The same images per step in two processes."""
    return [replace(config, output_dir=str(output), data=replace(config.data, batch_size=1))] * 2


def before_step(monkeypatch: pytest.MonkeyPatch, hook: StepHook) -> None:
    """Call a hook with the number of each step before it is taken."""
    take = Learner.step

    def step(self: Learner, batches: Any, number: int) -> Any:
        hook(number)
        return take(self, batches, number)

    monkeypatch.setattr(Learner, "step", step)


def raise_at(number: int, name: str) -> StepHook:
    """A hook that signals its own process in a step."""
    return lambda step: signal.raise_signal(getattr(signal, name)) if step == number else None


def differences(first: Path, second: Path) -> list[str]:
    """The names of what two runs ended with differently: weights, moments of the optimiser, schedule, rows."""
    a, b = (load_checkpoint(folder / CHECKPOINT) for folder in (first, second))
    rows = [[{**row, "seconds": 0} for row in checkpoint.rows] for checkpoint in (a, b)]
    names = [name for name in a.model if not torch.equal(a.model[name], b.model[name])]
    if a.average is not None and b.average is not None:
        names += [f"average {name}" for name in a.average if not torch.equal(a.average[name], b.average[name])]
    for index, state in a.optimizer["state"].items():
        other = b.optimizer["state"][index]
        names += [f"{index} {key}" for key, value in state.items() if not torch.equal(value, other[key])]
    same = {"step": a.step == b.step, "schedule": a.schedule == b.schedule, "rows": rows[0] == rows[1]}
    return names + [name for name, is_same in same.items() if not is_same]


def launch(
    hook: Callable[..., StepHook] | None, configs: TrainConfig | Sequence[TrainConfig], *hook_args: Any
) -> tuple[list[int], str]:
    """Train in processes of their own, and return their exit codes, negative ones of signals, and what they printed.

    Where one of several processes failed, those that stand still, or are there after a minute, are killed.

    Args:
        hook: makes what is called before every step, from the number of the process and `hook_args`.
        configs: of the one process, or of each of several that train together.
        hook_args: for `hook`.
    """
    configs = [configs] if isinstance(configs, TrainConfig) else configs
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision", "accelerate", "detr_backbone.training", "matplotlib.figure"])
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        started = [
            context.Process(target=_train, args=(rank, len(configs), port, log.name, hook, hook_args, config))
            for rank, config in enumerate(configs)
        ]
        _run(started)
        return [process.exitcode or 0 for process in started], Path(log.name).read_text(encoding="utf-8")


def _run(started: Sequence[Any]) -> None:
    for process in started:
        process.start()
    wait([process.sentinel for process in started])
    deadline = time.monotonic() + 60
    for process in started:
        if _stands_still(process.pid):
            process.kill()
        process.join(max(0, deadline - time.monotonic()) if any(other.exitcode for other in started) else None)
        if process.is_alive():
            process.kill()
            process.join()


def _stands_still(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] == "T"


def _train(rank: int, processes: int, port: int, log: str, hook: Any, hook_args: Any, config: TrainConfig) -> None:
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw_quickly(monkeypatch)  # as the tests' own process does
        if hook is not None:
            before_step(monkeypatch, hook(rank, *hook_args))
        train(config)
