"""Where in a network the resolution changes: what can be a level of features."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from detr_backbone.errors import ConfigError
from detr_backbone.networks.dry_run import DryRun
from detr_backbone.networks.geometry import MapLayout, layout_of, probe
from detr_backbone.networks.layer_paths import expand_paths


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A layer whose output is a map: its path, pixels per cell, and channels."""

    path: str
    stride: int
    channels: int


class NetworkStages:
    """The stages of a network, from a dry run that is made when it is first needed.

    Args:
        network: as its library builds it.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    @cached_property
    def dry_run(self) -> DryRun:
        """The dry run of the network, as it was built."""
        return probe(self._network)

    @cached_property
    def stages(self) -> list[Stage]:
        """The last layer before each change of resolution, finest first: what can be a level of features.

        timm declares for most of its networks where the stages end; a ViT's end is the norm after its last block. In
        others the layers are taken in the order of their calls, each as a whole unless it more than halves the
        resolution.

        Raises:
            ConfigError: the network does not take an image of 256 x 320 pixels.
        """
        self.dry_run.refuse_error()
        calls = self.dry_run.calls
        info = getattr(self._network, "feature_info", None) or ()
        declared = [entry["module"] for entry in getattr(info, "info", info)]
        if not declared or not all(path in calls for path in declared):
            declared = list(_whole_layers(self._network, "", self.dry_run))
        last = {}
        for path in sorted(declared, key=lambda path: calls[path].end):
            layout = _layout(self.dry_run, self.dry_run.reached(path).output_shape)
            if layout is not None:
                end = self._final_norm(path, layout) or path
                last[layout.stride] = Stage(path=end, stride=layout.stride, channels=layout.channels)
        return sorted(last.values(), key=lambda stage: stage.stride)

    def levels(self, return_layers: Sequence[str] | None, *, return_interm_layers: bool) -> Sequence[str]:
        """Return the layers that are named, as `expand_paths` does; otherwise all default levels, or the last of them.

        Default levels are the last layers of every resolution of stride 4 and more: a ResNet's four stages.

        Raises:
            ConfigError: layers are named, and all of them asked for too; there are no default levels; or a pattern fits
                none.
        """
        if return_layers is None:
            return self._default_levels()[0 if return_interm_layers else -1 :]
        if return_interm_layers:
            raise ConfigError(f"give `return_interm_layers` or `return_layers`, got both: {list(return_layers)}")
        return expand_paths(self._network, return_layers, option="return_layers")

    def after_first_stage(self, return_layers: Sequence[str]) -> list[str]:
        """Return the layers after the stem and the first stage, which DETR leaves as pretrained, up to the last level.

        The first stage ends with the last layer before the resolution falls below a quarter of the image's.

        Raises:
            ConfigError: the network has no such stage, or does not take an image of 256 x 320 pixels.
        """
        first = [stage for stage in self.stages if stage.stride <= 4]
        if not first:
            raise ConfigError(
                "`train_layers` must be given for a network without a stage of stride 4, got "
                f"{describe_stages(self.stages)}"
            )
        calls = self.dry_run.calls
        start = calls[first[-1].path].end
        end = max((calls[path].end for path in return_layers if path in calls), default=0)
        after = [path for path, call in calls.items() if start < call.start < end]
        return [path for path in after if path.rpartition(".")[0] not in after]

    def _final_norm(self, path: str, layout: MapLayout) -> str | None:
        """Return the layer of the network itself that takes a transformer's tokens next and gives them back."""
        end = self.dry_run.calls[path].end
        after, call = next(((p, call) for p, call in self.dry_run.calls.items() if call.start > end), (path, None))
        if call is None or layout.axes != "NLC" or _layout(self.dry_run, call.output_shape) != layout:
            return None
        module = self._network.get_submodule(after)
        return None if "." in after or isinstance(module, nn.Identity) else after

    def _default_levels(self) -> list[str]:
        from torchvision.models.resnet import ResNet

        if isinstance(self._network, ResNet):
            return ["layer1", "layer2", "layer3", "layer4"]
        if not self.stages or self.stages[-1].stride < 4:
            raise ConfigError(
                "the network must have a layer whose sides are the image's divided by a whole stride of 4 or more, got "
                f"{describe_stages(self.stages)}"
            )
        return [stage.path for stage in self.stages if stage.stride >= 4]


def stages(network: nn.Module) -> list[Stage]:
    """Return the last layer before each change of resolution, finest first."""
    return NetworkStages(network).stages


def describe_stages(stages: Sequence[Stage]) -> str:
    """Return stages as an error shows them: `layer1 (stride 4), layer2 (stride 8)`, or `none`."""
    return ", ".join(f"{stage.path} (stride {stage.stride})" for stage in stages) or "none"


def _layout(dry_run: DryRun, shape: tuple[int, ...] | None) -> MapLayout | None:
    return None if shape is None else layout_of(shape, dry_run.size)


def _whole_layers(network: nn.Module, around: str, dry_run: DryRun) -> Iterator[str]:
    """Yield the called layers directly inside `around`; of one that more than halves the resolution, its own."""
    for name, child in network.get_submodule(around).named_children():
        path = f"{around}.{name}".lstrip(".")
        call = dry_run.calls.get(path)
        inside = [f"{path}.{inner}" for inner, _ in child.named_children() if f"{path}.{inner}" in dry_run.calls]
        taken = given = None
        if call is not None:
            taken, given = _layout(dry_run, call.input_shape), _layout(dry_run, call.output_shape)
        halves = taken and given and given.stride <= 2 * taken.stride
        if call is not None and (halves or not inside):
            yield path
        else:  # a ModuleList is not called, but its layers are
            yield from _whole_layers(network, path, dry_run)
