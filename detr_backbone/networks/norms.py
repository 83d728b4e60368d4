"""Normalisation of a network: BatchNorm frozen, learned or synchronised, or GroupNorm instead."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, cast, get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detr_backbone.errors import ConfigError
from detr_backbone.forward_pass import has_hooks
from detr_backbone.frozen_batch_norm import FrozenBatchNorm2d

Norm: TypeAlias = Literal["frozen", "batch", "sync", "group"]

GROUPS = 32
"""Of a GroupNorm that stands in for a BatchNorm: the default of arXiv 1803.08494, section 4.1."""
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FUSED = {"drop", "act"}  # the children of timm's BatchNormAct2d, in the order in which it calls them


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """Frozen BatchNorm with what a fused layer, such as timm's BatchNormAct2d, does next: `drop`, then `act`."""

    def __init__(self, num_features: int, eps: float, *, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(num_features, eps)
        self.drop = drop
        self.act = act

    def activate(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.act(self.drop(x)))


class GroupNormAct(nn.GroupNorm):
    """GroupNorm with what a fused BatchNorm layer does next: `drop`, then `act`."""

    def __init__(self, num_groups: int, num_channels: int, *, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(num_groups, num_channels)
        self.drop = drop
        self.act = act

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the base class names it so
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


def freeze_batch_norm(network: nn.Module) -> nn.Module:
    """Replace every BatchNorm inside of a network, in place, by a frozen one that computes what it computes in eval().

    Statistics, affine parameters, eps and state-dict keys are kept, but for `num_batches_tracked`; so is an activation
    that is fused into the layer.

    Returns:
        `network`.

    Raises:
        ConfigError: a BatchNorm keeps no statistics, or is an unsupported subclass; the message names the layer.

    >>> freeze_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3)))[1]
    FrozenBatchNorm2d(8, eps=0.001)
    """
    return convert_batch_norm(network, lambda _: "frozen")


def set_norm(network: nn.Module, norm: Norm, *, train_layers: Sequence[str]) -> None:
    """Give a network the normalisation of a configuration, in place of its BatchNorm.

    Where nothing trains, BatchNorm that learns would still move with every batch: it is frozen there.

    Args:
        network: with BatchNorm as its library builds it.
        norm: what stands in the layers that train; "group" stands everywhere.
        train_layers: paths of the layers that train.

    Raises:
        ConfigError: there is no such norm, or a layer cannot be replaced.
    """
    if norm not in get_args(Norm):
        raise ConfigError(f"`norm` must be one of {list(get_args(Norm))}, got {norm!r}")

    def norm_of(path: str) -> Norm:
        trains = any(f"{path}.".startswith(f"{layer}.") for layer in train_layers)
        return norm if trains or norm == "group" else "frozen"

    convert_batch_norm(network, norm_of)


def convert_batch_norm(network: nn.Module, norm_of: Callable[[str], Norm]) -> nn.Module:
    """Replace the BatchNorms inside of a network, in place.

    Args:
        network: with BatchNorm as its library builds it.
        norm_of: path of a BatchNorm -> what stands there afterwards. "frozen" keeps statistics and affine parameters;
            "batch" leaves the layer; "sync" makes it SyncBatchNorm, statistics and parameters kept; "group" makes it a
            GroupNorm of 32 groups with its scale and shift, and refuses statistics that data has moved.

    Returns:
        `network`.

    Raises:
        ConfigError: a layer cannot be replaced; the message names it and says why.
    """
    convert = {"frozen": _frozen, "batch": lambda norm, _: norm, "sync": _synchronised, "group": _grouped}
    made: dict[nn.Module, nn.Module] = {}  # one layer may stand in several places
    for parent_path, parent in list(network.named_modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, _BatchNorm):
                path = f"{parent_path}.{name}".lstrip(".")
                kind = norm_of(path)
                if kind != "batch" and (has_hooks(child) or "forward" in vars(child)):
                    raise ConfigError(
                        "a BatchNorm that is replaced must have neither hooks nor a `forward` of its own, got those of "
                        f"{path} | fix: remove them, and give hooks to the layer that takes its place"
                    )
                if child not in made:
                    made[child] = convert[kind](child, path)
                setattr(parent, name, made[child])
    return network


def _frozen(norm: _BatchNorm, path: str) -> nn.Module:
    if norm.running_mean is None:
        raise ConfigError(f"a BatchNorm without running statistics cannot be frozen, got {path} ({norm})")
    fused = _fused(norm, path)
    frozen = (
        FrozenBatchNormAct2d(norm.num_features, norm.eps, **fused)
        if fused
        else FrozenBatchNorm2d(norm.num_features, norm.eps)
    )
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(norm, name)
        if tensor is None:  # affine=False: a checkpoint holds neither scale nor shift
            frozen.register_buffer(name, getattr(frozen, name).to(norm.running_mean), persistent=False)
        else:
            frozen.register_buffer(name, tensor.detach().clone())
    return frozen.train(norm.training)


def _synchronised(norm: _BatchNorm, path: str) -> nn.Module:
    if _fused(norm, path):
        raise ConfigError(f"`norm` must not be 'sync' for a BatchNorm with a fused activation, got {path} ({norm})")
    convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
    return convert(norm)


def _grouped(norm: _BatchNorm, path: str) -> nn.Module:
    fused = _fused(norm, path)
    if norm.num_features % GROUPS:
        raise ConfigError(
            f"`norm: group` needs channels that {GROUPS} divides (arXiv 1803.08494), got {norm.num_features} at {path}"
        )
    mean, variance = norm.running_mean, norm.running_var
    if mean is not None and variance is not None and not mean.is_meta and (mean.any() or (variance != 1).any()):
        raise ConfigError(
            f"`norm: group` does not hold the statistics of a BatchNorm that has seen data, got {path} ({norm})"
        )
    grouped = (
        GroupNormAct(GROUPS, norm.num_features, **fused) if fused else nn.GroupNorm(GROUPS, norm.num_features)
    ).train(norm.training)
    if norm.affine:
        grouped.weight, grouped.bias = norm.weight, norm.bias
    else:
        grouped.register_parameter("weight", None)
        grouped.register_parameter("bias", None)
        grouped.affine = False
    return grouped


def _fused(norm: _BatchNorm, path: str) -> dict[str, nn.Module]:
    """Return the layers that a fused BatchNorm calls afterwards, by name; empty for torch's own."""
    fused = dict(norm.named_children())
    if type(norm) not in _PLAIN and not (isinstance(norm, _PLAIN) and fused.keys() == _FUSED):
        raise ConfigError(f"unsupported BatchNorm subclass {type(norm).__name__}, at {path} ({norm})")
    return fused
