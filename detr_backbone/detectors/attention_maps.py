"""Records of attention: the weights of DETR, and the points that Deformable DETR samples.

A detector stores neither. Within these contexts its outputs are as always, and both are collected on the way.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detr_backbone.detectors.deformable_attention import MSDeformAttn
from detr_backbone.forward_pass import hooked
from detr_backbone.nested_tensor import Size


class Samples(NamedTuple):
    """Points that one deformable attention sampled, as fractions of the image without its padding."""

    locations: Tensor
    """(x, y) [B, Q, M, L, J, 2] of J points per head and level, M heads, L levels; outside 0 … 1 is no image."""
    weights: Tensor
    """[B, Q, M, L, J], of one query and head 1 in sum."""
    references: Tensor
    """The points [B, Q, 2] or boxes cxcywh [B, Q, 4] around which they were sampled."""


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the weights [B, M, Q, S] of every nn.MultiheadAttention inside a model by its path, for M heads.

    Over the S cells they sum to 1, and are 0 on padding. torch's fused kernels give no weights, so others are taken
    within the context; their outputs agree up to rounding.

    Args:
        model: DETR, or a part of it such as its decoder, to store no more than is needed. Paths begin there.

    >>> attention = nn.MultiheadAttention(8, num_heads=2, batch_first=True)
    >>> with record_attention(nn.ModuleDict({"self_attn": attention})) as weights:
    ...     out = attention(torch.zeros(1, 3, 8), torch.zeros(1, 5, 8), torch.zeros(1, 5, 8), need_weights=False)
    >>> weights["self_attn"].shape
    torch.Size([1, 2, 3, 5])
    """
    weights: dict[str, Tensor] = {}

    def request_weights(_: str, __: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"need_weights": True, "average_attn_weights": False}

    def store(path: str, _: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
        weights[path] = output[1].detach()

    with (
        hooked(_modules_of(model, nn.MultiheadAttention), before=request_weights, with_kwargs=True),
        hooked(_modules_of(model, nn.MultiheadAttention), after=store),
    ):
        yield weights


@contextmanager
def record_samples(model: nn.Module) -> Iterator[dict[str, Samples]]:
    """Collect the points that every MSDeformAttn inside a model samples, by its path.

    Args:
        model: Deformable DETR, or a part of it such as its decoder. Paths begin there.
    """
    samples: dict[str, Samples] = {}

    def store(path: str, module: MSDeformAttn, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        references, shapes = given["reference_points"], given["spatial_shapes"]
        with torch.no_grad():
            locations, weights = module.samples(given["query"], references, shapes)
            ratios = _valid_ratios(given.get("padding_mask"), shapes).to(locations)
            samples[path] = Samples(
                locations=locations / ratios[:, None, None, :, None],
                weights=weights,
                references=references[:, :, 0] / ratios[:, None, 0].repeat(1, 1, references.shape[-1] // 2),
            )

    with hooked(_modules_of(model, MSDeformAttn), after=store, with_kwargs=True):
        yield samples


def _modules_of(model: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if isinstance(module, kind)}


def _valid_ratios(padding_mask: Tensor | None, spatial_shapes: Sequence[Size]) -> Tensor:
    """Return the fraction (x, y) of every padded level that belongs to the image, [B, L, 2]."""
    if padding_mask is None:
        return torch.ones(1, len(spatial_shapes), 2)
    parts = torch.split(~padding_mask, [h * w for h, w in spatial_shapes], dim=1)
    valid = [part.view(-1, h, w) for part, (h, w) in zip(parts, spatial_shapes, strict=True)]
    return torch.stack([torch.stack([v[:, 0].float().mean(1), v[:, :, 0].float().mean(1)], -1) for v in valid], dim=1)
