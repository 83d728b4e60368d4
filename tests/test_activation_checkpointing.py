import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr_backbone import Backbone
from detr_backbone.errors import ConfigError

STAGES = ("layer2", "layer3", "layer4")
PADDED = [torch.linspace(-1, 1, 3 * h * w).reshape(3, h, w) for h, w in ((64, 96), (50, 70))]


def backbone(*checkpointed: str, padding: Any = "exact") -> Backbone:
    torch.manual_seed(0)
    network = Backbone("resnet18", return_interm_layers=True, padding=padding, checkpointed_layers=checkpointed)
    for name, buffer in network.named_buffers():
        if name.endswith(("bias", "running_mean")):  # so that padding would show
            nn.init.normal_(buffer, std=0.3)
    return network


def gradients(network: Backbone, images: list[Tensor], *, retain: bool = False) -> list[Tensor]:
    loss = torch.stack([level.tensors.square().mean() for level in network(images).values()]).sum()
    loss.backward(retain_graph=retain)
    if retain:
        network.zero_grad()
        loss.backward()
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def kept_for_backward(network: Backbone) -> int:
    """Bytes that a forward pass keeps, parameters aside."""
    own = {parameter.data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        levels = network(PADDED)
    assert levels
    return sum(kept.values())


@pytest.mark.parametrize("retain", [False, True], ids=["backward once", "backward twice"])
@pytest.mark.parametrize("padding", ["exact", "zeros"])
def test_gradients_are_those_of_a_backbone_that_keeps_everything(padding: str, retain: bool) -> None:
    expected = gradients(backbone(padding=padding), PADDED)
    got = gradients(backbone(*STAGES, padding=padding), PADDED, retain=retain)

    assert len(got) == len(expected) > 0
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_less_is_kept() -> None:
    assert kept_for_backward(backbone(*STAGES)) < 0.5 * kept_for_backward(backbone())


def test_keys_copies_and_pickles_stay_as_they_are() -> None:
    network = backbone(*STAGES)
    assert list(network.state_dict()) == list(backbone().state_dict())
    expected = gradients(network, PADDED)
    network.zero_grad()

    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        nn.init.zeros_(network.body.layer4[1].conv2.weight)  # the twin must not compute with the layers of another
        for ours, theirs in zip(gradients(twin, PADDED), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_inference_is_untouched() -> None:
    with torch.inference_mode():
        for name, level in backbone(*STAGES)(PADDED).items():
            torch.testing.assert_close(level.tensors, backbone()(PADDED)[name].tensors, rtol=0, atol=0)


@pytest.mark.parametrize("path", ["layer5", ""])
def test_a_layer_that_does_not_exist_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="`checkpointed_layers` must name layers"):
        backbone(path)
