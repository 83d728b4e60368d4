"""The backbone as transformers' detectors take it: DETR, Conditional, DAB, Deformable DETR, RT-DETR and D-FINE."""

from typing import Any, TypeVar

from torch import Tensor, nn

from detr_backbone.adapters.adapter import Adapter
from detr_backbone.backbone import BackboneBase
from detr_backbone.errors import ConfigError
from detr_backbone.frozen_batch_norm import FrozenBatchNorm2d
from detr_backbone.nested_tensor import NestedTensor
from detr_backbone.padding.exact import Padding

Model = TypeVar("Model", bound=nn.Module)

_TIMM = "_backbone"  # under which transformers' TimmBackbone holds timm's network


class ConvEncoder(Adapter):
    """A backbone in place of transformers' encoder of this name (`DetrConvEncoder`, `RTDetrConvEncoder`, …).

    Args:
        backbone: what runs.
        body: path of the network inside: "model", or "model._backbone" where transformers' own holds a TimmBackbone.

    Attributes:
        intermediate_channel_sizes: channels of each level, which the models read.
    """

    def __init__(self, backbone: BackboneBase, *, body: str = "model") -> None:
        super().__init__(backbone, body=body)
        self.intermediate_channel_sizes = list(backbone.channels)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each level [B, C, h, w] with its mask, bool [B, h, w], True on the image, finest first.

        Args:
            pixel_values: [B, 3, H, W].
            pixel_mask: [B, H, W] of any dtype, 1 on the image and 0 on padding.
        """
        levels = self.backbone(NestedTensor(pixel_values, pixel_mask == 0)).values()
        return [(level.tensors, ~level.mask) for level in levels]


def replace_backbone(model: Model, backbone: BackboneBase | None = None, *, padding: Padding = "exact") -> Model:
    """Return a model of transformers with the backbone in place of its own, which is changed in place.

    Keys of the model stay, so that `save_pretrained` writes what `from_pretrained` of the same class reads.

    Args:
        model: such as a DetrForObjectDetection, with the weights that it shall have.
        backbone: another network, whose weights are its own and whose layers train as it was built to; its levels must
            have the channels of the model's own. Left out, the model's own network with its weights: the layers train
            that trained before, in transformers all of them.
        padding: of the model's own network: "zeros" computes what the model computed.

    Raises:
        ConfigError: the model holds no backbone of this kind, or the channels are others.
    """
    path, encoder = _encoder_of(model)
    body = f"model.{_TIMM}" if hasattr(encoder.model, _TIMM) else "model"
    if backbone is None:
        if isinstance(encoder, ConvEncoder):
            raise ConfigError("`backbone` must be given for a model on a backbone of this package, got none")
        network = encoder.get_submodule(body)
        flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
        try:
            backbone = BackboneBase(
                _with_our_norms(network), return_layers=_levels(network), train_layers=(), padding=padding
            )
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
    expected, got = list(encoder.intermediate_channel_sizes), list(backbone.channels)
    # DETR, Conditional and DAB-DETR read the last level alone.
    reads_last = hasattr(model.get_submodule(path.partition("backbone")[0].rstrip(".")), "input_projection")
    if got != expected and not (reads_last and got[-1] == expected[-1]):
        raise ConfigError(f"`backbone` must have levels of {expected} channels, as the model's own, got {got}")
    model.set_submodule(path, ConvEncoder(backbone, body=body).train(encoder.training))
    return model


def _encoder_of(model: nn.Module) -> tuple[str, Any]:
    encoders = [
        (path, module)
        for path, module in model.named_modules()
        if type(module).__name__.endswith("ConvEncoder") and hasattr(module, "intermediate_channel_sizes")
    ]
    if len(encoders) != 1:
        raise ConfigError(
            "`model` must be of transformers and hold one convolutional encoder, as DETR, Conditional, DAB, Deformable "
            f"DETR, RT-DETR and D-FINE do, got {type(model).__name__} with {len(encoders)}"
        )
    return encoders[0]


def _levels(network: Any) -> list[str]:
    """Return the paths of the layers that are levels in a network of transformers, or in timm's for features."""
    if hasattr(network, "return_layers"):
        return list(network.return_layers)
    names = list(getattr(network, "stage_names", ()))
    paths = [f"encoder.stages.{names.index(name) - 1}" for name in getattr(network, "out_features", ())]
    if not paths or any(path not in dict(network.named_modules()) for path in paths):
        raise ConfigError(
            f"`backbone` must be given for a model whose own is a {type(network).__name__}, which is no network of "
            "stages that are known here"
        )
    return paths


def _with_our_norms(network: nn.Module) -> nn.Module:
    """Return the network with FrozenBatchNorm2d, which is folded, in place of transformers' copies of it."""
    for path, module in list(network.named_modules()):
        if type(module).__name__.endswith("FrozenBatchNorm2d") and not isinstance(module, FrozenBatchNorm2d):
            state = module.state_dict()
            norm = FrozenBatchNorm2d(len(state["weight"]), eps=1e-5).to(state["weight"])
            norm.load_state_dict(state)
            network.set_submodule(path, norm.train(module.training))
    return network
