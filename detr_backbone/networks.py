"""Networks by name, from torchvision and timm, and where in them the resolution changes.

Nothing about a network is typed into a table: layers, strides and channels are seen in a pass without numbers.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from typing import Any, cast

from torch import Tensor, nn

from detr_backbone.errors import ConfigError
from detr_backbone.input_channels import adapt_input
from detr_backbone.layer_getter import unknown_name
from detr_backbone.maps import Layout, layout_of
from detr_backbone.meta import PROBE, on_meta

TIMM = "timm/"
"""Prefix of the names of timm's models."""
_SLOW_TO_DRAW = ("googlenet", "inception_v3")  # torchvision announces that it will not draw their weights as it does


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


def build_network(name: str, *, dilation: bool = False, in_channels: int = 3) -> nn.Module:
    """A classification network with random weights, as its library builds it.

    Args:
        name: of a model of torchvision, such as "resnet50", or of timm, such as "timm/tf_efficientnet_lite0", which is
            built for images of any size where it can be, and without its classifier.
        dilation: keep the resolution of layer3 in layer4 (DC5); only torchvision's ResNets of Bottleneck blocks can.
        in_channels: C of the images; the first convolution is adapted as `adapt_input_weight` says.

    Raises:
        ConfigError: there is no such model, timm is not installed, or the network cannot have an option.
    """
    from torchvision.models import get_model
    from torchvision.models.resnet import Bottleneck, ResNet

    network = _timm_network(name.removeprefix(TIMM)) if name.startswith(TIMM) else _torchvision_network(name)
    if dilation:
        if not isinstance(network, ResNet) or not isinstance(network.layer4[0], Bottleneck):
            raise ConfigError(f"`dilation` needs Bottleneck blocks, which {name} lacks; use a ResNet from resnet50 on")
        network = get_model(name, weights=None, replace_stride_with_dilation=[False, False, True])
    if in_channels != 3:
        adapt_input(network, in_channels)
    return network


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


def _torchvision_network(name: str) -> nn.Module:
    from torchvision import models

    known = models.list_models(models)
    if name not in known:
        raise ConfigError(f"`name` must be a model of torchvision, or timm/NAME: {_unknown_model(name, known)}")
    options: dict[str, Any] = {"init_weights": False} if name in _SLOW_TO_DRAW else {}
    return cast(nn.Module, models.get_model(name, weights=None, **options))


def _timm_network(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(f"timm/{name} needs timm: pip install 'detr_backbone[timm]'") from error
    if not timm.is_model(name):
        raise ConfigError(f"`name` must be timm/ and a model of timm: {_unknown_model(name, timm.list_models())}")
    refused: TypeError | None = None
    create: Callable[..., nn.Module] = timm.create_model
    for options in ({"dynamic_img_size": True}, {"strict_img_size": False}, {}):  # the first two for transformers
        try:
            return create(name, pretrained=False, num_classes=0, **options)
        except TypeError as error:  # the constructor does not take the option
            refused = error
    raise ConfigError(f"timm cannot build {name}: {refused}") from refused


def _unknown_model(name: str, known: Sequence[str]) -> str:
    """What to tell a user who asked for a model that does not exist: those of its family, not all thousand."""
    letters = re.match("[a-z]*", name)
    family = [other for other in known if letters and other.startswith(letters[0])][:20]
    return unknown_name(name, family or [known[0], "…", known[-1]], also=known)


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


def train_only(network: nn.Module, train_layers: Iterable[str]) -> None:
    """Let the parameters of these layers train, by path, and freeze all others.

    Raises:
        ConfigError: a layer does not exist or has no parameters.
    """
    network.requires_grad_(requires_grad=False)
    for path in train_layers:
        parameters = [p for name, p in network.named_parameters() if f"{name}.".startswith(f"{path}.")]
        if not parameters:
            known = [name for name, child in network.named_children() if any(True for _ in child.parameters())]
            raise ConfigError(f"`train_layers` must name layers with parameters: {unknown_name(path, known)}")
        for parameter in parameters:
            parameter.requires_grad_()
