"""What a user would install instead, and ours: each as a callable that does the same work once.

Peers are rebuilt from public parts: the original DETR backbone from torchvision's ResNet, FrozenBatchNorm2d and
IntermediateLayerGetter (facebookresearch/detr, models/backbone.py); timm's `features_only` network with its frozen
BatchNorm; the convolutional encoder and the whole of Hugging Face's DetrForObjectDetection.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from detr_backbone import (
    BackboneConfig,
    IntermediateLayerGetter,
    NestedTensor,
    build_backbone,
    nested_tensor_from_tensor_list,
)
from detr_backbone.detectors import DetectorConfig, build_criterion, build_detector

Kind = Literal["forward", "step", "detr", "detr_step", "deformable_detr", "deformable_detr_step", "getter", "data"]
Run = Callable[[], object]
STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One piece of work: B images of `sizes` (h, w) through a network, forward or as a training step."""

    kind: Kind
    network: str = "resnet50"
    """A ResNet's name; with "-dc5" behind it, its last stage dilated."""
    levels: Literal[1, 4] = 4
    sizes: tuple[tuple[int, int], ...] = ((800, 1088),)
    device: str = "cpu"

    def __str__(self) -> str:
        shapes = f"{len(self.sizes)} x {self.sizes[0][0]} x {self.sizes[0][1]}"
        if len(set(self.sizes)) > 1:
            shapes = f"{len(self.sizes)} padded to {max(h for h, _ in self.sizes)} x {max(w for _, w in self.sizes)}"
        if self.kind == "data":
            return f"data, {shapes} photographs"
        levels = "one level" if self.levels == 1 else "four levels"
        return f"{self.kind.replace('_', ' ')}, {self.network}, {levels}, {shapes}"

    def batch(self) -> NestedTensor:
        """The same images for everyone."""
        generator = torch.Generator().manual_seed(0)
        images = [torch.randn(3, *size, generator=generator) for size in self.sizes]
        return nested_tensor_from_tensor_list(images).to(self.device)

    @property
    def name(self) -> str:
        return self.network.removesuffix("-dc5")

    @property
    def dilation(self) -> bool:
        return self.network.endswith("-dc5")

    @property
    def training(self) -> bool:
        return self.kind.endswith("step")


def build_ours(case: Case) -> nn.Module:
    """What this package gives: a backbone or a detector with exact padding."""
    if "detr" in case.kind:
        return build_detector(_detector_config(case))
    return build_backbone(_backbone_config(case))[0]


def ours(case: Case, *, compiled: bool = False) -> Run:
    """What this package gives: exact padding, folded frozen BatchNorm, channels last."""
    run = _detector if "detr" in case.kind else _backbone
    return run(case, build_ours(case), compiled=compiled)


def zero_padded(case: Case) -> Run:
    """Ours without exact padding: images in a batch are padded with zeros once, as everyone does."""
    return _backbone(case, build_backbone(replace(_backbone_config(case), padding="zeros"))[0])


def by_plan(case: Case, *, plan: Literal["forward_whole_batch", "forward_by_size"]) -> Run:
    """Ours with all images in one pass, or with those of equal size in one pass each; both are exact."""
    return _backbone(case, _ByPlan(build_ours(case), plan))


def original(case: Case, *, compiled: bool = False) -> Run:
    """The original construction; a detector on it is ours but for backbone, attention weights, sampling and dropout."""
    backbone = _Original(case)
    if "detr" not in case.kind:
        return _backbone(case, backbone, compiled=compiled)
    config = _detector_config(case)
    detector = build_detector(replace(config, sampling="grid_sample") if "deformable" in case.kind else config)
    joiner: Any = detector.backbone
    joiner[0] = backbone
    for module in detector.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(_asking_for_weights, with_kwargs=True)
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                module.register_module(name, nn.Dropout(child.p))
    return _detector(case, detector, compiled=compiled)


def timm_features(case: Case) -> Run:
    """Timm's `features_only` network with its frozen BatchNorm."""
    import timm
    from timm.layers.norm_act import freeze_batch_norm_2d

    stride: dict[str, Any] = {"output_stride": 16} if case.dilation else {}
    out_indices = (1, 2, 3, 4) if case.levels == 4 else (4,)
    network = timm.create_model(case.name, features_only=True, out_indices=out_indices, **stride)
    return _backbone(case, _Masked(_trained_like_detr(freeze_batch_norm_2d(network))))  # type: ignore[no-untyped-call]


def hugging_face(case: Case) -> Run:
    """Hugging Face's DetrForObjectDetection: its encoder of images, or the whole detector."""
    from transformers import DetrConfig, DetrForObjectDetection

    config = DetrConfig(dilation=case.dilation)
    config.backbone_config.backbone = case.name
    detector = DetrForObjectDetection(config).to(case.device)
    images = case.batch()
    seen = (~images.mask).long()
    if case.kind == "detr":
        return _inference(detector, lambda: detector(images.tensors, pixel_mask=seen))
    encoder = _trained_like_detr(detector.model.backbone)
    if case.training:
        return _training(encoder, lambda: [features for features, _ in encoder(images.tensors, seen)])
    return _inference(encoder, lambda: encoder(images.tensors, seen))


def plain(case: Case) -> Run:
    """The bare model's own forward up to the same layer, for what a getter costs."""
    model = torchvision.models.get_model(case.name, weights=None)
    model.avgpool = model.fc = nn.Identity()
    return _getter(case, model)


def sequential(case: Case) -> Run:
    """Our getter in its strategy "sequential"."""
    getter = IntermediateLayerGetter(torchvision.models.get_model(case.name, weights=None), ["layer4"])
    assert getter.strategy == "sequential"
    return _getter(case, getter)


def graph(case: Case) -> Run:
    """Our getter in its strategy "graph"."""
    getter = IntermediateLayerGetter(torchvision.models.get_model(case.name, weights=None), ["layer4.1.bn2"])
    assert getter.strategy == "graph"
    return _getter(case, getter)


def hooks(case: Case) -> Run:
    """Our getter in its strategy "hooks"."""

    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = torchvision.models.get_model(case.name, weights=None)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() == 0:
                return x
            result: Tensor = self.model(x)
            return result

    getter = IntermediateLayerGetter(Untraceable(), ["model.layer4"])
    assert getter.strategy == "hooks"
    return _getter(case, getter)


class _ByPlan(nn.Module):
    def __init__(self, backbone: nn.Module, plan: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.plan = plan

    def forward(self, images: NestedTensor) -> dict[str, NestedTensor]:
        levels: dict[str, NestedTensor] = getattr(self.backbone, self.plan)(images)
        return levels


class _Masked(nn.Module):
    """What the original module does behind its getter: the mask resized for each level."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: NestedTensor, sizes: None = None) -> dict[str, NestedTensor]:  # as a Joiner calls it
        features = self.body(images.tensors)
        levels = features if isinstance(features, dict) else dict(enumerate(features))
        masks = {
            name: F.interpolate(images.mask[None].float(), size=level.shape[-2:]).to(torch.bool)[0]
            for name, level in levels.items()
        }
        return {str(name): NestedTensor(level, masks[name]) for name, level in levels.items()}


class _Original(_Masked):
    def __init__(self, case: Case) -> None:
        network = torchvision.models.get_model(
            case.name,
            weights=None,
            norm_layer=torchvision.ops.FrozenBatchNorm2d,
            replace_stride_with_dilation=[False, False, case.dilation],
        )
        layers = _backbone_config(case).return_layers or ()
        names = {layer: str(level) for level, layer in enumerate(layers)}
        getter = torchvision.models._utils.IntermediateLayerGetter(_trained_like_detr(network), names)
        super().__init__(getter)


def _asking_for_weights(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return args, {**kwargs, "need_weights": True}


def _trained_like_detr(network: nn.Module) -> nn.Module:
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(stage in name for stage in ("layer2", "layer3", "layer4")))
    return network


def _backbone_config(case: Case) -> BackboneConfig:
    layers = STAGES[-case.levels :] if "deformable" not in case.kind else STAGES[1:]
    return BackboneConfig(name=case.name, dilation=case.dilation, return_layers=layers)


def _detector_config(case: Case) -> DetectorConfig:
    name: Literal["detr", "deformable_detr"] = "deformable_detr" if "deformable" in case.kind else "detr"
    queries = 300 if name == "deformable_detr" else 100
    return DetectorConfig(name=name, num_classes=91, num_queries=queries, backbone=_backbone_config(case))


def _backbone(case: Case, model: nn.Module, *, compiled: bool = False) -> Run:
    images = case.batch()
    model = model.to(case.device)
    if compiled:
        _compile(case, model)
    if case.training:
        return _training(model, lambda: [level.tensors for level in model(images).values()])
    return _inference(model, lambda: model(images))


def _getter(case: Case, model: nn.Module) -> Run:
    images = case.batch().tensors
    model = model.to(case.device)
    return _inference(model, lambda: model(images))


def _detector(case: Case, model: nn.Module, *, compiled: bool) -> Run:
    images = case.batch()
    model = model.to(case.device)
    if compiled:
        _compile(case, model)
    if not case.training:
        return _inference(model, lambda: model(images))
    criterion = build_criterion(_detector_config(case)).to(case.device)
    generator = torch.Generator().manual_seed(0)
    targets = [
        {
            "boxes": torch.rand(10, 4, generator=generator).mul(0.3).add(0.2).to(case.device),
            "labels": torch.randint(91, (10,), generator=generator).to(case.device),
        }
        for _ in case.sizes
    ]
    return _training(model, lambda: [criterion.weighted_sum(criterion(model(images), targets))])


def _compile(case: Case, model: nn.Module) -> None:
    """Compile it; for inference with its weights as constants, which it lays out for the processor once."""
    model.compile(options={"freezing": not case.training})


def _inference(model: nn.Module, forward: Run) -> Run:
    model.eval().requires_grad_(requires_grad=False)

    def run() -> None:
        with torch.inference_mode():
            forward()

    return run


def _training(model: nn.Module, forward: Callable[[], Sequence[Any]]) -> Run:
    model.train()

    def run() -> None:
        model.zero_grad(set_to_none=True)
        torch.stack([output.float().mean() for output in forward()]).sum().backward()  # type: ignore[no-untyped-call]

    return run


CONTENDERS: dict[str, Callable[[Case], Run]] = {
    "original": original,
    "ours": ours,
    "ours, zeros": zero_padded,
    "ours, whole batch": partial(by_plan, plan="forward_whole_batch"),
    "ours, by size": partial(by_plan, plan="forward_by_size"),
    "original, compiled": partial(original, compiled=True),
    "ours, compiled": partial(ours, compiled=True),
    "timm": timm_features,
    "hugging_face": hugging_face,
    "bare": plain,
    "sequential": sequential,
    "graph": graph,
    "hooks": hooks,
}
