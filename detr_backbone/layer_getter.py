"""Named features out of the middle of a network."""

import difflib
from collections.abc import Iterable, Mapping

from torch import Tensor, nn


class IntermediateLayerGetter(nn.ModuleDict):
    """A network that runs its children in order and returns the outputs of some of them, each under a name of yours.

    The children after the last one asked for are dropped; those before it keep their names, so state-dict keys stay.

    Args:
        model: a module whose forward runs its direct children once each, in the order in which they were registered.
        return_layers: child's name -> name of its output.

    Raises:
        ValueError: nothing is asked for, a child does not exist, or two outputs would have one name.

    >>> import torch
    >>> from torchvision.models import resnet18
    >>> getter = IntermediateLayerGetter(resnet18(), {"layer1": "feat1", "layer3": "feat2"})
    >>> [(name, tuple(x.shape)) for name, x in getter(torch.rand(1, 3, 224, 224)).items()]
    [('feat1', (1, 64, 56, 56)), ('feat2', (1, 256, 14, 14))]
    """

    def __init__(self, model: nn.Module, return_layers: Mapping[str, str]) -> None:
        _check(return_layers, [name for name, _ in model.named_children()])
        missing = set(return_layers)
        children = {}
        for name, child in model.named_children():
            children[name] = child
            missing.discard(name)
            if not missing:
                break
        super().__init__(children)
        self.return_layers = dict(return_layers)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The outputs asked for, in the order in which the network computes them."""
        outputs = {}
        for name, child in self.items():
            x = child(x)
            if name in self.return_layers:
                outputs[self.return_layers[name]] = x
        return outputs


def unknown_name(name: str, known: Iterable[str]) -> str:
    """What to tell a user who asked for a name that does not exist: what exists, and the nearest match."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"got {name!r}, expected one of {', '.join(known)}{hint}"


def _check(return_layers: Mapping[str, str], children: list[str]) -> None:
    if not return_layers:
        raise ValueError(f"`return_layers` must name at least one layer, got none; there are {', '.join(children)}")
    for name in return_layers:
        if name not in children:
            raise ValueError(f"`return_layers` must name layers of the model: {unknown_name(name, children)}")
    outputs = list(return_layers.values())
    if len(set(outputs)) < len(outputs):
        raise ValueError(f"`return_layers` must give every layer a name of its own, got {outputs}")
