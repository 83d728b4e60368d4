"""A layer getter under DistributedDataParallel: two processes with an image each learn what one learns from both."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from detr_backbone import IntermediateLayerGetter
from tests.small_networks import STRATEGIES

IMAGES = torch.arange(8.0).view(2, 4) / 8


def getter_of(strategy: str) -> IntermediateLayerGetter:
    torch.manual_seed(0)
    getter = IntermediateLayerGetter(STRATEGIES[strategy](), ["left"])
    assert getter.strategy == strategy
    if strategy == "hooks":  # what comes later is kept, and DDP would wait for its gradients
        for later in ("right", "head"):
            getter.get_submodule(later).requires_grad_(requires_grad=False)
    return getter


def learn(getter: IntermediateLayerGetter, images: Tensor, *, distributed: bool) -> dict[str, Any]:
    """The weights after two steps of gradient descent on the mean over images, and the outputs of each step."""
    model = DistributedDataParallel(getter) if distributed else getter
    optimizer = torch.optim.SGD([p for p in getter.parameters() if p.requires_grad], lr=0.1)
    outputs = []
    for _ in range(2):
        optimizer.zero_grad()
        output = model(images)["left"]
        output.square().mean().backward()
        optimizer.step()
        outputs.append(output.detach())
    return {"weights": getter.state_dict(), "outputs": outputs}


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    learned = {name: learn(getter_of(name), IMAGES[rank : rank + 1], distributed=True) for name in STRATEGIES}
    torch.save(learned, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("distributed")
    mp.set_forkserver_preload(["torchvision", "tests.test_layer_getter_distributed"])  # one process imports for both
    mp.start_processes(one_of_two, (str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_learn_what_one_learns_from_both_images(strategy: str, learned: list[dict[str, Any]]) -> None:
    getter = getter_of(strategy)
    before = {key: tensor.clone() for key, tensor in getter.state_dict().items()}
    alone = learn(getter, IMAGES, distributed=False)

    assert not torch.equal(alone["weights"]["stem.weight"], before["stem.weight"])
    for rank in (0, 1):
        torch.testing.assert_close(learned[rank][strategy]["weights"], dict(alone["weights"]))
        for output, expected in zip(learned[rank][strategy]["outputs"], alone["outputs"], strict=True):
            torch.testing.assert_close(output, expected[rank : rank + 1])
