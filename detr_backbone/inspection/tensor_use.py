"""Which tensors of a network a pass uses, also where a layer's forward is not called.

Attention passes the weights of its output projection to a function, a decoder reads `query_embed.weight`, and a folded
BatchNorm becomes part of a convolution: such layers give nothing themselves, but they are used.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class TensorUse(TorchFunctionMode):
    """Within this context, the parameters and buffers of a network that any function of torch takes are remembered.

    Args:
        model: the network.

    >>> import torch
    >>> layer = nn.Linear(2, 3)
    >>> with TensorUse(layer) as use:
    ...     _ = nn.functional.linear(torch.zeros(1, 2), layer.weight)
    >>> use.of([layer.weight]), use.of([layer.bias])
    (True, False)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._taken: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Remember the tensors among the arguments, and call the function."""
        self._taken |= self._own.intersection(map(id, _tensors((args, kwargs or {}))))
        return func(*args, **(kwargs or {}))

    def of(self, tensors: Iterable[Tensor]) -> bool:
        """Return whether one of these was taken."""
        return not self._taken.isdisjoint(map(id, tensors))


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
