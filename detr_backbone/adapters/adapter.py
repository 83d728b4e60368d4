"""A backbone inside of another library's detector, under that library's names."""

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from detr_backbone.backbone import BackboneBase
from detr_backbone.errors import ConfigError
from detr_backbone.nested_tensor import NestedTensor, Size, as_nested_tensor

_MEMBERS = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


class Adapter(nn.Module):
    """A module that runs a backbone, but registers its network alone, so that keys are those of the other library.

    What is registered is the network (`backbone.body`) and, where there is one, its pyramid. They are the backbone's
    own: whatever moves, trains, loads or copies the adapter does so with the backbone.

    Args:
        backbone: what runs.
        body: path under which the network is registered; "" registers its layers under their own names.

    Raises:
        ConfigError: `backbone` is none.
    """

    def __init__(self, backbone: BackboneBase, *, body: str) -> None:
        super().__init__()
        if not isinstance(backbone, BackboneBase):
            raise ConfigError(f"`backbone` must be a BackboneBase, such as a Backbone, got {type(backbone).__name__}")
        self._unregistered = (backbone,)
        self._body_path = body
        self._register()

    @property
    def backbone(self) -> BackboneBase:
        """The backbone that runs, with its strides and channels."""
        return self._unregistered[0]

    def train(self, mode: bool = True) -> Self:
        self.backbone.train(mode)
        if not self._body_path:  # `fold_for_inference`, which sets the mode last, exchanges layers of the network
            self._modules.update(self.backbone.body._modules)
        return super().train(mode)

    def _register(self) -> None:
        body, pyramid = self.backbone.body, self.backbone.pyramid
        if self._body_path:
            parent: nn.Module = self
            *parents, name = self._body_path.split(".")
            for part in parents:
                parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(name, body)
        else:
            # The members are the network's own, not those of a child: keys get no prefix, whatever the network is.
            vars(self).update({name: vars(body)[name] for name in _MEMBERS})
            if pyramid is not None:
                self._modules = dict(self._modules)  # the network runs its own members, without the pyramid
        if pyramid is not None:
            self.pyramid = pyramid

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register()


class PaddedTensorAdapter(Adapter):
    """An adapter for a library that hands over a padded batch [B, 3, H, W] without the sizes of its images.

    Under `padding="zeros"` the backbone computes what the library's own would. Under "exact" it needs the sizes, which
    `take_sizes_from` takes from the module that padded the batch.
    """

    def __init__(self, backbone: BackboneBase, *, body: str) -> None:
        super().__init__(backbone, body=body)
        self._sizes: list[Size] | None = None

    def take_sizes_from(self, module: nn.Module) -> None:
        """Take the sizes of every batch from the module that pads it, just before the backbone runs.

        Args:
            module: torchvision's `model.transform`, or mmdetection's `model.data_preprocessor`.
        """
        module.register_forward_hook(self._remember_sizes)

    def batch(self, images: Tensor, sizes: list[Size] | None = None) -> NestedTensor:
        """Return a batch with the sizes of its images, as the backbone takes it.

        Args:
            images: [B, 3, H, W], padded at the bottom and on the right.
            sizes: valid (h, w) of each image; left out, those that `take_sizes_from` gives.

        Raises:
            ConfigError: the backbone is exact, and the sizes are not known, so that padding would count as image.
        """
        remembered, self._sizes = self._sizes, None
        sizes = remembered if sizes is None else sizes
        if sizes is None and self.backbone.padding == "exact":
            raise ConfigError(
                "`padding='exact'` needs the sizes of the images, got a batch alone: call `take_sizes_from` with the "
                "module that pads the images, or build the backbone with `padding='zeros'`"
            )
        return as_nested_tensor(images, sizes)

    def levels(self, batch: NestedTensor) -> list[Tensor]:
        """Return the levels [B, C, h, w] of a batch as tensors, finest first."""
        return [level.tensors for level in self.backbone(batch).values()]

    def _remember_sizes(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Mapping):  # of mmdetection
            samples = output.get("data_samples")
            self._sizes = None if samples is None else [tuple(sample.img_shape[:2]) for sample in samples]
        else:
            self._sizes = list(output[0].image_sizes)
