"""The backbone as torchvision's detectors take it, with a feature pyramid: RetinaNet, FCOS, Faster and Mask R-CNN."""

from collections import OrderedDict
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool

from detr_backbone.adapters.adapter import PaddedTensorAdapter
from detr_backbone.backbone import BackboneBase
from detr_backbone.nested_tensor import NestedTensor


class BackboneWithFPN(PaddedTensorAdapter):
    """A backbone with torchvision's feature pyramid on top, in place of torchvision's class of this name.

    State-dict keys are `backbone.body.*` and `backbone.fpn.*`, as torchvision's. With `padding="exact"`, an image's
    levels do not depend on its batch, the pyramid's included: `take_sizes_from(model.transform)` is called once, after
    the model was built. What the detector's heads make of them is theirs: they do not know of padding.

    Args:
        backbone: what runs. The default of `train_layers` is torchvision's `trainable_layers=3`: the stem and the first
            stage keep their weights.
        out_channels: C of the pyramid's levels.
        extra_blocks: what makes levels beyond the backbone's; left out, `LastLevelMaxPool()`, as Faster and Mask R-CNN
            take it. RetinaNet and FCOS take `LastLevelP6P7(256, 256)`.
        norm_layer: of the pyramid's convolutions.

    Attributes:
        out_channels: C of every level, which the detectors read.

    >>> from detr_backbone import Backbone
    >>> backbone = BackboneWithFPN(Backbone("resnet18", return_interm_layers=True, padding="zeros"))
    >>> {name: tuple(level.shape) for name, level in backbone(torch.rand(1, 3, 64, 64)).items()}["pool"]
    (1, 256, 1, 1)
    """

    def __init__(
        self,
        backbone: BackboneBase,
        *,
        out_channels: int = 256,
        extra_blocks: ExtraFPNBlock | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__(backbone, body="body")
        self.out_channels = out_channels
        self.fpn = FeaturePyramidNetwork(
            in_channels_list=list(backbone.channels),
            out_channels=out_channels,
            extra_blocks=extra_blocks or LastLevelMaxPool(),
            norm_layer=norm_layer,
        )
        self._running: NestedTensor | None = None
        if backbone.padding == "exact":
            for module in self.fpn.modules():
                if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
                    module.register_forward_pre_hook(self._zero_inputs)

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        """Return the levels of a batch [B, 3, H, W] by name, finest first: "0", "1", … and those of `extra_blocks`."""
        batch = self.batch(x)
        levels = OrderedDict((str(index), level) for index, level in enumerate(self.levels(batch)))
        if self.backbone.padding == "zeros" or not batch.is_padded:
            return cast("OrderedDict[str, Tensor]", self.fpn(levels))
        try:
            self._running = batch
            return OrderedDict((name, self._zero_padding(level)) for name, level in self.fpn(levels).items())
        finally:
            self._running = None

    def _zero_inputs(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (self._zero_padding(inputs[0]),)

    def _zero_padding(self, level: Tensor) -> Tensor:
        """Return a level with zeros in its padded cells; its stride shows in its size."""
        if self._running is None:
            return level
        strides = self.backbone.strides
        for stride in (*strides, 2 * strides[-1], 4 * strides[-1]):
            mask, _ = self._running.at_stride(stride)
            if mask.shape[-2:] == level.shape[-2:]:
                return torch.where(mask[:, None], 0.0, level)
        return level
