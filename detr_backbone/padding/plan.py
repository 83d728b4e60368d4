"""How a backbone keeps images independent of who shares their batch: the choice of the plan, when it is built."""

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import nn

from detr_backbone.networks.geometry import Geometry
from detr_backbone.padding.exact import Padding, leaky_layer, refuse_batch_statistics
from detr_backbone.padding.trial import (
    State,
    draw_sensitive_weights,
    find_leak,
    is_plain_resnet,
    refuse_hidden_batch_statistics,
)

Batching: TypeAlias = Literal["masked", "by_size", "padded"]

_LARGEST_DIVISOR_TRIED = 64
"""Pixels; the self-test of a network that takes multiples of more would take minutes."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a backbone runs its batches.

    Attributes:
        batching: "masked", the whole batch with zeros before every window; "by_size", images of equal size together,
            for a network that is exact in no other way; "padded", the whole batch as it is.
        leak: why it is "by_size", such as the layer that takes its statistics from padded cells too.
        size_divisor: a batch is padded to sides that it divides before it runs through the network.
        zeroes_padding: whether the padded cells of a batch are zeroed before every window.
    """

    batching: Batching
    leak: str | None = None
    size_divisor: int
    zeroes_padding: bool = True


def choose_plan(backbone: nn.Module, network: nn.Module, body: nn.Module, geometry: Geometry, padding: Padding) -> Plan:
    """Return the plan by which a network keeps the promise of `padding`.

    Args:
        backbone: maps a NestedTensor to its levels, with zeros before every window; it is run, and stays as it is.
        network: as given to the backbone.
        body: what of it the backbone runs.
        geometry: of the network.
        padding: "exact" or "zeros".

    Raises:
        ConfigError: a norm takes its statistics from the batch under "exact".
    """
    if padding == "zeros":
        return Plan(batching="padded", size_divisor=geometry.divisor, zeroes_padding=False)
    refuse_batch_statistics(body)
    plan = Plan(batching="masked", size_divisor=geometry.divisor)
    leak = leaky_layer(body, geometry, all_run=getattr(body, "strategy", "") != "hooks")
    if leak is not None:
        plan = replace(plan, batching="by_size", leak=leak)
    elif is_plain_resnet(network):
        return plan
    with torch.device("cpu"):  # also where the network is built on the meta device
        state = draw_sensitive_weights(backbone)
        if state is None:
            why = "it was built on the meta device with buffers of integers, so that there is no self-test"
            return plan if plan.leak else replace(plan, batching="by_size", leak=why)
        if leak is None:
            plan = _try_masked(backbone, body, state, geometry, plan)
        refuse_hidden_batch_statistics(backbone, body, state, plan.size_divisor)
        return plan


def describe_batching(batching: Batching, leak: str | None) -> str:
    """Return how images of several sizes run, and why not as one masked batch, in one line.

    >>> describe_batching("by_size", "layer1.0.se is not known to keep padding out")
    'batching by_size: layer1.0.se is not known to keep padding out'
    """
    return f"batching {batching}" if leak is None else f"batching {batching}: {leak}"


def _try_masked(backbone: nn.Module, body: nn.Module, state: State, geometry: Geometry, plan: Plan) -> Plan:
    if plan.size_divisor > _LARGEST_DIVISOR_TRIED:
        why = f"it divides an image into parts of {plan.size_divisor} pixels, for which there is no self-test"
        return replace(plan, batching="by_size", leak=why)
    leak = find_leak(backbone, body, state, plan.size_divisor)
    if leak is None:
        return plan
    # Windows that follow the size of the image find it always even.
    if plan.size_divisor == 1 and find_leak(backbone, body, state, geometry.coarsest) is None:
        return replace(plan, size_divisor=geometry.coarsest)
    return replace(plan, batching="by_size", leak=leak.reason, zeroes_padding=not leak.fails)
