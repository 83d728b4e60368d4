"""torchvision's detectors on our backbone compute and train as on their own; `pytest -rP` shows the differences."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection, resnet18
from torchvision.models.detection.backbone_utils import BackboneWithFPN as TheirBackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detr_backbone import Backbone, fold_for_inference
from detr_backbone.adapters.torchvision import BackboneWithFPN
from detr_backbone.errors import ConfigError
from detr_backbone.padding.exact import Padding

SIZES = {"min_size": 64, "max_size": 128}
DETECTORS: dict[str, Any] = {
    # its class, and whether its pyramid ends in two convolutions, in place of a subsampled level
    "RetinaNet": (detection.RetinaNet, True),
    "FCOS": (detection.FCOS, True),
    "FasterRCNN": (detection.FasterRCNN, False),
    "MaskRCNN": (detection.MaskRCNN, False),
}
LEVELS = {True: ["layer2", "layer3", "layer4"], False: ["layer1", "layer2", "layer3", "layer4"]}


def extra_blocks(convolves: bool) -> LastLevelP6P7 | None:
    return LastLevelP6P7(256, 256) if convolves else None


def their_backbone(convolves: bool) -> TheirBackboneWithFPN:
    """As torchvision builds it, with statistics that training would leave."""
    torch.manual_seed(0)
    network = resnet18(norm_layer=FrozenBatchNorm2d)
    for name, buffer in network.named_buffers():
        if name.endswith(("bias", "running_mean")):
            nn.init.normal_(buffer, std=0.1)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))
    layers = {path: str(index) for index, path in enumerate(LEVELS[convolves])}
    channels = [64, 128, 256, 512][-len(layers) :]
    return TheirBackboneWithFPN(network, layers, channels, 256, extra_blocks(convolves))


def our_backbone(convolves: bool, padding: Padding = "zeros") -> BackboneWithFPN:
    backbone = Backbone("resnet18", return_layers=LEVELS[convolves], padding=padding)
    ours = BackboneWithFPN(backbone, extra_blocks=extra_blocks(convolves))
    ours.load_state_dict(their_backbone(convolves).state_dict())
    return ours


def detector(name: str, backbone: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    kind, convolves = DETECTORS[name]
    levels = {True: (3, 2), False: (4, 1)}[convolves]
    anchors = detection.anchor_utils.AnchorGenerator(((32,),) * sum(levels), ((1.0,),) * sum(levels))
    sampled = {"box_batch_size_per_image": 8}  # proposals that the heads take
    options = {"anchor_generator": anchors} if convolves else {"rpn_anchor_generator": anchors, **sampled}
    return kind(backbone, num_classes=4, **SIZES, **options)


def data() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(2)
    images = [torch.rand(3, 64, 120, generator=generator), torch.rand(3, 64, 70, generator=generator)]
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [30.0, 10.0, 66.0, 44.0]])
    masks = torch.zeros(2, 64, 120, dtype=torch.uint8)
    masks[0, 6:50, 4:40] = masks[1, 10:44, 30:66] = 1
    labels = torch.tensor([1, 3])
    targets = [{"boxes": boxes, "labels": labels, "masks": masks[..., : image.shape[2]]} for image in images]
    return images, targets


def losses_of(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(3)  # Faster R-CNN samples proposals
    losses: dict[str, Tensor] = model.train()(*data())
    sum(losses.values()).backward()
    return {key: loss.detach() for key, loss in losses.items()}


@pytest.mark.parametrize("name", DETECTORS)
def test_a_training_step_has_the_losses_and_the_gradients_of_their_own_backbone(name: str) -> None:
    convolves = DETECTORS[name][1]
    theirs, ours = detector(name, their_backbone(convolves)), detector(name, our_backbone(convolves))
    expected, losses = losses_of(theirs), losses_of(ours)

    difference = max((losses[key] - loss).abs().item() for key, loss in expected.items())
    print(f"{name}: losses {sum(expected.values()):.4f}, largest difference {difference:.1e}")
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    gradients = [{key: p.grad.norm() for key, p in m.named_parameters() if p.grad is not None} for m in (ours, theirs)]
    assert gradients[0].keys() == gradients[1].keys()
    key = "backbone.body.layer2.0.conv1.weight"
    torch.testing.assert_close(gradients[0][key], gradients[1][key], rtol=1e-4, atol=0)


@pytest.fixture(scope="module", params=[True, False], ids=["p6 p7", "pool"])
def convolves(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def exact(convolves: bool) -> BackboneWithFPN:
    return our_backbone(convolves, "exact")


def test_names_order_and_what_trains_are_those_of_their_own_backbone(exact: BackboneWithFPN, convolves: bool) -> None:
    theirs = their_backbone(convolves)

    assert list(exact.state_dict()) == list(theirs.state_dict())
    assert [(key, p.requires_grad) for key, p in exact.named_parameters()] == [
        (key, p.requires_grad) for key, p in theirs.named_parameters()
    ]


def difference_of_levels(backbone: nn.Module) -> float:
    """Largest change of a level when a larger image joins the batch, relative to the level's largest value."""
    transform = detection.transform.GeneralizedRCNNTransform(64, 128, [0.5] * 3, [0.25] * 3)
    if isinstance(backbone, BackboneWithFPN):
        backbone.take_sizes_from(transform)
    small, large = torch.rand(3, 64, 70), torch.rand(3, 64, 120)
    with torch.no_grad():
        alone = backbone(transform([small])[0].tensors)
        together = backbone(transform([small, large])[0].tensors)
    differences = []
    for index, (first, second) in enumerate(zip(alone.values(), together.values(), strict=True)):
        stride = 64 // first.shape[-2] if index < len(alone) - 1 else 64
        cells = -(-70 // stride)
        change = first[..., :cells] - second[:1, ..., :cells]
        differences.append((change.abs().max() / first.abs().max()).item())
    return max(differences)


def test_levels_of_the_pyramid_do_not_depend_on_the_batch(exact: BackboneWithFPN, convolves: bool) -> None:
    ours, theirs = difference_of_levels(copy.deepcopy(exact)), difference_of_levels(their_backbone(convolves))

    print(f"levels alone and in a batch differ by {theirs:.1e}, on our backbone by {ours:.1e}")
    assert ours < 1e-5
    assert theirs > 1e-2


def test_an_exact_backbone_that_is_not_told_the_sizes_says_so(exact: BackboneWithFPN) -> None:
    with pytest.raises(ConfigError, match=r"needs the sizes of the images.*`take_sizes_from`"):
        copy.deepcopy(exact)(torch.rand(1, 3, 64, 64))


def test_sizes_of_one_batch_are_not_taken_for_the_next(exact: BackboneWithFPN) -> None:
    backbone = copy.deepcopy(exact)
    transform = detection.transform.GeneralizedRCNNTransform(64, 128, [0.5] * 3, [0.25] * 3)
    backbone.take_sizes_from(transform)
    images = transform([torch.rand(3, 64, 70)])[0].tensors
    backbone(images)
    with pytest.raises(ConfigError, match="needs the sizes"):
        backbone(images)


def save_and_load(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, save_and_load], ids=["deepcopy", "torch.save"])
def test_a_copy_of_a_detector_takes_the_sizes_from_its_own_transform(copied: Any) -> None:
    backbone = our_backbone(convolves=True, padding="exact")
    model = detector("RetinaNet", backbone).eval()
    backbone.take_sizes_from(model.transform)
    twin = copied(model)
    images, _ = data()
    with torch.no_grad():
        expected, got = model(images), twin(images)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        for parameter in twin.backbone.parameters():
            parameter.mul_(0.5)
        torch.testing.assert_close(model(images), expected, rtol=0, atol=0)

    assert twin.backbone.backbone.body is twin.backbone.body
    assert twin.backbone.body is not backbone.body


@torch.no_grad()
def test_a_detector_is_folded_for_inference() -> None:
    backbone = our_backbone(convolves=False, padding="exact")
    model = detector("FasterRCNN", backbone).eval()
    backbone.take_sizes_from(model.transform)
    images, _ = data()
    levels: list[dict[str, Tensor]] = []
    backbone.register_forward_hook(lambda module, inputs, output: levels.append(output))
    model(images)
    fold_for_inference(model)(images)

    assert not any("running_mean" in key for key in model.state_dict())
    for name, level in levels[0].items():
        torch.testing.assert_close(levels[1][name], level, rtol=0, atol=1e-5 * level.abs().max().item())
    with pytest.raises(ConfigError, match="folded for inference does not train"):
        model.train()
