"""Remembered operators of the meta device give what the operators themselves give, and a network's data flow stays."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_backbone.networks.build import build_network
from detr_backbone.networks.dry_run import DryRun
from detr_backbone.networks.meta_operators import RememberedOperators

# two calls for each operator that differ in one thing: dtype, stride, shape, a number's type, a default
CALLS: list[Callable[[], Any]] = [
    lambda: maps() + 1,
    lambda: maps(dtype=torch.int64) + 1,
    lambda: maps(dtype=torch.int64) + 1.0,
    lambda: maps(dtype=torch.int64) + True,
    lambda: maps(dtype=torch.bool) + True,
    lambda: maps(dtype=torch.bool) + 1,
    lambda: maps(dtype=torch.float16) + maps(),
    lambda: maps().contiguous(memory_format=torch.channels_last) + 1,
    lambda: F.batch_norm(maps(), *vectors(), training=False),
    lambda: F.batch_norm(maps(dtype=torch.float16), *vectors(), training=False),
    lambda: F.batch_norm(maps().contiguous(memory_format=torch.channels_last), *vectors(), training=False),
    lambda: F.max_pool2d(maps(), 2, return_indices=True),
    lambda: F.max_pool2d(maps(), 3, return_indices=True),
    lambda: F.conv2d(maps(), torch.empty(6, 4, 3, 3, device="meta"), stride=2),
    lambda: F.conv2d(maps(), torch.empty(6, 4, 3, 3, device="meta"), stride=(2, 1)),
    lambda: F.gelu(maps()),
    lambda: F.gelu(maps(), approximate="tanh"),
    lambda: maps().mean((2, 3)),
    lambda: maps().mean((2, 3), dtype=torch.float64),
    lambda: maps() > 0,
    lambda: torch.cat([maps(), maps()]),
    lambda: maps().split(2, dim=1),
    lambda: maps().topk(2),
    lambda: torch.fft.rfft2(maps()).abs(),
]


def maps(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(2, 4, 5, 6, dtype=dtype, device="meta")


def vectors() -> list[Tensor]:
    return [torch.empty(4, device="meta") for _ in range(4)]


def told(outputs: Any) -> list[Any]:
    tensors = outputs if isinstance(outputs, list | tuple) else [outputs]
    return [type(outputs), *((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors)]


def test_outputs_have_the_shapes_strides_and_dtypes_that_the_operator_gives_each_time() -> None:
    expected = [told(call()) for call in CALLS]
    for _ in range(2):
        with RememberedOperators():
            assert [told(call()) for call in CALLS] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_dtype_is_that_of_the_moment(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    with RememberedOperators():
        (maps(torch.int64) + 1.0).sqrt()
        torch.set_default_dtype(dtype)
        try:
            assert (maps(torch.int64) + 1.0).dtype == dtype
        finally:
            torch.set_default_dtype(before)


def test_what_is_written_in_place_is_the_argument_itself_and_a_view_shares_its_memory() -> None:
    for _ in range(2):
        x = maps()
        with RememberedOperators():
            assert F.hardswish(x, inplace=True) is x
            assert x.add_(1) is x
            view, new = x.flatten(1), x.relu()
            same = torch.ops.aten._unsafe_view(x, [2, 120])
        memory = x.untyped_storage()._cdata
        assert [y.untyped_storage()._cdata == memory for y in (view, same, new)] == [True, True, False]


def test_an_argument_that_changes_its_shape_does_so_each_time() -> None:
    for _ in range(2):
        x = maps()
        with RememberedOperators():
            x.unsqueeze_(0)
            torch.add(maps(), 1, out=(y := torch.empty(0, device="meta")))
        assert (x.shape, y.shape) == ((1, 2, 4, 5, 6), (2, 4, 5, 6))


def test_an_operator_that_refuses_its_arguments_does_so_each_time() -> None:
    for _ in range(2):
        with RememberedOperators(), pytest.raises(RuntimeError):
            maps() + torch.empty(7, device="meta")


def test_tensors_that_hold_values_are_computed() -> None:
    x = torch.tensor([1.0, 4.0])
    for _ in range(2):
        with RememberedOperators():
            assert x.sqrt().tolist() == [1, 2]
            assert (x + 1).sum().item() == 7
        x = torch.tensor([1.0, 4.0])


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_a_dry_run_sees_the_data_flow_that_it_sees_without(name: str) -> None:
    network = build_network(name)
    paths = [path for path, _ in network.named_modules() if path]
    with patch("detr_backbone.networks.dry_run.RememberedOperators", torch.no_grad):
        expected = DryRun(network)
    for _ in range(2):
        run = DryRun(network)
        assert run.calls == expected.calls
        assert run.sole_readers(()) == expected.sole_readers(())
        assert run.sole_readers(paths[::3]) == expected.sole_readers(paths[::3])
        assert len(run.dataflow.made) > 0
        assert memory_of(run) == memory_of(expected)


def memory_of(run: DryRun) -> list[tuple[str, int, int, bool]]:
    """Which outputs of layers share memory, how often it was written to, and whether it is the network's own."""
    numbers: dict[int, int] = {}
    return [
        (path, numbers.setdefault(value.storage, len(numbers)), value.version, value.storage in run.dataflow.made)
        for path, values in run.outputs.items()
        for value in values
    ]
