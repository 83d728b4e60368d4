"""BatchNorm whose statistics and affine parameters are fixed.

Detectors train with a few images per device, too few for batch statistics, so a pretrained backbone keeps the ones that
it was trained with. Without pretrained weights, `calibrate_frozen_batch_norm` takes them from data.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_backbone.forward_pass import Pass, PerThread


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with fixed statistics and affine parameters: BatchNorm2d in eval mode, for ever.

    Its four buffers have BatchNorm2d's names, so weights of a BatchNorm2d load as they are; their `num_batches_tracked`
    is dropped. Scale and shift are folded in float32 at least, and the output has the input's dtype.

    Args:
        num_features: channels C of the input [B, C, H, W]; axes after C may be any, as of tokens [B, C, N].
        eps: added to the variance, in float32.

    Attributes:
        folding: its path in a backbone, and the passes in which the convolution before does its work; see `folding`.

    >>> FrozenBatchNorm2d(8)(torch.zeros(2, 8, 4, 4, dtype=torch.bfloat16)).dtype
    torch.bfloat16
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.folding: tuple[str, PerThread[Pass]] | None = None
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(x if self._is_folded() else self.normalise(x))

    def normalise(self, x: Tensor) -> Tensor:
        """Return the input with every channel scaled and shifted."""
        # batch_norm reads parameters of its input's dtype or of float32, and folds them in float32 in both cases.
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return what a channel is multiplied by, and what is added then: two tensors [C], in float32 at least."""
        return scale_and_shift(self.weight, self.bias, self.running_mean, self.running_var, self.eps)

    def activate(self, x: Tensor) -> Tensor:
        """Return what a subclass makes of the normalised values: the values themselves here."""
        return x

    def _is_folded(self) -> bool:
        if self.folding is None:
            return False
        path, passes = self.folding
        running = passes.get()
        folded = None if running is None else running.norms.get(path)
        return folded is not None and folded.module is self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def scale_and_shift(weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return what BatchNorm multiplies each channel by, and what it adds then: two tensors [C], in float32 at least.

    Source: arXiv 1502.03167, algorithm 2, step 11.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale = weight.to(dtype) * (variance.to(dtype) + eps).rsqrt()
    return scale, bias - mean * scale
