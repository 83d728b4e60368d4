"""Convolutions of a network that can run together with the ReLU behind them, by its data flow, not by class names."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_backbone.networks.dataflow import Operator, Value
from detr_backbone.networks.dry_run import DryRun

RELUS: tuple[Callable[..., Any], ...] = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
"""What Python code calls for a ReLU; F.relu_ is torch.relu_."""
ADDS: tuple[Callable[..., Any], ...] = (torch.add, Tensor.add, Tensor.add_)
"""What Python code calls for a sum: `x + y` is Tensor.add, and `x += y` is Tensor.add_."""


def find_fusions(
    network: nn.Module, dry_run: DryRun, *, folded: Mapping[str, str], returned: Collection[str]
) -> dict[str, bool]:
    """Return the convolutions whose output only a ReLU reads, or only a sum that only a ReLU reads.

    Nothing that they read changes until then, so a convolution can be computed when the ReLU is called.

    Args:
        network: the network.
        dry_run: of the network, as it was before the folding.
        folded: path of each norm -> path of the convolution that does its work.
        returned: paths of layers whose outputs are read by the caller too.

    Returns:
        Path of each such convolution -> whether its result may be written over what it is added to, which nothing else
        reads any more.
    """
    norms = {path: norm for norm, path in folded.items()}
    fusions = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and path in dry_run.calls and dry_run.calls[path].count == 1:
            may_overwrite = _may_overwrite(path, dry_run, norm=norms.get(path), returned=returned)
            if may_overwrite is not None:
                fusions[path] = may_overwrite
    return fusions


def _may_overwrite(path: str, dry_run: DryRun, *, norm: str | None, returned: Collection[str]) -> bool | None:
    """Return the value of a convolution in `find_fusions`; None if it does not belong there."""
    flow = dry_run.dataflow
    read_by_caller = dry_run.outputs_of(returned)
    inputs, outputs = dry_run.inputs.get(path, ()), dry_run.outputs.get(path, ())
    if len(inputs) != 1 or len(outputs) != 1:
        return None
    (taken,), (given,) = inputs, outputs

    def sole_reader(value: Value) -> Operator | None:
        readers = flow.readers(value)
        return readers[0] if len(readers) == 1 and value not in read_by_caller else None

    if norm is not None:
        normalise = sole_reader(given)
        if normalise is None:
            return None
        given = normalise.gives[0]
    reader, added = sole_reader(given), None
    if reader is not None and reader.function in ADDS:
        added, addition = _other(reader, given), reader
        reader = None if added is None else sole_reader(reader.gives[0])
    if reader is None or reader.function not in RELUS:
        return None
    if flow.is_written(taken.storage, after=dry_run.calls[path].start, before=reader.time):
        return None
    if added is None:
        return False
    if flow.is_written(added.storage, after=addition.time, before=reader.time):
        return None
    return (
        dry_run.error is None
        and added.storage in flow.made - flow.held
        and added.storage != taken.storage
        and added.storage not in {value.storage for value in read_by_caller}
        and not flow.is_read(added.storage, after=addition.time)
    )


def _other(addition: Operator, value: Value) -> Value | None:
    """Return what is added to a value; None unless that is one tensor, which stays as it is."""
    if len(addition.reads) != 2:
        return None
    first, second = addition.reads
    other = second if first == value else first
    return None if addition.gives[0].tensor == other.tensor else other
