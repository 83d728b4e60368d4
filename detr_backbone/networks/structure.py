"""Whether a network still stands as it was built: which layer is where, and which take part in a backbone's passes."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import nn

from detr_backbone.forward_pass import Pass, PerThread, has_global_hooks
from detr_backbone.frozen_batch_norm import FrozenBatchNorm2d

Structure: TypeAlias = tuple[tuple[Any, ...], ...]


def structure_of(network: nn.Module, passes: PerThread[Pass]) -> tuple[Structure, dict[str, FrozenBatchNorm2d]]:
    """Return what a backbone relies on when it folds pairs and zeroes padding, and the norms of those pairs by path.

    The first is to be compared with itself later. It changes when a layer is added, removed, wrapped, or exchanged for
    one that computes something else or does not take part in the passes; not when weights change, and not when a layer
    is parametrized, sharded or gets a hook. A hook between convolution and norm leaves out that pair alone, and one for
    every module all of them.

    Args:
        network: the network.
        passes: those of the backbone that runs the network.
    """
    norms: dict[str, FrozenBatchNorm2d | None] = {}
    structure = tuple(_entries("", network, passes, norms))
    if not torch.compiler.is_compiling() and has_global_hooks():
        return structure, {}
    return structure, {path: norm for path, norm in norms.items() if norm is not None}


def _entries(
    name: str, module: nn.Module, passes: PerThread[Pass], norms: dict[str, FrozenBatchNorm2d | None]
) -> Iterator[tuple[Any, ...]]:
    own = vars(module)
    folding, fusing, window = own.get("folding"), own.get("fusing"), own.get("window")
    if folding and _is_hooked_between(module):
        norms[folding[0]] = None
    elif folding and isinstance(module, FrozenBatchNorm2d):
        norms.setdefault(folding[0], module)
    yield (
        name,
        type(module).forward,
        own.get("forward"),
        len(module._modules),
        own.get("kernel_size"),
        own.get("padding_mode"),
        folding and (folding[0], folding[1] is passes),
        fusing and (fusing[0], fusing[2] is passes),
        window and (window[0], window[1] is passes),
    )
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _entries(child_name, child, passes, norms)


def _is_hooked_between(module: nn.Module) -> bool:
    """Return whether a hook takes what a convolution gives its norm, or the gradient of that."""
    takes = module._forward_pre_hooks if isinstance(module, FrozenBatchNorm2d) else module._forward_hooks
    return bool(takes or module._backward_hooks or module._backward_pre_hooks)
