"""What a run would be: one batch through everything, then levels, parameters, rates, steps, time and memory."""

import resource
import sys
import time
from itertools import islice
from typing import Any

import torch
from torch import nn

from detr_backbone.training.progress import duration
from detr_backbone.training.run import Run


def describe_run(run: Run) -> str:
    """Take one step and evaluate one batch, keep nothing of it, and return what the run would be, for people to read.

    Raises:
        As training does: what would fail in the first step fails here.
    """
    learner, config, device = run.learner, run.config, run.accelerator.device
    run.batches.start(epoch=1)
    batches = list(islice(run.loader, config.optimizer.accumulate_steps))
    start = time.monotonic()
    losses = learner.step(batches, 0)
    seconds = time.monotonic() - start
    images, _ = batches[0]
    with torch.no_grad():
        detector: Any = learner.evaluated().eval()
        levels = detector.backbone[0](images.to(device))
        strides = [round(images.tensors.shape[-1] / level.tensors.shape[-1]) for level in levels.values()]
        run.postprocess(detector(images.to(device)), torch.tensor(images.sizes, device=device))
    lines = [
        f"images     {list(images.tensors.shape)}, {run.images_per_step} per step",
        *(
            f"level      {name}: {list(level.tensors.shape)}, a cell for every {stride} pixels"
            for stride, (name, level) in zip(strides, levels.items(), strict=True)
        ),
        *_describe_parts(learner.model),
        "losses     "
        + "  ".join(f"{name} {float(losses[0][name].detach()):.3f}" for name in ("loss", "loss_ce", "loss_bbox")),
        f"steps      {run.steps_per_epoch} per epoch, {run.total_steps} in {config.optimizer.epochs} epochs",
        f"time       {seconds:.2f} s for the first step, which is slower than those after it: "
        f"{duration(seconds * run.total_steps)} at most for all of them, evaluation aside",
        f"memory     {_peak_memory(device)}",
        f"checkpoint {learner.checkpoint_bytes / 2**20:,.0f} MiB each, in {run.folder.path}",
    ]
    return "\n".join(lines)


def _describe_parts(model: nn.Module) -> list[str]:
    """Return how many parameters of each part train and how many are frozen."""
    lines = []
    parts = {name: child for name, child in model.named_children() if name != "backbone"}
    body = model.get_submodule("backbone.0.body")
    parts |= {f"backbone.0.body.{name}": child for name, child in body.named_children()}
    for name, part in parts.items():
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in part.parameters()) - trained
        if trained or frozen:
            lines.append(f"{name:<28} {trained:>12,} trained {frozen:>12,} frozen")
    return lines


def _peak_memory(device: torch.device) -> str:
    """Return the most memory that was taken so far: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of the GPU at most"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = peak if sys.platform == "darwin" else peak * 1024
    return f"{size / 2**30:.1f} GiB of this process at most"
