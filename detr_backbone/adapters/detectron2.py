"""The backbone as detectron2 and detrex take it: a dict of tensors, and their shapes by `output_shape`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from detr_backbone.adapters.adapter import PaddedTensorAdapter
from detr_backbone.backbone import BackboneBase
from detr_backbone.errors import ConfigError


@dataclass(frozen=True)
class ShapeSpec:
    """The shape of a level, with the attributes of detectron2's class of this name; (height, width) are not fixed."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


class DictBackbone(PaddedTensorAdapter):
    """A backbone that gives a dict of tensors by names such as "res5", finest level first.

    State-dict keys are `backbone.body.*`, as of detrex's TorchvisionResNet. `detectron2.modeling.Backbone.register(
    DictBackbone)` makes it pass the check of detectron2's FPN.

    Args:
        backbone: what runs. The default of `train_layers` is detectron2's `FREEZE_AT = 2`: the stem and the first stage
            keep their weights. With `padding="exact"` it is given the ImageList in place of its tensor.
        out_features: name of each level; left out, "res2" for stride 4 to "res5" for stride 32.

    Raises:
        ConfigError: there are more or fewer names than levels, or two levels of one stride without names (DC5).

    >>> from detr_backbone import Backbone
    >>> DictBackbone(Backbone("resnet18", return_layers=["layer3", "layer4"])).output_shape()["res5"]
    ShapeSpec(channels=512, height=None, width=None, stride=32)
    """

    def __init__(self, backbone: BackboneBase, out_features: Sequence[str] | None = None) -> None:
        super().__init__(backbone, body="body")
        names = (
            [f"res{stride.bit_length() - 1}" for stride in backbone.strides] if out_features is None else out_features
        )
        if len(names) != len(backbone.strides) or len(set(names)) < len(names):
            raise ConfigError(
                f"`out_features` must name each of the levels of strides {list(backbone.strides)}, got {list(names)}"
            )
        self.out_features = tuple(names)

    @property
    def size_divisibility(self) -> int:
        """Pixels whose multiples the sides of a batch must be: 0, for any."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What detectron2 asks for beside `size_divisibility`: nothing."""
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of each level by its name."""
        pairs = zip(self.backbone.channels, self.backbone.strides, strict=True)
        return {
            name: ShapeSpec(channels=channels, stride=stride)
            for name, (channels, stride) in zip(self.out_features, pairs, strict=True)
        }

    def forward(self, images: Tensor | Any) -> dict[str, Tensor]:
        """Return the levels [B, C, h, w] by their names.

        Args:
            images: a batch [B, 3, H, W]; or an ImageList, with `tensor` and `image_sizes`.
        """
        if isinstance(images, Tensor):
            batch = self.batch(images)
        else:
            batch = self.batch(images.tensor, [(int(h), int(w)) for h, w in images.image_sizes])
        return dict(zip(self.out_features, self.levels(batch), strict=True))
