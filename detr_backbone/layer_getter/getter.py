"""Named features out of the middle of a network."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from detr_backbone.errors import refuse_single_name, unknown_name
from detr_backbone.layer_getter.strategies import Strategy, choose

_MEMBERS = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "training")


class IntermediateLayerGetter(nn.ModuleDict):
    """A network up to the last of some inner layers, which returns their outputs, each under a name of yours.

    The layers may be of any depth in any module that takes one input. The outputs are what the model itself computes,
    and nothing after the last of them is computed. How, is chosen by what a trace of the forward shows:

    - "sequential": the forward calls the model's children one after the other; so does the getter. Children after the
      last one asked for are dropped. Keys, order and outputs are those of torchvision's getter of this name.
    - "graph": the traced forward runs, up to the last layer asked for; modules and parameters it does not use are
      dropped. Choices that the forward takes from attributes of its module are kept as they are now.
    - "hooks": the whole model is kept and its own forward runs, which is left when the last layer has returned. It is
      for forwards that no trace can hold: they look at values or shapes, differ between training and evaluation,
      compute with buffers, switch gradients or autocast, or have hooks on a module around a layer that is asked for. Of
      modules that are left before they return, forward hooks do not fire. Parameters after the last layer stay and get
      no gradient: freeze them for DistributedDataParallel, or let it find unused ones.

    What is kept is shared with the model and has its state-dict keys. A layer called more than once gives its first
    output. An output that a later layer changes in place, such as nn.ReLU(inplace=True), is returned as changed, if
    that layer still runs.

    Args:
        model: the network. By the strategy "hooks", the layers asked for get a hook that is idle outside the getter.
        return_layers: path of a layer -> name of its output, or paths, which then are the names. Paths are those of
            `model.named_modules()`.

    Attributes:
        strategy: "sequential", "graph" or "hooks".

    Raises:
        ValueError: nothing is asked for, a path does not exist, two outputs would have one name, or the forward does
            not call a layer: here if a trace shows it, otherwise when the getter is called.

    >>> import torch
    >>> from torchvision.models import resnet18
    >>> getter = IntermediateLayerGetter(resnet18(), {"layer1": "feat1", "layer3": "feat2"})
    >>> [(name, tuple(x.shape)) for name, x in getter(torch.rand(1, 3, 224, 224)).items()]
    [('feat1', (1, 64, 56, 56)), ('feat2', (1, 256, 14, 14))]
    >>> getter.strategy, IntermediateLayerGetter(resnet18(), ["layer2.0.bn1", "fc"]).strategy
    ('sequential', 'graph')
    """

    def __init__(self, model: nn.Module, return_layers: Mapping[str, str] | Sequence[str]) -> None:
        super().__init__()
        self.return_layers = _checked(return_layers, model)
        self._strategy: Strategy = choose(model, self.return_layers)
        self._share_members()

    @property
    def strategy(self) -> str:
        return self._strategy.name

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Return the outputs asked for, in the order in which the network computes them."""
        return self._strategy.run(self._network(), x)

    def train(self, mode: bool = True) -> Self:
        self._strategy.network.train(mode)
        self.training = mode
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._share_members()

    def _network(self) -> nn.Module:
        """Return what the strategy runs, with the members that this getter has now."""
        network = self._strategy.network
        if torch.compiler.is_compiling() or vars(network)["_modules"] is self._modules:
            return network
        replica = object.__new__(type(network))  # of another getter, as nn.DataParallel makes them
        vars(replica).update(vars(network))
        vars(replica).update({name: vars(self)[name] for name in _MEMBERS})
        vars(replica).update(vars(self).get("_former_parameters", {}))  # plain tensors there
        return replica

    def _share_members(self) -> None:
        # The network's members are the getter's own, not those of a child: keys get no prefix, in any strategy.
        vars(self).update({name: vars(self._strategy.network)[name] for name in _MEMBERS})


def _checked(return_layers: Mapping[str, str] | Sequence[str], model: nn.Module) -> dict[str, str]:
    refuse_single_name("return_layers", return_layers)
    pairs = return_layers.items() if isinstance(return_layers, Mapping) else [(path, path) for path in return_layers]
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    if not pairs:
        raise ValueError(
            f"`return_layers` must name at least one layer, got none; there are {', '.join(_nearby('', paths))}"
        )
    for path, _ in pairs:
        if path not in paths:
            known = unknown_name(path, _nearby(path, paths), also=paths)
            raise ValueError(f"`return_layers` must name layers of the model: {known}; see `named_modules()` of it")
    names = [name for _, name in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"`return_layers` must give every layer a name of its own, got {names}")
    return dict(pairs)


def _nearby(path: str, paths: list[str]) -> list[str]:
    """Return the layers inside the innermost module around `path` that exists and has any."""
    parents = {"", *(known.rpartition(".")[0] for known in paths)}
    while path not in parents:
        path = path.rpartition(".")[0]
    return [known for known in paths if known.rpartition(".")[0] == path]
