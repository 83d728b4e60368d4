"""The exponential moving average of a detector's weights, which is evaluated and used in place of the last ones."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class WeightAverage:
    """An average of a detector's parameters over its steps; buffers are those of the last step.

    Args:
        model: the detector.
        decay: of the average, in each step; `min(decay, (1 + steps) / (10 + steps))` while there are few.
        steps: that the detector has taken.

    Source: Polyak and Juditsky, 1992; the beginning as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, decay: float, *, steps: int) -> None:
        self._decay, self._steps = decay, steps
        self._averaged = AveragedModel(model, multi_avg_fn=self._mix)

    @property
    def module(self) -> nn.Module:
        """The averaged detector."""
        return self._averaged.module

    def update(self, model: nn.Module) -> None:
        """Take the weights of one more step into the average."""
        self._steps += 1
        self._averaged.update_parameters(model)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the average of a checkpoint."""
        self.module.load_state_dict(state)
        self._averaged.n_averaged.fill_(self._steps)

    @torch.no_grad()
    def _mix(self, averaged: Any, current: Any, steps: Any) -> None:
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        get_ema_multi_avg_fn(decay)(averaged, current, steps)  # type: ignore[no-untyped-call]
