"""Memory for time: layers whose inner activations are not kept for the backward pass, but computed again in it.

Source: arXiv 1604.06174.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from detr_backbone.errors import ConfigError, refuse_single_name, unknown_name
from detr_backbone.forward_pass import Pass, PerThread


def checkpoint_layers(body: nn.Module, paths: Sequence[str], passes: PerThread[Pass]) -> None:
    """Let layers of a network keep their inputs only; what a layer gives, its gradients and its keys stay the same.

    Args:
        body: the network; its layers are changed in place.
        paths: of the layers, such as the stages of a ResNet; one by one, for a layer is computed again as a whole.
        passes: those of the backbone that runs the network; a layer is computed again within the same pass.

    Raises:
        ConfigError: a layer does not exist.
    """
    refuse_single_name("checkpointed_layers", paths)
    known = dict(body.named_modules())
    for path in paths:
        if not path or path not in known:
            children = [name for name, _ in body.named_children()]
            raise ConfigError(f"`checkpointed_layers` must name layers: {unknown_name(path, children, also=known)}")
    for path in paths:
        layer: Any = known[path]
        layer.forward = partial(_checkpoint, layer, passes)


def _checkpoint(layer: nn.Module, passes: PerThread[Pass], *args: Any, **kwargs: Any) -> Any:
    forward: Callable[..., Any] = partial(type(layer).forward, layer)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    again = passes.set(passes.get())  # the backward pass may run in another thread
    return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again), **kwargs)
