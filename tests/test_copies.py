"""A backbone that is saved, copied, sharded or run by several processes computes what it computes alone."""

import copy
import io
import pickle
import socket
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detr_backbone import Backbone, BackboneBase, BackboneConfig, IntermediateLayerGetter
from detr_backbone.detectors import DetectorConfig, build_detector
from detr_backbone.errors import ConfigError

IMAGES = [torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(1)), torch.ones(3, 50, 40)]


@pytest.fixture(scope="module", params=["sequential", "graph", "hooks"])
def backbone(request: pytest.FixtureRequest) -> BackboneBase:
    torch.manual_seed(0)
    name = {"sequential": "resnet18", "graph": "mobilenet_v2", "hooks": "googlenet"}[request.param]
    backbone = Backbone(name).eval()
    assert backbone.body.strategy == request.param
    return backbone


def features(backbone: nn.Module) -> Tensor:
    with torch.no_grad():
        return backbone(IMAGES)["0"].tensors


def save_and_load(model: nn.Module) -> nn.Module:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda backbone: pickle.loads(pickle.dumps(backbone)), save_and_load],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_computes_the_same_with_weights_of_its_own(
    backbone: BackboneBase, copied: Callable[[BackboneBase], nn.Module]
) -> None:
    expected = features(backbone)
    twin = copied(backbone)
    torch.testing.assert_close(features(twin), expected, rtol=0, atol=0)

    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert not torch.equal(features(twin), expected)
    torch.testing.assert_close(features(backbone), expected, rtol=0, atol=0)


def test_a_detector_is_saved_as_a_whole() -> None:
    sizes = {"num_queries": 3, "nheads": 2, "enc_layers": 1, "dec_layers": 1, "dim_feedforward": 16}
    backbone = BackboneConfig(name="resnet18", hidden_dim=16)
    detector = build_detector(DetectorConfig(name="detr", backbone=backbone, num_classes=2, **sizes)).eval()
    with torch.no_grad():
        expected, got = detector(IMAGES), save_and_load(detector)(IMAGES)

    assert torch.equal(got["pred_logits"], expected["pred_logits"])


def replicate(module: nn.Module, scale: float) -> nn.Module:
    """A replica as nn.DataParallel makes one for each device, its parameters scaled to tell it from the module."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicate(child, scale)
    replica._former_parameters = {}
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter.detach() * scale)
            replica._former_parameters[name] = getattr(replica, name)
    return replica


def test_a_replica_runs_its_own_weights(backbone: BackboneBase) -> None:
    images = torch.stack([IMAGES[0]])
    scaled = copy.deepcopy(backbone.body)
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(0.5)
        expected = scaled(images)["0"]
        got = replicate(backbone.body, 0.5)(images)["0"]

    assert not torch.equal(got, backbone.body(images)["0"])
    torch.testing.assert_close(got, expected)


def test_gradients_by_functional_transforms_are_those_of_backward() -> None:
    backbone = Backbone("resnet18").eval()
    parameters, images = dict(backbone.named_parameters()), torch.stack([IMAGES[0]])

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(backbone, parameters, (images,))["0"].tensors.square().mean()

    gradients = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    key = "body.layer4.1.conv2.weight"
    torch.testing.assert_close(gradients[key], parameters[key].grad)
    stacked = {name: torch.stack([parameter, parameter]) for name, parameter in parameters.items()}
    torch.testing.assert_close(torch.vmap(loss)(stacked), loss(parameters).expand(2))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_scripting_is_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match=r"torch\.compile"):
        torch.jit.script(Backbone("resnet18"))


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_a_hook_that_would_never_fire_says_so(kind: str) -> None:
    network = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 4, 1), stage=nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())))
    getter = IntermediateLayerGetter(network, ["stage.0"])
    assert getter.strategy == "graph"

    with pytest.warns(UserWarning, match="never called.*0"):
        getattr(getter.get_submodule("stage"), f"register_{kind}")(print)


def _rank(rank: int, port: int, folder: Path, given: BackboneBase) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    from torch.distributed.fsdp import fully_shard

    results = {}
    for name in ("static", "sharded"):
        backbone: nn.Module = copy.deepcopy(given)
        if name == "static":
            backbone = DistributedDataParallel(backbone, static_graph=True)
        else:
            for layer in ("layer1", "layer2", "layer3", "layer4"):
                fully_shard(backbone.body[layer])
            fully_shard(backbone)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(2):  # a static graph is known from the second pass on
                backbone.zero_grad()
                levels = backbone(IMAGES)
                sum(level.tensors.square().mean() for level in levels.values()).backward()
        results[name] = {
            "levels": [level.tensors.detach() for level in levels.values()],
            "gradients": {
                key.removeprefix("module."): _whole(p.grad)
                for key, p in backbone.named_parameters()
                if p.grad is not None
            },
            "told": [str(warning.message) for warning in told],
        }
    if rank == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def test_two_processes_that_are_given_a_backbone_and_shard_or_share_it_equal_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    backbone = Backbone("resnet18", return_interm_layers=True)
    # One process imports for both.
    torch.multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "torchvision", "tests.test_copies"])
    torch.multiprocessing.start_processes(_rank, (port, tmp_path, backbone), nprocs=2, start_method="forkserver")
    levels = backbone(IMAGES)
    sum(level.tensors.square().mean() for level in levels.values()).backward()
    gradients = {key: p.grad for key, p in backbone.named_parameters() if p.grad is not None}

    for name, result in torch.load(tmp_path / "results.pt").items():
        for got, level in zip(result["levels"], levels.values(), strict=True):
            torch.testing.assert_close(got, level.tensors, rtol=1e-5, atol=1e-5, msg=name)
        assert result["gradients"].keys() == gradients.keys(), name
        assert not [message for message in result["told"] if "stride" in message], name
        for key, gradient in gradients.items():
            largest = gradient.abs().max().item()
            torch.testing.assert_close(
                result["gradients"][key], gradient, rtol=0, atol=1e-5 * largest, msg=f"{name} {key}"
            )
