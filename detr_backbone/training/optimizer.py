"""AdamW in groups of their own learning rate, and how the rates change over a run."""

import math

from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from detr_backbone.errors import NumericsError
from detr_backbone.training.config import OptimizerConfig

LINEAR_PROJECTIONS = ("reference_points", "sampling_offsets")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over what trains: the backbone, the sampling of Deformable DETR, and the rest, each with its rate."""
    groups: dict[str, list[nn.Parameter]] = {"detector": [], "backbone": [], "linear_proj": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("backbone.") and not name.startswith("backbone.0.pyramid."):
            groups["backbone"].append(parameter)
        elif any(part in name for part in LINEAR_PROJECTIONS):
            groups["linear_proj"].append(parameter)
        else:
            groups["detector"].append(parameter)
    rates = {
        "detector": config.lr,
        "backbone": config.lr_backbone,
        "linear_proj": config.lr * config.lr_linear_proj_mult,
    }
    return AdamW(
        [{"params": parameters, "lr": rates[name], "name": name} for name, parameters in groups.items() if parameters],
        weight_decay=config.weight_decay,
    )


def build_schedule(optimizer: AdamW, config: OptimizerConfig, steps_per_epoch: int) -> LambdaLR:
    """The factor on every learning rate at each step, to be stepped once per optimiser step."""
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
    """Parameters and learning rate of each group, one per line."""
    return "\n".join(
        f"{group['name']:<12} {sum(p.numel() for p in group['params']):>12,} parameters  lr {group['initial_lr']:g}"
        for group in optimizer.param_groups
    )
