"""FSDP2: parameters, gradients and the optimiser's state of a detector, each process holding a part of every tensor.

Accelerate shards on accelerators only, so torch's `fully_shard` is called here, which does it on a CPU too.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard(model: nn.Module, optimizer: Optimizer) -> None:
    """Shard a detector and its optimiser over all processes, which must hold the same values.

    Units that are gathered together are the layers of the transformer and the stages of the backbone; what is left is
    gathered with the whole model.

    Args:
        model: changed in place.
        optimizer: of its parameters; its state is sharded like them.

    Source: fully_shard of torch.distributed.fsdp; FSDP (arXiv 2304.11277).
    """
    from torch.distributed.fsdp import fully_shard

    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for unit in _units(model):
        fully_shard(unit)
    fully_shard(model)
    sharded: dict[str, Any] = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[names[parameter]] for parameter in group["params"]]
    for parameter in [one for one in optimizer.state if one in names]:
        mine = sharded[names[parameter]]
        state = optimizer.state.pop(parameter)
        optimizer.state[mine] = {key: _like(value, parameter, mine) for key, value in state.items()}


def gather(state: Any) -> Any:
    """Return a state dict with whole tensors in place of their parts; every process must call it together."""
    if isinstance(state, Mapping):
        return {key: gather(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gather(value) for value in state]
    return state.full_tensor() if hasattr(state, "full_tensor") else state


def _units(model: nn.Module) -> list[nn.Module]:
    transformer: Any = model.get_submodule("transformer")
    body = model.get_submodule("backbone.0.body")
    units = [*transformer.encoder.layers, *transformer.decoder.layers, *body.children()]
    return [unit for unit in units if any(parameter.requires_grad for parameter in unit.parameters())]


def _like(value: Any, parameter: Tensor, sharded: "DTensor") -> Any:
    """Return a tensor of an optimiser's state, such as a moment, as the part that belongs to the parameter's."""
    from torch.distributed.tensor import distribute_tensor

    if not isinstance(value, Tensor) or value.shape != parameter.shape or not value.ndim:
        return value
    return distribute_tensor(value, sharded.device_mesh, sharded.placements)
