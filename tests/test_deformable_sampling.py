"""Reading values between the cells of several levels: every way gives the same numbers, and the right one runs."""

import importlib.util
import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from detr_backbone.detectors.build import DetectorConfig
from detr_backbone.detectors.deformable_attention import MSDeformAttn
from detr_backbone.detectors.deformable_sampling import multi_scale_deformable_attention, sampling_on
from detr_backbone.errors import ConfigError

SHAPES = [(5, 7), (2, 3), (1, 1)]
B, M, D, Q, J = 2, 3, 4, 6, 2
EXTENSION = "torch_ms_deform_attn"

installed = pytest.mark.skipif(importlib.util.find_spec(EXTENSION) is None, reason="needs torch-ms-deform-attn")
every_way = pytest.mark.parametrize(
    "sampling", ["embedding_bag", "grid_sample", pytest.param("ms_deform_attn", marks=installed)]
)


def drawn(dtype=torch.float64, *, shapes=SHAPES, queries=Q):
    g = torch.Generator().manual_seed(0)
    value = torch.randn(B, sum(h * w for h, w in shapes), M, D, generator=g, dtype=torch.float64)
    locations = torch.rand(B, queries, M, len(shapes), J, 2, generator=g, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.rand(B, queries, M, len(shapes), J, generator=g, dtype=torch.float64)
    return value.to(dtype), locations.to(dtype), weights.to(dtype)


def read_cell_by_cell(value, locations, weights):
    """The same sum from Python numbers: each location splits its weight among the four cells around it."""
    read = torch.zeros(B, Q, M, D, dtype=value.dtype)
    for b in range(B):
        for q in range(Q):
            for m in range(M):
                start = 0
                for level, (h, w) in enumerate(SHAPES):
                    for j in range(J):
                        x, y = (locations[b, q, m, level, j] * torch.tensor([w, h]) - 0.5).tolist()
                        for row in (math.floor(y), math.floor(y) + 1):
                            for column in (math.floor(x), math.floor(x) + 1):
                                if 0 <= row < h and 0 <= column < w:
                                    share = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[b, q, m, level, j]
                                    read[b, q, m] += share * value[b, start + row * w + column, m]
                    start += h * w
    return read.flatten(2)


@every_way
def test_reading_is_bilinear_over_zeros_beyond_the_border(sampling: str) -> None:
    value, locations, weights = drawn()

    read = multi_scale_deformable_attention(value, SHAPES, locations, weights, sampling=sampling)

    torch.testing.assert_close(read, read_cell_by_cell(value, locations, weights))


@every_way
def test_far_beyond_the_border_all_is_zero(sampling: str) -> None:
    value, locations, weights = drawn()
    far = (locations - 0.5).sign() * 1e9

    read = multi_scale_deformable_attention(value, SHAPES, far, weights, sampling=sampling)

    assert torch.equal(read, torch.zeros(B, Q, M * D, dtype=torch.float64))


@every_way
def test_gradients_are_those_of_the_sum(sampling: str) -> None:
    value, locations, weights = (tensor.requires_grad_() for tensor in drawn())

    assert torch.autograd.gradcheck(
        lambda *tensors: multi_scale_deformable_attention(tensors[0], SHAPES, *tensors[1:], sampling=sampling),
        (value, locations, weights),
        fast_mode=True,
    )


@pytest.mark.parametrize("shapes", [[(1, 1), (2, 3), (5, 7)], [(3, 2), (2, 9)]], ids=["coarsest first", "wider later"])
def test_gradients_agree_for_levels_in_any_order_and_more_queries_than_a_part(shapes: list[tuple[int, int]]) -> None:
    gradients = []
    for sampling in ("embedding_bag", "grid_sample"):
        tensors = [
            tensor.requires_grad_() for tensor in drawn(shapes=shapes, queries=100)
        ]  # 2 * 100 * 3 bags, 512 at once
        read = multi_scale_deformable_attention(tensors[0], shapes, *tensors[1:], sampling=sampling)
        gradients.append(torch.autograd.grad(read.square().sum(), tensors))

    torch.testing.assert_close(*gradients)


@every_way
def test_no_queries_read_nothing(sampling: str) -> None:
    value, locations, weights = drawn()

    read = multi_scale_deformable_attention(value, SHAPES, locations[:, :0], weights[:, :0], sampling=sampling)

    assert read.shape == (B, 0, M * D)


@every_way
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_locations_keep_float32_where_values_are_shorter(dtype: torch.dtype, sampling: str) -> None:
    value, locations, weights = drawn(torch.float32)

    read = multi_scale_deformable_attention(value.to(dtype), SHAPES, locations, weights, sampling=sampling)

    expected = multi_scale_deformable_attention(value.to(dtype).float(), SHAPES, locations, weights, sampling=sampling)
    assert torch.equal(read, expected.to(dtype))


def test_a_location_that_is_not_a_number_reads_none() -> None:
    value, locations, weights = drawn()
    locations[1, 2, 0, 0, 0, 0] = torch.nan

    read = multi_scale_deformable_attention(value, SHAPES, locations, weights, sampling="embedding_bag")

    spoiled = read.view(B, Q, M, D).isnan()
    assert spoiled[1, 2, 0].all()
    assert spoiled.sum() == D


def test_levels_that_do_not_hold_all_cells_are_refused() -> None:
    value, locations, weights = drawn()

    with pytest.raises(ValueError, match=r"`spatial_shapes` must hold 3 levels of 42 cells together, got \[\(5, 7\)\]"):
        multi_scale_deformable_attention(value, SHAPES[:1], locations, weights)


def read_by_a_stand_in(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    """Has the signature of torch-ms-deform-attn, checks what its documentation asks for, and reads level by level."""
    assert spatial_shapes.dtype == level_start_index.dtype == torch.int64
    assert value.dtype == sampling_locations.dtype == attention_weights.dtype
    read = torch.zeros(len(value), sampling_locations.shape[1], value.shape[2] * value.shape[3], dtype=value.dtype)
    for level, ((h, w), start) in enumerate(zip(spatial_shapes.tolist(), level_start_index.tolist(), strict=True)):
        here = slice(level, level + 1)
        read += multi_scale_deformable_attention(
            value[:, start : start + h * w],
            [(h, w)],
            sampling_locations[:, :, :, here],
            attention_weights[:, :, :, here],
            sampling="grid_sample",
        )
    return read


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(EXTENSION)
    module.__spec__ = ModuleSpec(EXTENSION, None)
    module.ms_deform_attn = read_by_a_stand_in
    monkeypatch.setitem(sys.modules, EXTENSION, module)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_extension_is_given_what_it_documents(dtype: torch.dtype) -> None:
    value, locations, weights = drawn(torch.float32)

    read = multi_scale_deformable_attention(value.to(dtype), SHAPES, locations, weights, sampling="ms_deform_attn")

    expected = multi_scale_deformable_attention(value.to(dtype), SHAPES, locations, weights, sampling="grid_sample")
    torch.testing.assert_close(read, expected)


@pytest.mark.usefixtures("stand_in")
def test_left_to_choose_the_extension_runs_on_cuda_and_torch_elsewhere() -> None:
    assert [sampling_on(device) for device in ("cuda", "cpu", "mps")] == [
        "ms_deform_attn",
        "embedding_bag",
        "grid_sample",
    ]


def test_left_to_choose_without_the_extension_cuda_has_grid_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, EXTENSION, None)

    assert sampling_on("cuda:1") == "grid_sample"


def test_a_module_reads_the_way_it_is_told_and_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = MSDeformAttn(12, 3, M, J, sampling="grid_sample")
    monkeypatch.setattr(torch.nn.functional, "embedding_bag", None)
    value = torch.randn(B, 42, 12)

    read: Tensor = module(torch.randn(B, Q, 12), torch.rand(B, Q, 3, 2), value, SHAPES)

    assert read.shape == (B, Q, 12)
    assert "sampling=grid_sample" in repr(module)


def test_the_extension_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, EXTENSION, None)

    with pytest.raises(ConfigError, match="`sampling` can be 'ms_deform_attn' only where torch-ms-deform-attn is inst"):
        MSDeformAttn(sampling="ms_deform_attn")


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`sampling` must be one of \['auto', .* got 'bilinear'"):
        MSDeformAttn(sampling="bilinear")


def test_a_detector_that_does_not_sample_refuses_the_option() -> None:
    with pytest.raises(ConfigError, match="`sampling` is read by deformable_detr only, got grid_sample for detr"):
        DetectorConfig(sampling="grid_sample")


def test_an_exported_graph_reads_by_grid_sample_which_every_format_has() -> None:
    module = MSDeformAttn(12, 3, M, J)
    arguments = (torch.randn(B, Q, 12), torch.rand(B, Q, 3, 2), torch.randn(B, 42, 12), SHAPES)

    exported = torch.export.export(module, arguments)

    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum("grid_sampler" in name for name in called) == len(SHAPES)
    assert not any("embedding_bag" in name for name in called)


@every_way
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.11's compiler does so
def test_every_way_compiles_into_one_graph(sampling: str) -> None:
    value, locations, weights = drawn()

    def read(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return multi_scale_deformable_attention(value, SHAPES, locations, weights, sampling=sampling)

    compiled = torch.compile(read, backend="eager", fullgraph=True)

    torch.testing.assert_close(compiled(value, locations, weights), read(value, locations, weights))
