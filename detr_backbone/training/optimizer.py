"""AdamW in groups of their own learning rate, and how the rates change over a run."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from detr_backbone.errors import ConfigError, NumericsError

LINEAR_PROJECTIONS = ("reference_points", "sampling_offsets")
BODY = "backbone.0.body."


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule; option names and defaults are those of DETR (arXiv 2005.12872, section A.4).

    Args:
        lr: learning rate outside the backbone.
        lr_backbone: learning rate of the backbone.
        lr_linear_proj_mult: factor on `lr` for sampling offsets and reference points; Deformable DETR publishes 0.1
            (arXiv 2010.04159, section 5).
        layer_decay: factor on the backbone's rate from each of its layers to the one before, so that early layers move
            less; 1 gives all the same. Source: BEiT (arXiv 2106.08254, section 3.2) uses 0.65 to 0.75.
        weight_decay: of every parameter.
        decay_norms_and_biases: false leaves biases, norms and other vectors without weight decay.
        clip_max_norm: the gradient's norm is clipped to it; 0 does not clip.
        accumulate_steps: batches whose gradients are averaged for one step; each is normalised by its own boxes.
        epochs: passes over the training data.
        warmup_steps: steps over which the learning rate rises from 0.
        schedule: "step" multiplies by 0.1 after `lr_drop` epochs; "cosine" falls to 0 over the whole run.
        lr_drop: epochs before the drop of "step".
    """

    lr: float = 1e-4
    lr_backbone: float = 1e-5
    lr_linear_proj_mult: float = 1.0
    layer_decay: float = 1.0
    weight_decay: float = 1e-4
    decay_norms_and_biases: bool = True
    clip_max_norm: float = 0.1
    accumulate_steps: int = 1
    epochs: int = 300
    warmup_steps: int = 0
    schedule: Literal["step", "cosine"] = "step"
    lr_drop: int = 200

    def __post_init__(self) -> None:
        for key in ("lr", "epochs", "accumulate_steps"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"`optimizer.{key}` must be positive, got {getattr(self, key)}")
        for key in ("lr_backbone", "lr_linear_proj_mult", "weight_decay", "clip_max_norm", "warmup_steps", "lr_drop"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ConfigError(f"`optimizer.{key}` must not be negative, got {getattr(self, key)}")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"`optimizer.layer_decay` must be above 0 and at most 1, got {self.layer_decay}")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """Return AdamW over what trains: the backbone, the sampling of Deformable DETR, and the rest, each with its rate.

    With `layer_decay`, each layer of the backbone is a group; without `decay_norms_and_biases`, each group is two.
    """
    depth = layers_from_the_top(name for name, _ in model.named_parameters() if name.startswith(BODY))
    rates = {
        "detector": config.lr,
        "backbone": config.lr_backbone,
        "linear_proj": config.lr * config.lr_linear_proj_mult,
    }
    groups: dict[str, dict[str, object]] = {}
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, rate = _part_of(name), rates[_part_of(name)]
        if part == "backbone" and config.layer_decay < 1:
            above = depth.get(_layer_of(name), 0)
            part, rate = f"backbone-{above}", rate * config.layer_decay**above
        decay = config.weight_decay
        if parameter.ndim <= 1 and not config.decay_norms_and_biases:
            part, decay = f"{part}, no decay", 0.0
        groups.setdefault(part, {"lr": rate, "name": part, "weight_decay": decay})
        members.setdefault(part, []).append(parameter)
    return AdamW([{"params": members[part], **options} for part, options in groups.items()], fused=True)


def layers_from_the_top(names: Iterable[str]) -> dict[str, int]:
    """Return how many layers of the backbone come after each one, from the names of its parameters in their order.

    A layer is a child of the network, or of one of its stages: ResNet's `layer2.0`, a transformer's `blocks.3`.

    >>> body = "backbone.0.body."
    >>> layers_from_the_top([f"{body}conv1.weight", f"{body}layer1.0.conv1.weight", f"{body}layer1.1.conv1.weight"])
    {'conv1': 2, 'layer1.0': 1, 'layer1.1': 0}
    """
    layers = list(dict.fromkeys(map(_layer_of, names)))
    return {layer: len(layers) - 1 - index for index, layer in enumerate(layers)}


def build_schedule(optimizer: AdamW, config: OptimizerConfig, steps_per_epoch: int) -> LambdaLR:
    """Return the factor on every learning rate at each step, to be stepped once per optimiser step."""
    total = config.epochs * steps_per_epoch

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
        if config.schedule == "cosine":
            return warmup * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))
        return warmup * (0.1 if step >= config.lr_drop * steps_per_epoch else 1.0)

    return LambdaLR(optimizer, factor)


def clip_gradient(model: nn.Module, max_norm: float) -> None:
    """Clip the norm of a model's gradient to `max_norm`; 0 does not clip.

    Raises:
        NumericsError: the norm is NaN or infinite; names the first parameters to blame.
    """
    try:
        clip_grad_norm_(model.parameters(), max_norm if max_norm > 0 else math.inf, error_if_nonfinite=True)
    except RuntimeError as error:
        bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        raise NumericsError(f"gradients must be finite, got NaN or infinity in {bad[:5] or 'their norm'}") from error


def describe_groups(optimizer: AdamW) -> str:
    """Return parameters and learning rate of each group, one per line."""
    return "\n".join(
        f"{group['name']:<12} {sum(p.numel() for p in group['params']):>12,} parameters  lr {group['initial_lr']:g}"
        + ("" if group["weight_decay"] else "  no weight decay")
        for group in optimizer.param_groups
    )


def _part_of(name: str) -> str:
    if name.startswith("backbone.") and not name.startswith("backbone.0.pyramid."):
        return "backbone"
    return "linear_proj" if any(part in name for part in LINEAR_PROJECTIONS) else "detector"


def _layer_of(name: str) -> str:
    """Return the layer of a parameter of the backbone: its path without the parameter, up to two words."""
    words = name.removeprefix(BODY).split(".")[:-1]
    has_children = len(words) > 1 and words[1].isdigit()
    return ".".join(words[: 2 if has_children else 1])
