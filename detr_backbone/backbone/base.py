"""Feature levels of a network with their masks: what every backbone of a detector is."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NoReturn, Self

import torch
from torch import nn

from detr_backbone.activation_checkpointing import checkpoint_layers
from detr_backbone.errors import ConfigError
from detr_backbone.folding import find_fusions, fold_pairs, fuse, prepare_folding, scale_and_shift_together
from detr_backbone.forward_pass import Pass, PerThread, is_transformed, is_watched
from detr_backbone.frozen_batch_norm import FrozenBatchNorm2d
from detr_backbone.layer_getter import IntermediateLayerGetter
from detr_backbone.layer_getter.strategies import Hooks
from detr_backbone.nested_tensor import (
    Images,
    NestedTensor,
    Size,
    as_nested_tensor,
    pad_to_multiple,
    size_of,
    valid_sizes,
)
from detr_backbone.networks.build import train_only
from detr_backbone.networks.dry_run import DryRun
from detr_backbone.networks.geometry import Geometry, as_map, measure
from detr_backbone.networks.input_channels import first_convolution, refuse_other_input
from detr_backbone.networks.layer_paths import expand_paths
from detr_backbone.networks.stages import NetworkStages
from detr_backbone.networks.structure import Structure, structure_of
from detr_backbone.padding.exact import Padding, feature_level, zero_before_windows, zero_inputs
from detr_backbone.padding.plan import Batching, choose_plan
from detr_backbone.pyramid import PyramidConfig, SimpleFeaturePyramid

TRAINED_STAGES = ("layer2", "layer3", "layer4")
"""The stages that DETR trains; the stem and the first stage stay as pretrained (arXiv 2005.12872, section A.4)."""


class BackboneBase(nn.Module):
    """Feature levels with their masks, finest first, of a network.

    Args:
        backbone: the network, with FrozenBatchNorm2d where it normalises.
        return_interm_layers: return the last layer of every resolution of stride 4 and more, not only of the last.
        return_layers: the general form: any layers by path, in any order; contradicts `return_interm_layers`. In all
            paths `[8-11]` stands for these numbers and `*` for any one name.
        train_layers: paths of the layers whose parameters train; all others are frozen. Empty freezes all.
        padding: "exact" makes an image's features independent of who shares its batch; "zeros" reproduces the original
            code (facebookresearch/detr), where padding leaks into the image.
        channels_last: compute in torch.channels_last, which convolutions are faster with; parameters stay contiguous.
        checkpointed_layers: paths of layers whose inner activations are computed again in the backward pass.
        pyramid: levels of several strides, made from layers of one stride; it always trains, and starts random.
        stages: those of the network as its library built it, if they are known: a network is run dry once for them.

    Attributes:
        body: the IntermediateLayerGetter; frozen BatchNorms are folded (see `folding`); state-dict keys are `body.*`.
        pyramid: what makes levels of other strides, if anything does; state-dict keys are `pyramid.*`.
        strides, channels: one entry per level, measured, finest level first.
        num_channels: channels of the coarsest level.
        input_strides: pixels per cell of what each inner layer takes, by path.
        size_divisor: a batch is padded to sides that it divides before it runs through the network; 1 for a ResNet, the
            coarsest stride for a network that would round sizes down, or whose windows follow the size of the image.
        batching: "masked", the whole batch with zeros before every window; "by_size", images of equal size together,
            for a network that is exact in no other way; "padded", the whole batch as it is, for `padding="zeros"`.
        leak: why the network is not "masked", such as the layer that takes its statistics from padded cells; None if
            it is, or need not be.

    Raises:
        ConfigError: a layer does not exist, an entry of `train_layers` has no parameters, nothing that is left trains,
            options contradict, or a norm takes its statistics from the batch under "exact".
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        return_interm_layers: bool = False,
        return_layers: Sequence[str] | None = None,
        train_layers: Sequence[str] = TRAINED_STAGES,
        padding: Padding = "exact",
        channels_last: bool = True,
        checkpointed_layers: Sequence[str] = (),
        pyramid: PyramidConfig | None = None,
        stages: NetworkStages | None = None,
    ) -> None:
        super().__init__()
        if pyramid is not None and not isinstance(pyramid, PyramidConfig):
            raise TypeError(f"`pyramid` must be such as PyramidConfig(strides=(8, 16)), got {pyramid!r}")
        if padding not in ("exact", "zeros"):
            raise ConfigError(f"`padding` must be 'exact' or 'zeros', got {padding!r}")
        self.padding = padding
        self._channels_last = channels_last
        self._passes: PerThread[Pass] = PerThread()
        self._structure: Structure | None = None
        self.batching: Batching = "padded" if padding == "zeros" else "masked"
        self._zeroes_padding = padding == "exact"
        self._is_folded_for_inference = False
        self.pyramid: SimpleFeaturePyramid | None = None
        stages = stages or NetworkStages(backbone)
        return_layers = stages.levels(return_layers, return_interm_layers=return_interm_layers)
        checkpointed_layers = expand_paths(backbone, checkpointed_layers, option="checkpointed_layers")
        # The layers come first: what no level needs is dropped, and is neither measured nor tried.
        paths = self._choose_layers(backbone, return_layers, train_layers)
        # Geometry says where there are levels and windows, so it stands before whatever depends on a stride.
        geometry = self._measure(backbone, stages.dry_run, paths)
        # Folding replaces convolutions, so it stands before the hooks on windows and the self-test of these layers.
        self._folded = prepare_folding(self.body, stages.dry_run.sole_readers(paths), self._passes)
        # What can be fused for inference shows in the dry run of the network as it was before the folding.
        self._fusions = find_fusions(self.body, stages.dry_run, folded=self._folded, returned=paths)
        # The self-test runs the backbone as it is by now.
        self._make_exact(backbone, geometry)
        # Checkpointing changes no result, so it needs no test; it wraps the layers as they are at last.
        checkpoint_layers(self.body, checkpointed_layers, self._passes)
        self._structure, _ = structure_of(self.body, self._passes)
        # The pyramid takes the levels of the body as they are by now, and gives the backbone others.
        self._make_pyramid(pyramid)

    def forward(self, images: Images, sizes: Sequence[Size] | None = None) -> dict[str, NestedTensor]:
        """Return levels [B, C, h, w] with their masks under "0", "1", …, finest first; h = ceil(H / stride).

        Images that share a pass are the whole batch or, where that is exact alone or faster, those of equal size; a
        hook on a layer fires once for each pass. A network that was changed after it was built runs by size, without
        folding: its padding was planned for other layers.

        Args:
            images: a NestedTensor of this package or any other, or what makes one: images [C, h, w] of any sizes, or a
                batch [B, C, H, W]. For torchvision's weights, RGB in 0 .. 1 minus mean (0.485, 0.456, 0.406), divided
                by std (0.229, 0.224, 0.225); other weights state theirs.
            sizes: valid (h, w) of each image, for a batch [B, C, H, W] that is padded.
        """
        batch = as_nested_tensor(images, sizes)
        self._refuse_other_input(batch)
        state = self._state_of_pass()
        if self.padding == "zeros" or not batch.is_padded:
            return self._run(batch, state)
        from detr_backbone.padding.by_size import is_faster_by_size  # it loads torch's compiler

        if self.batching == "by_size" or state is None or is_faster_by_size(batch, self.body):
            return self._run_by_size(batch, state)
        return self._run(batch, state)

    def forward_by_size(self, images: Images, sizes: Sequence[Size] | None = None) -> dict[str, NestedTensor]:
        """Return the levels as `forward` does, from a pass for each size of image: exact for every network.

        Raises:
            ConfigError: the network is sharded layer by layer, so that all processes must make the same passes.
        """
        return self._run_by_size(as_nested_tensor(images, sizes), self._state_of_pass())

    def forward_whole_batch(
        self, images: Images, sizes: Sequence[Size] | None = None, *, folds: bool = True
    ) -> dict[str, NestedTensor]:
        """Return the levels as `forward` does, from one pass: exact if `batching` is "masked" or all sizes are equal.

        Args:
            images: see `forward`.
            sizes: see `forward`.
            folds: let convolutions do the work of the frozen BatchNorms behind them.
        """
        return self._run(as_nested_tensor(images, sizes), self._state_of_pass() if folds else None)

    def pad(self, images: Images) -> NestedTensor:
        """Return the batch that runs through the network: with sides that `size_divisor` divides."""
        return pad_to_multiple(as_nested_tensor(images), self.size_divisor)

    def fold_for_inference(self, dtype: torch.dtype | None = None) -> None:
        """Fold every frozen BatchNorm into its convolution for good; see the function of this name."""
        norms = self._norms_to_fold()
        if norms is None:
            raise ConfigError("`fold_for_inference` must find the network as it was built, got one with other layers")
        for name, tensor in self.body.state_dict().items():
            if not tensor.isfinite().all():  # the primitives' ReLU would make finite features of it
                raise ConfigError(f"`fold_for_inference` must find finite weights, got NaN or infinity in {name}")
        # A hook between a convolution and its norm keeps the two apart, as in every pass before.
        fold_pairs(self.body, {path: self._folded[path] for path in norms}, dtype=dtype)
        fuse(self.body, self._fusions, self._passes)
        self.requires_grad_(requires_grad=False).eval()
        self._folded, self._fusions = {}, {}
        self._structure, _ = structure_of(self.body, self._passes)
        self._is_folded_for_inference = True

    def train(self, mode: bool = True) -> Self:
        if mode and self._is_folded_for_inference:
            raise ConfigError("a backbone that is folded for inference does not train; build it again")
        return super().train(mode)

    def __prepare_scriptable__(self) -> NoReturn:
        raise ConfigError(
            "`torch.jit.script` must not be used on a backbone; use torch.compile, or detr_backbone.export"
        )

    def _choose_layers(
        self, backbone: nn.Module, return_layers: Sequence[str], train_layers: Sequence[str]
    ) -> list[str]:
        """Make the getter of the layers, and let those train that shall; return the layers, first to last."""
        if len(set(return_layers)) < len(return_layers):
            raise ConfigError(f"`return_layers` must name each layer once, got {list(return_layers)}")
        train_layers = expand_paths(backbone, train_layers, option="train_layers")
        train_only(backbone, train_layers)
        depth = {path: index for index, (path, _) in enumerate(backbone.named_modules())}
        ordered = sorted(return_layers, key=lambda path: depth.get(path, len(depth)))
        try:
            self.body = IntermediateLayerGetter(backbone, {path: str(level) for level, path in enumerate(ordered)})
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if train_layers and not any(parameter.requires_grad for parameter in self.body.parameters()):
            raise ConfigError(
                f"`train_layers` must name none or layers that lead to {list(return_layers)}, got {list(train_layers)}"
            )
        return ordered

    def _measure(self, backbone: nn.Module, dry_run: DryRun, paths: Sequence[str]) -> Geometry:
        # The getter gives its outputs in the order in which they are computed.
        geometry = measure(backbone, dry_run, sorted(paths, key=lambda path: dry_run.reached(path).end))
        self._layouts, self.strides, self.channels = geometry.layouts, geometry.strides, geometry.channels
        self.num_channels = self.channels[-1]
        self._first_convolution, _ = first_convolution(self.body)
        self.input_strides = geometry.input_strides
        self.size_divisor = geometry.divisor
        return geometry

    def _make_exact(self, backbone: nn.Module, geometry: Geometry) -> None:
        """Let windows find zeros in the padding, and choose the plan by which no image depends on another."""
        if self.padding == "exact":
            zero_before_windows(self.body, geometry, self._passes)
        plan = choose_plan(self, backbone, self.body, geometry, self.padding)
        self.batching, self.leak, self.size_divisor = plan.batching, plan.leak, plan.size_divisor
        self._zeroes_padding = plan.zeroes_padding

    def _make_pyramid(self, config: PyramidConfig | None) -> None:
        if config is not None:
            self.pyramid = SimpleFeaturePyramid(
                config, strides=self.strides, channels=self.channels, padding=self.padding
            )
            self.strides, self.channels = self.pyramid.strides, self.pyramid.channels
            self.num_channels = self.channels[-1]

    def _run(self, images: NestedTensor, state: Pass | None) -> dict[str, NestedTensor]:
        """Return the levels from one pass in this state; None runs every layer by itself, nothing folded or fused."""
        batch = self.pad(images)
        padded = batch if self._zeroes_padding and batch.is_padded else None
        memory_format = torch.channels_last if self._channels_last else torch.preserve_format
        with self._passes.set(replace(state or Pass(), padded=padded)):
            outputs = self.body(batch.tensors.to(memory_format=memory_format))
        levels = {}
        for (name, output), layout in zip(outputs.items(), self._layouts, strict=True):
            cells = as_map(output, layout, size_of(batch.tensors), channels_last=self._channels_last)
            if self.size_divisor > 1:
                ((h, w),) = valid_sizes([size_of(images.tensors)], layout.stride)
                cells = cells[:, :, :h, :w]
            levels[name] = feature_level(cells, images, stride=layout.stride, padding=self.padding)
        return levels if self.pyramid is None else self.pyramid(levels, images)

    def _run_by_size(self, images: NestedTensor, state: Pass | None) -> dict[str, NestedTensor]:
        from detr_backbone.padding.by_size import is_sharded, run_by_size

        if is_sharded(self.body):
            raise ConfigError(
                "a network that runs images by size must not be sharded layer by layer, since processes would make "
                'different passes; shard the detector around it, or give `padding="zeros"`'
            )
        return run_by_size(partial(self._run, state=state), images, self.strides, self.size_divisor)

    def _refuse_other_input(self, images: NestedTensor) -> None:
        """Compare images with the first convolution, if what took the images when this was built still does."""
        path, first = first_convolution(self.body)
        if path == self._first_convolution:
            refuse_other_input(images.tensors, first)

    def _norms_to_fold(self) -> dict[str, FrozenBatchNorm2d] | None:
        """Return the norms whose work the convolutions before them do, by path; None if the network was changed."""
        structure, norms = structure_of(self.body, self._passes)
        is_building = self._structure is None
        return norms if is_building or structure == self._structure else None

    def _state_of_pass(self) -> Pass | None:
        """Return the state of a pass but for its padding; None if the network was changed."""
        norms = self._norms_to_fold()
        return None if norms is None else Pass(norms=scale_and_shift_together(norms), fuses=self._fuses())

    def _fuses(self) -> bool:
        """Return whether convolutions do the work of sums and ReLUs; hooks shall see what each layer does by itself."""
        if is_transformed() or not self._is_folded_for_inference:
            return False
        return not is_watched(self.body, own=(zero_inputs, Hooks.add_output))
