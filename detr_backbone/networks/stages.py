"""Where in a network the resolution changes: what can be a level of features."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from typing import Any

from torch import Tensor, nn

from detr_backbone.errors import ConfigError
from detr_backbone.networks.dry_run import PROBE, on_meta
from detr_backbone.networks.geometry import Layout, layout_of


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A layer whose output is a map: its path, pixels per cell, and channels."""

    path: str
    stride: int
    channels: int


@dataclass(kw_only=True)
class _Call:
    """A layer's first call: when it began and ended, and what it took and gave."""

    began: int
    ended: int = 0
    takes: Layout | None = None
    gives: Layout | None = None


class Survey:
    """What a pass over an image without numbers shows of a network; the pass is made when it is first needed.

    Args:
        network: as its library builds it.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    @cached_property
    def stages(self) -> list[Stage]:
        """The last layer before each change of resolution, finest first: what can be a level of features.

        timm declares for most of its networks where the stages end. In others the layers are taken in the order of
        their calls, each as a whole unless it more than halves the resolution.

        Raises:
            ConfigError: the network does not take an image of 256 x 320 pixels.
        """
        info = getattr(self._network, "feature_info", None) or ()
        declared = [entry["module"] for entry in getattr(info, "info", info)]
        if not declared or not all(path in self._calls for path in declared):
            declared = list(_whole_layers(self._network, "", self._calls))
        last = {}
        for path in sorted(declared, key=lambda path: self._calls[path].ended):
            layout = self._calls[path].gives
            if layout is not None:
                last[layout.stride] = Stage(path=path, stride=layout.stride, channels=layout.channels)
        return sorted(last.values(), key=lambda stage: stage.stride)

    def levels(self, return_layers: Sequence[str] | None, *, return_interm_layers: bool) -> Sequence[str]:
        """The layers to return: those that are named; otherwise all default levels, or the last of them.

        Default levels are the last layers of every resolution of stride 4 and more: a ResNet's four stages.

        Raises:
            ConfigError: layers are named, and all of them asked for too; or there are no default levels.
        """
        if return_layers is None:
            return self._default_levels()[0 if return_interm_layers else -1 :]
        if return_interm_layers:
            raise ConfigError(f"give `return_interm_layers` or `return_layers`, got both: {list(return_layers)}")
        return return_layers

    def after_first_stage(self, return_layers: Sequence[str]) -> list[str]:
        """The layers after the stem and the first stage, which DETR leaves as pretrained, up to the last one returned.

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
        calls = self._calls
        begin = calls[first[-1].path].ended
        end = max((calls[path].ended for path in return_layers if path in calls), default=0)
        after = [path for path, call in calls.items() if begin < call.began < end]
        return [path for path in after if path.rpartition(".")[0] not in after]

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

    @cached_property
    def _calls(self) -> dict[str, _Call]:
        return _calls(self._network)


def stages(network: nn.Module) -> list[Stage]:
    """The last layer before each change of resolution, as `Survey` finds them."""
    return Survey(network).stages


def _calls(network: nn.Module) -> dict[str, _Call]:
    """The first call of each inner layer, by path, in a pass over an image without numbers."""
    calls: dict[str, _Call] = {}
    clock = count()

    def begin(path: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        takes = layout_of(inputs[0].shape, PROBE) if inputs and isinstance(inputs[0], Tensor) else None
        calls.setdefault(path, _Call(began=next(clock), takes=takes))

    def end(path: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if not calls[path].ended:
            calls[path].ended = next(clock)
            calls[path].gives = layout_of(output.shape, PROBE) if isinstance(output, Tensor) else None

    handles = [
        handle
        for path, module in network.named_modules()
        if path
        for handle in (
            module.register_forward_pre_hook(partial(begin, path)),
            module.register_forward_hook(partial(end, path)),
        )
    ]
    try:
        on_meta(network, PROBE)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _whole_layers(network: nn.Module, around: str, calls: dict[str, _Call]) -> Iterator[str]:
    """The called layers directly inside of `around`; of one that more than halves the resolution, those inside it."""
    for name, child in network.get_submodule(around).named_children():
        path = f"{around}.{name}".lstrip(".")
        call = calls.get(path)
        inside = [f"{path}.{inner}" for inner, _ in child.named_children() if f"{path}.{inner}" in calls]
        halves = call is not None and call.takes and call.gives and call.gives.stride <= 2 * call.takes.stride
        if call is not None and (halves or not inside):
            yield path
        else:  # a ModuleList is not called, but its layers are
            yield from _whole_layers(network, path, calls)


def describe_stages(found: Sequence[Stage]) -> str:
    """Stages as an error shows them: `layer1 (stride 4), layer2 (stride 8)`, or `none`."""
    return ", ".join(f"{stage.path} (stride {stage.stride})" for stage in found) or "none"
