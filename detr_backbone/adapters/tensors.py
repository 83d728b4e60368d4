"""The backbone as a list or a tuple of tensors: for RT-DETR, D-FINE and DEIM, and for mmdetection."""

from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor

from detr_backbone.adapters.adapter import PaddedTensorAdapter
from detr_backbone.backbone import Backbone, BackboneBase
from detr_backbone.networks.norms import Norm
from detr_backbone.padding.exact import Padding


class _UnderItsOwnNames(PaddedTensorAdapter):
    """An adapter whose state-dict keys are the network's own."""

    @classmethod
    def from_backbone(cls, backbone: BackboneBase) -> Self:
        """Return the adapter of a backbone that is built already, such as `BackboneBase(network, …)` of any network."""
        adapter = cls.__new__(cls)
        PaddedTensorAdapter.__init__(adapter, backbone, body="")
        return adapter


class ListBackbone(_UnderItsOwnNames):
    """A backbone that gives a list of tensors, finest level first, as RT-DETR, D-FINE and DEIM take it.

    State-dict keys are the network's own (`backbone.layer1.0.conv1.weight` in a detector). All options may be given by
    position, since the registry of these programs reads no others.

    Args:
        name, weights, norm, dilation, channels_last: see BackboneConfig.
        return_layers: see BackboneConfig; the three levels that these programs take.
        train_layers: see BackboneConfig; these programs train every stage, and keep the stem.
        padding: see BackboneConfig; these programs resize images to one size, so nothing is padded.

    >>> import torch
    >>> [level.shape for level in ListBackbone("resnet18")(torch.rand(2, 3, 64, 64))]
    [torch.Size([2, 128, 8, 8]), torch.Size([2, 256, 4, 4]), torch.Size([2, 512, 2, 2])]
    """

    def __init__(  # noqa: PLR0917 - see above
        self,
        name: str = "resnet50",
        weights: str | None = None,
        return_layers: Sequence[str] | None = ("layer2", "layer3", "layer4"),
        train_layers: Sequence[str] | None = ("layer1", "layer2", "layer3", "layer4"),
        norm: Norm = "frozen",
        dilation: bool = False,
        padding: Padding = "zeros",
        channels_last: bool = True,
    ) -> None:
        backbone = Backbone(
            name,
            weights=weights,
            return_layers=return_layers,
            train_layers=train_layers,
            norm=norm,
            dilation=dilation,
            padding=padding,
            channels_last=channels_last,
        )
        super().__init__(backbone, body="")

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the levels [B, C, h, w] of a batch [B, 3, H, W], finest first."""
        return self.levels(self.batch(x))


class TupleBackbone(_UnderItsOwnNames):
    """A backbone that gives a tuple of tensors, finest level first, as mmdetection takes it.

    State-dict keys are the network's own. As in mmdetection's recipes (`frozen_stages=1`), the stem and the first stage
    keep their weights.

    Args:
        name: see BackboneConfig.
        options: others of Backbone's. Left out, `return_layers` are all stages, as of mmdetection's ResNet, and
            `padding` is "zeros"; "exact" needs `take_sizes_from(model.data_preprocessor)`.

    >>> import torch
    >>> type(TupleBackbone("resnet18", return_layers=["layer4"])(torch.rand(2, 3, 64, 64)))
    <class 'tuple'>
    """

    def __init__(self, name: str = "resnet50", **options: Any) -> None:
        defaults: dict[str, Any] = {"padding": "zeros", "return_interm_layers": "return_layers" not in options}
        super().__init__(Backbone(name, **(defaults | options)), body="")

    def init_weights(self) -> None:
        """Do nothing: mmdetection calls it before training, and weights were loaded when this was built."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the levels [B, C, h, w] of a batch [B, 3, H, W], finest first."""
        return tuple(self.levels(self.batch(x)))
