"""Random weights of large layers, which repeat a sample: drawing millions takes longer than what tests compute."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn

INITIALISERS = ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_", "xavier_normal_", "xavier_uniform_")
_LENGTH = 262_139  # of the sample: a prime number, so that the rows of a weight begin at other places of it
_TWICE = {  # each sample, so that all of it can be read from any place on
    "uniform": torch.rand(_LENGTH, generator=torch.Generator().manual_seed(1)).repeat(2),
    "normal": torch.randn(_LENGTH, generator=torch.Generator().manual_seed(2)).repeat(2),
}


class _Weight(Tensor):
    """The memory of a tensor that is filled from the samples, beginning at a place that torch's generator draws."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def uniform_(self, low: float = 0, high: float = 1, generator: Any = None) -> Tensor:
        return self._fill("uniform", high - low, low)

    def normal_(self, mean: float = 0, std: float = 1, generator: Any = None) -> Tensor:
        return self._fill("normal", std, mean)

    def _fill(self, kind: str, scale: float, shift: float) -> Tensor:
        start, length = int(torch.randint(_LENGTH, ())), min(self.numel(), _LENGTH)
        sample = (_TWICE[kind][start : start + length] * scale).add_(shift)
        for part in self.as_subclass(Tensor).view(-1).split(_LENGTH):
            part.copy_(sample[: len(part)])
        return self


def draw_quickly(patch: pytest.MonkeyPatch) -> None:
    """Let the functions of torch.nn.init fill large tensors on the CPU from samples; a seed still gives one network."""
    for name in INITIALISERS:
        patch.setattr(nn.init, name, _quick(getattr(nn.init, name)))


def _quick(initialise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(initialise)
    def draw(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()
        if plain and tensor.numel() > _LENGTH // 16 and options.get("generator") is None:
            initialise(tensor.detach().as_subclass(_Weight), *args, **options)
            return tensor
        return initialise(tensor, *args, **options)

    return draw
