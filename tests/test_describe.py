"""What every layer of a network gives, against numbers worked out by hand."""

import csv
import io
import json
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from detr_backbone import BackboneConfig, IntermediateLayerGetter, build_backbone, describe
from detr_backbone.backbone import BackboneBase
from detr_backbone.detectors import DETR, Transformer
from detr_backbone.errors import ConfigError
from detr_backbone.inspection.table import LayerDescription


class Tiny(nn.Module):
    """Halves the picture, cuts off what is negative, and is called by the names of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.pick = nn.Conv2d(1, 2, kernel_size=1, stride=2, bias=False)
        self.cut = nn.ReLU()
        self.unused = nn.Linear(3, 5)
        with torch.no_grad():
            self.pick.weight.copy_(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.cut(self.pick(x))


def rows_of(model: nn.Module, images: Any, **options: Any) -> dict[str, LayerDescription]:
    return {row.path: row for row in describe(model, images, passes=1, **options).rows}


def test_numbers_are_those_worked_out_by_hand() -> None:
    images = torch.arange(16.0).reshape(1, 1, 4, 4)  # every second row and column: 0, 2, 8, 10
    row = rows_of(Tiny(), images)["cut"]

    assert (row.shape, row.dtype, row.channels, row.stride) == ((1, 2, 2, 2), "float32", 2, 2)
    assert (row.min, row.max, row.zeros, row.bytes) == (0, 10, 5 / 8, 32)
    assert row.mean == 20 / 8
    assert row.std == pytest.approx((168 / 8 - 2.5**2) ** 0.5)


def test_parameters_are_counted_and_those_that_train_among_them() -> None:
    model = nn.Sequential(OrderedDict(body=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    model.body[0].bias.requires_grad_(requires_grad=False)
    description = describe(model, (8, 8), passes=1)

    assert (description.parameters, description.trainable) == (3 * 4 * 9 + 4 + 8, 3 * 4 * 9 + 8)
    assert [(row.parameters, row.trainable) for row in description.rows] == [(120, 116)]
    assert "partly" in str(description)


def test_a_layer_that_is_never_called_is_a_row_without_output() -> None:
    row = rows_of(Tiny(), torch.zeros(1, 1, 4, 4))["unused"]

    assert (row.call, row.shape, row.mean, row.milliseconds, row.parameters) == (0, None, None, None, 20)


def test_a_layer_whose_weights_are_read_by_another_is_used_though_not_called() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query_embed = nn.Embedding(3, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.parts = nn.Sequential(nn.Linear(8, 8))
            self.unused = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            queries = self.query_embed.weight[None] + x
            return self.parts[0](self.attention(queries, queries, queries)[0])

    layers = ["query_embed", "attention.out_proj", "parts", "unused"]
    description = describe(Attends(), torch.zeros(1, 3, 8), layers=layers, passes=1)

    assert {row.path: (row.call, row.used) for row in description.rows} == {
        "query_embed": (0, True),
        "attention.out_proj": (0, True),
        "parts": (0, True),
        "unused": (0, False),
    }


def test_a_layer_under_two_paths_has_a_row_for_each() -> None:
    model = Tiny()
    model.alias = model.cut
    rows = describe(model, torch.zeros(1, 1, 4, 4), layers=["cut", "alias"], passes=1).rows

    assert [(row.path, row.call) for row in rows] == [("alias", 1), ("cut", 1)]


def test_every_call_of_a_layer_has_its_row() -> None:
    class Twice(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return self.cut(1 - self.cut(x))

    rows = describe(Twice(), torch.tensor([[3.0, -2.0]]), layers=["cut"], passes=1).rows

    assert [(row.call, row.min, row.max) for row in rows] == [(1, 0, 3), (2, 0, 1)]


def test_nan_and_infinity_are_counted_apart_from_the_numbers_and_named_first() -> None:
    images = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, torch.nan, 3.0]).reshape(1, 1, 2, 3)
    description = describe(nn.Sequential(nn.Identity(), nn.ReLU()), images, passes=1)
    first, second = description.rows

    assert (first.nan, first.inf, first.mean, first.std) == (2, 2, 2, 1)
    assert (second.nan, second.inf) == (2, 1)
    assert description.non_finite == (first, second)
    assert "NOT FINITE: NaN or infinity in 2 of 2 outputs, first in 0" in str(description)
    assert "2 / 2" in str(description)


def test_the_warning_names_the_innermost_layer_of_those_where_it_begins() -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 0

    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), Breaks(), nn.ReLU()), nn.ReLU())

    assert "infinity in 4 of 6 outputs, first in 1.1" in str(describe(model, torch.ones(1), layers=2, passes=1))


def test_a_layer_without_a_finite_value_has_no_mean() -> None:
    row = rows_of(nn.Sequential(nn.Identity()), torch.full((1, 1, 2, 2), torch.nan))["0"]

    assert (row.nan, row.mean, row.zeros) == (4, None, None)


class Point(NamedTuple):
    x: Tensor
    y: Tensor


class Gives(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, _: Tensor) -> Any:
        return self.output


@pytest.mark.parametrize(
    ("output", "names"),
    [
        ((torch.ones(2), [torch.ones(3)]), ["[0]", "[1][0]"]),
        ({"boxes": torch.ones(2), 7: None}, ["['boxes']"]),
        (Point(torch.ones(2), torch.ones(2)), [".x", ".y"]),
        ("text", [""]),
    ],
)
def test_every_tensor_in_an_output_has_its_row(output: Any, names: list[str]) -> None:
    rows = describe(nn.Sequential(Gives(output)), torch.zeros(1), passes=1).rows

    assert [row.output for row in rows] == names


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (torch.tensor([1, 5], dtype=torch.int64), "int64"),
        (torch.tensor([1, 5], dtype=torch.uint8), "uint8"),
        (torch.tensor([1.0, 5.0], dtype=torch.bfloat16), "bfloat16"),
        (torch.tensor([1j, -5], dtype=torch.complex64), "complex64"),
    ],
)
def test_values_of_any_dtype_are_described(values: Tensor, dtype: str) -> None:
    row = rows_of(nn.Sequential(nn.Identity()), values)["0"]

    assert (row.dtype, row.mean, row.std, row.bytes) == (dtype, 3, 2, 2 * values.element_size())


def test_values_are_those_before_a_later_layer_changes_them_in_place() -> None:
    rows = rows_of(nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)), torch.tensor([-1.0, 1.0]))

    assert (rows["0"].min, rows["1"].min) == (-1, 0)


@pytest.mark.parametrize(
    ("pixels", "cells", "channels", "stride"),
    [
        ((97, 131), (8, 4, 5), 8, 32),  # ceil(97 / 32), ceil(131 / 32)
        ((96, 96), (4, 5, 8), 4, None),
        ((96, 96), (4, 32, 32), 4, 3),
        ((96, 96), (8, 8, 4), 4, 12),  # channels last
        ((96, 96), (5, 1, 1), 5, None),
    ],
)
def test_channels_and_stride_follow_from_the_sizes(
    pixels: tuple[int, int], cells: tuple[int, ...], channels: int, stride: int | None
) -> None:
    row = rows_of(nn.Sequential(Gives(torch.zeros(1, *cells))), torch.zeros(1, 3, *pixels))["0"]

    assert (row.channels, row.stride) == (channels, stride)


def test_a_backbone_shows_its_levels_its_stages_and_its_positions() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet18", return_layers=("layer1", "layer2"), hidden_dim=8))
    description = describe(backbone, [torch.rand(3, 40, 64), torch.rand(3, 64, 33)], passes=1)
    rows = {(row.path, row.call, row.output): row for row in description.rows}

    assert [row.stride for (path, *_), row in rows.items() if path == "0"] == list(backbone.strides) == [4, 8]
    assert [row.shape for (path, *_), row in rows.items() if path == "1"] == [(2, 8, 16, 16), (2, 8, 8, 8)]
    assert [path for path, *_ in rows][2:-2] == [f"0.body.{name}" for name, _ in backbone[0].body.named_children()]
    assert description.input_shape == (2, 3, 64, 64)


def test_a_depth_opens_children_of_children() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU())), b=nn.ReLU()))

    assert list(rows_of(model, torch.zeros(1))) == ["a", "b"]
    assert list(rows_of(model, torch.zeros(1), layers=2)) == ["a", "a.0", "a.1", "b"]
    assert list(rows_of(model, torch.zeros(1), layers=3)) == ["a", "a.0", "a.1", "a.1.0", "b"]


def test_a_size_makes_images_with_the_channels_of_the_backbone_not_of_the_detector() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet18", hidden_dim=16))
    transformer = Transformer(d_model=16, nhead=2, num_encoder_layers=1, num_decoder_layers=1, dim_feedforward=16)
    detector = DETR(backbone, transformer, num_classes=3, num_queries=5)

    description = describe(detector, (64, 96), layers=["class_embed"], passes=1)

    assert description.input_shape == (1, 3, 64, 96)
    assert description.rows[0].shape == (1, 1, 5, 4)


def state(model: nn.Module) -> list[Any]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [hooks, [m.training for m in model.modules()], torch.get_rng_state().tolist(), torch.is_grad_enabled()]


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no")


@pytest.mark.parametrize("last", [nn.Identity(), Fails()])
def test_the_model_stays_as_it_is_also_where_its_forward_raises(last: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval(), Draws(), last)
    before, buffers = state(model), [buffer.clone() for buffer in model.buffers()]

    if isinstance(last, Fails):
        with pytest.raises(RuntimeError, match="no"):
            describe(model, (8, 8))
    else:
        describe(model, (8, 8))

    assert state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_getter_that_runs_its_model_gets_its_mode_back() -> None:
    class Looks(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    model = Looks()
    getter = IntermediateLayerGetter(model, ["pick"])
    assert getter.strategy == "hooks"

    rows = rows_of(getter, (4, 4))

    assert model.training
    assert rows["pick"].shape == (1, 2, 2, 2)
    assert rows["cut"].call == 0  # the getter leaves the forward before


def test_a_getter_that_runs_a_graph_shows_the_layers_inside_of_its_bare_modules() -> None:
    stages = nn.Sequential(nn.Conv2d(1, 2, 2, stride=2), nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()))
    getter = IntermediateLayerGetter(nn.Sequential(OrderedDict(stages=stages, head=nn.ReLU())), ["stages.1"])
    assert getter.strategy == "graph"

    assert [(row.path, row.call) for row in describe(getter, (8, 8), passes=1).rows] == [
        ("stages.0", 1),
        ("stages.1", 1),
    ]


def test_a_backbone_alone_is_its_own_first_row() -> None:
    network = nn.Sequential(OrderedDict(stem=nn.Conv2d(1, 2, 2, stride=2), stage=nn.Conv2d(2, 3, 2, stride=2)))
    backbone = BackboneBase(network, return_layers=["stage"], train_layers=["stage"], padding="zeros")

    assert list(rows_of(backbone, (8, 8))) == ["", "body.stem", "body.stage"]


def test_a_backbone_says_how_images_of_several_sizes_run_and_why() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 2, stride=2), nn.GroupNorm(1, 2))
    description = describe(BackboneBase(network, return_layers=["1"], train_layers=["0"]), (8, 8), passes=1)

    assert (description.batching, str(description.leak).split()[0]) == ("by_size", "1")
    assert f"batching by_size: {description.leak}" in str(description).splitlines()
    assert describe(network, (8, 8), passes=1).batching is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["pck"]}, "got 'pck', expected one of pick, cut, unused; did you mean 'pick'"),
        ({"layers": 0}, "depth of at least 1, got 0"),
        ({"passes": 0}, "`passes` must be at least 1, got 0"),
    ],
)
def test_a_bad_request_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        describe(Tiny(), (4, 4), **options)


def test_a_size_is_refused_where_no_convolution_says_the_channels() -> None:
    with pytest.raises(ConfigError, match="must be tensors for a network without a convolution"):
        describe(nn.Linear(2, 2), (4, 4))


def test_the_table_can_be_written_as_csv_and_json_and_printed_by_rich() -> None:
    description = describe(Tiny(), torch.full((1, 1, 4, 4), torch.nan), passes=1)
    console = Console(file=io.StringIO(), width=300)
    console.print(description)

    assert [row["path"] for row in csv.DictReader(io.StringIO(description.to_csv()))] == ["pick", "cut", "unused"]
    assert json.loads(json.dumps(description.to_dict()))["rows"][0]["shape"] == [1, 2, 2, 2]
    shown = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert shown == str(description).splitlines()
