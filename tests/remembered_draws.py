"""Random weights that were drawn before, from the same state of the generator: they are copied, bit for bit.

Most tests begin with the same seed and build the same networks; drawing their millions of weights takes longer than all
that the tests compute with them.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

INITIALISERS = ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "xavier_uniform_")
_FEWEST = 10_000  # drawing fewer numbers takes no longer than reading the generator's state
_MOST_BYTES = 512 * 2**20


class RememberedDraws:
    """The functions of torch.nn.init, by which the same draw is made once; what was not asked for longest is forgotten."""

    def __init__(self) -> None:
        self._drawn: OrderedDict[Any, tuple[Tensor, Tensor]] = OrderedDict()
        self._bytes = 0

    def remember(self, patch: Any) -> None:
        """Let `patch`, a pytest.MonkeyPatch, replace the functions."""
        for name in INITIALISERS:
            patch.setattr(nn.init, name, self._remembering(getattr(nn.init, name)))

    def _remembering(self, initialise: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(initialise)
        def draw(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
            plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()
            if not plain or tensor.numel() < _FEWEST or options.get("generator") is not None:
                return initialise(tensor, *args, **options)
            state = torch.get_rng_state().numpy().tobytes()
            key = (initialise, tuple(tensor.shape), tensor.dtype, args, tuple(options.items()), state)
            if key in self._drawn:
                self._drawn.move_to_end(key)
                drawn, after = self._drawn[key]
                with torch.no_grad():
                    tensor.copy_(drawn)
                torch.set_rng_state(after)
                return tensor
            initialise(tensor, *args, **options)
            self._keep(key, tensor.detach().clone())
            return tensor

        return draw

    def _keep(self, key: Any, drawn: Tensor) -> None:
        self._drawn[key] = (drawn, torch.get_rng_state())
        self._bytes += drawn.nbytes
        while self._bytes > _MOST_BYTES:
            _, (forgotten, _) = self._drawn.popitem(last=False)
            self._bytes -= forgotten.nbytes
