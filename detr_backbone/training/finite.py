"""Numbers that stop being finite: which term, module, step and images, and the batch on disk, to be run again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detr_backbone.coco.dataset import Target
from detr_backbone.detectors import build_criterion, build_detector
from detr_backbone.errors import CheckpointError, NumericsError
from detr_backbone.forward_pass import hooked
from detr_backbone.nested_tensor import NestedTensor
from detr_backbone.training.checkpoint import load_saved
from detr_backbone.training.config import config_from_dict
from detr_backbone.training.devices import build_accelerator
from detr_backbone.training.inference import without_pretrained
from detr_backbone.training.optimizer import clip_gradient
from detr_backbone.training.sampler import seed_step


@dataclass(frozen=True, kw_only=True)
class FailedBatch:
    """A batch whose numbers were not finite, and all that computing them again takes.

    Attributes:
        model: the detector's state dict before the step.
        config: the resolved configuration.
        tensors, mask: of the images.
        sizes: (h, w) of each image.
        targets: of each image: `boxes`, `labels`, `image_id`.
        seed, step, batch, rank: what the random numbers of the step follow from; see `seed_step`.
    """

    model: Mapping[str, Tensor]
    config: Mapping[str, Any]
    tensors: Tensor
    mask: Tensor
    sizes: Sequence[tuple[int, int]]
    targets: Sequence[Mapping[str, Any]]
    seed: int
    step: int
    batch: int
    rank: int

    def save(self, path: Path) -> bool:
        """Write the batch, for `replay`, and return whether there was room for it; where not, nothing of it stays."""
        try:
            torch.save(vars(self), path)
        except (OSError, RuntimeError):  # torch's writer raises RuntimeError where the file could not be written
            path.unlink(missing_ok=True)
            return False
        return True


def first_module_without_finite_output(
    model: nn.Module, images: NestedTensor, targets: Sequence[Mapping[str, Any]]
) -> str:
    """Return the path of the module whose output is the first that is not finite; empty where all are.

    The model is run once more, without gradients.
    """
    first: list[str] = []

    def look(path: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if not first and not all(tensor.isfinite().all() for tensor in _tensors(output)):
            first.append(path)

    with torch.no_grad(), hooked({path: module for path, module in model.named_modules() if path}, after=look):
        model(images, targets)
    return first[0] if first else ""


def plain_targets(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Return what a loss reads of the targets, as plain tensors and numbers that a file can hold."""
    return [
        {
            "boxes": target["boxes"].as_subclass(Tensor).cpu(),
            "labels": target["labels"].cpu(),
            "image_id": target["image_id"],
        }
        for target in targets
    ]


def replay(path: Path | str) -> str:
    """Run a saved batch once more, forward and backward, and return its losses: they are finite this time.

    Raises:
        CheckpointError: the file cannot be read.
        NumericsError: the numbers are not finite again; names the loss term or the parameters, and the module.
    """
    try:
        saved = FailedBatch(
            **load_saved(path, "saved batch", fix="copy the file again, or let training write it again")
        )
    except TypeError as error:  # other keys
        raise CheckpointError(
            f"saved batch cannot be read | where: file={path} | got {error} | fix: give a file that training wrote"
        ) from None
    config = config_from_dict(saved.config)
    accelerator = build_accelerator(config.mixed_precision)
    model = build_detector(without_pretrained(config.detector))
    model.load_state_dict(saved.model)
    prepared = accelerator.prepare(model.to(accelerator.device).train())
    criterion = build_criterion(config.detector).to(accelerator.device)
    images = NestedTensor(saved.tensors, saved.mask, sizes=saved.sizes).to(accelerator.device)
    seeds = (saved.seed, saved.step, saved.batch, saved.rank)
    seed_step(*seeds)
    try:
        losses = criterion(prepared(images, saved.targets), saved.targets)
        accelerator.backward(criterion.weighted_sum(losses))
        clip_gradient(model, 0)
    except NumericsError as error:
        seed_step(*seeds)
        module = first_module_without_finite_output(prepared, images, saved.targets)
        raise NumericsError(f"{error} | where: file={path} step={saved.step} module={module or '-'}") from error
    finally:
        accelerator.free_memory()
    return "\n".join(f"{name:<20} {float(value.detach()):g}" for name, value in losses.items())


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, NestedTensor):
        return [output.tensors]
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in _tensors(value)]
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [tensor for value in output for tensor in _tensors(value)]
    return []
