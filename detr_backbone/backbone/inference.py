"""A model for inference alone: frozen BatchNorm folded for good, sums and ReLUs computed with their convolutions."""

from typing import TypeVar

import torch
from torch import nn

from detr_backbone.backbone.base import BackboneBase
from detr_backbone.errors import ConfigError

Model = TypeVar("Model", bound=nn.Module)


def fold_for_inference(model: Model, *, dtype: torch.dtype | None = None) -> Model:
    """Fold frozen BatchNorm into the convolutions before it, once and for good, and return the model, in eval mode.

    It then runs without scaling weights in every pass. On a CPU, a convolution also runs together with the sum and the
    ReLU behind it, by the primitives of oneDNN that torch.compile uses, where these give what the single operators
    give; in a pass that a hook on a layer watches, and in graphs, layers run one by one. Their ReLU makes NaN 0, as
    torch's does not: only finite images have features to trust. State-dict keys change, so weights are loaded before;
    parameters are frozen, and training is refused.

    Args:
        model: a BackboneBase, or what holds some, such as a detector; it is changed in place. What runs a backbone that
            it does not register, as adapters do, has it as its attribute `backbone`.
        dtype: of the folded weights, such as torch.bfloat16 to run under autocast of that dtype, which then has nothing
            to convert; left out, that of the weights.

    Raises:
        ConfigError: there is no backbone in the model, its layers were changed after it was built, or a weight is not
            finite.
    """
    held = (getattr(module, "backbone", module) for module in model.modules())
    backbones = dict.fromkeys(module for module in held if isinstance(module, BackboneBase))  # each once
    if not backbones:
        raise ConfigError(f"`model` must hold a backbone, got {type(model).__name__} without any")
    for backbone in backbones:
        backbone.fold_for_inference(dtype)
    return model.eval()
