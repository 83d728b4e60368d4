"""Named features out of the middle of a network."""

import copy
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models._utils import IntermediateLayerGetter as TorchvisionGetter

from detr_backbone import IntermediateLayerGetter
from tests.small_networks import STRATEGIES, Branched, LooksAtValues


def test_the_example_of_torchvision_gives_its_shapes() -> None:
    getter = IntermediateLayerGetter(resnet18(), {"layer1": "feat1", "layer3": "feat2"})

    outputs = getter(torch.rand(1, 3, 224, 224))

    assert [(name, tuple(x.shape)) for name, x in outputs.items()] == [
        ("feat1", (1, 64, 56, 56)),
        ("feat2", (1, 256, 14, 14)),
    ]


def test_outputs_and_keys_equal_torchvisions() -> None:
    model = resnet18().eval()
    layers = {"layer3": "c", "layer1": "a", "layer2": "b"}
    ours, theirs = IntermediateLayerGetter(model, layers), TorchvisionGetter(model, layers)
    x = torch.rand(1, 3, 32, 32)

    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(ours(x)) == list(theirs(x)) == ["a", "b", "c"]
    assert all(torch.equal(ours(x)[name], theirs(x)[name]) for name in "abc")


def test_nothing_after_the_last_layer_asked_for_is_kept() -> None:
    getter = IntermediateLayerGetter(resnet18(), {"layer2": "features"})

    assert list(getter) == ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "at least one layer, got none; there are first, second"),
        ({"secnd": "x"}, "got 'secnd', expected one of first, second; did you mean 'second'"),
        ({"first": "x", "second": "x"}, "a name of its own"),
    ],
)
def test_a_bad_request_says_what_exists(layers: dict[str, str], message: str) -> None:
    model = nn.Sequential()
    model.add_module("first", nn.ReLU())
    model.add_module("second", nn.ReLU())

    with pytest.raises(ValueError, match=message):
        IntermediateLayerGetter(model, layers)


by_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


@by_strategy
def test_the_strategy_is_the_first_that_fits_the_forward(strategy: str) -> None:
    assert IntermediateLayerGetter(STRATEGIES[strategy](), ["left"]).strategy == strategy


@pytest.mark.parametrize("model_of", [Branched, LooksAtValues])
def test_outputs_are_those_worked_out_by_hand(model_of: Callable[[], Branched]) -> None:
    model, x = model_of(), torch.rand(3, 4)
    getter = IntermediateLayerGetter(model, {"head": "logits", "left.0": "inner"})
    stem = model.stem(x) + model.shift
    inner = model.left[0](stem)

    outputs = getter(x)

    assert list(outputs) == ["inner", "logits"]
    torch.testing.assert_close(outputs["inner"], inner)
    torch.testing.assert_close(outputs["logits"], model.head(model.left[1](inner) + model.right(stem)))


@by_strategy
def test_nothing_after_the_last_layer_asked_for_is_computed(strategy: str) -> None:
    model, calls = STRATEGIES[strategy](), []
    model.left.register_forward_hook(lambda *_: calls.append("left"))
    model.head.register_forward_hook(lambda *_: calls.append("head"))

    IntermediateLayerGetter(model, ["left"])(torch.rand(1, 4))

    assert calls == ["left"]


@by_strategy
def test_keys_are_those_of_the_model(strategy: str) -> None:
    model = STRATEGIES[strategy]()
    kept = IntermediateLayerGetter(model, ["left"]).state_dict()
    expected = {"sequential": ("stem", "left"), "graph": ("shift", "stem", "left"), "hooks": tuple(model.state_dict())}

    assert kept.keys() == {key for key in model.state_dict() if key.startswith(expected[strategy])}
    assert all(kept[key].data_ptr() == value.data_ptr() for key, value in model.state_dict().items() if key in kept)


@by_strategy
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda getter: pickle.loads(pickle.dumps(getter))])
def test_a_copy_computes_the_same_by_parameters_of_its_own(
    strategy: str, copied: Callable[[IntermediateLayerGetter], IntermediateLayerGetter]
) -> None:
    getter, x = IntermediateLayerGetter(STRATEGIES[strategy](), ["left"]), torch.rand(2, 4)
    expected = getter(x)["left"].detach()

    copy_of_it = copied(getter).double()
    for parameter in getter.parameters():
        nn.init.zeros_(parameter)

    assert list(copy_of_it.state_dict()) == list(getter.state_dict())
    torch.testing.assert_close(copy_of_it(x.double())["left"].float(), expected)


@by_strategy
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda getter: pickle.loads(pickle.dumps(getter))])
def test_a_copy_takes_other_weights_by_assignment(
    strategy: str, copied: Callable[[IntermediateLayerGetter], IntermediateLayerGetter]
) -> None:
    getter, other = (IntermediateLayerGetter(STRATEGIES[strategy](), ["left"]) for _ in range(2))
    for parameter in other.parameters():
        nn.init.uniform_(parameter)
    x, copy_of_it = torch.rand(2, 4), copied(getter)

    copy_of_it.load_state_dict(other.state_dict(), assign=True)

    torch.testing.assert_close(copy_of_it(x)["left"], other(x)["left"])


@by_strategy
def test_autocast_reaches_the_layers(strategy: str) -> None:
    getter = IntermediateLayerGetter(STRATEGIES[strategy](), ["left"])

    with torch.autocast("cpu"):
        assert getter(torch.rand(2, 4))["left"].dtype == torch.bfloat16


@pytest.mark.parametrize("strategy", ["sequential", "graph"])
def test_a_compiled_getter_is_one_graph(strategy: str) -> None:
    getter, x = IntermediateLayerGetter(STRATEGIES[strategy](), ["left"]), torch.rand(2, 4)

    compiled = torch.compile(getter, backend="eager", fullgraph=True)

    torch.testing.assert_close(compiled(x)["left"], getter(x)["left"])


@by_strategy
def test_the_choice_of_a_strategy_leaves_the_modes_of_the_model(strategy: str) -> None:
    model = STRATEGIES[strategy]().eval()
    model.left.train()

    getter = IntermediateLayerGetter(model, ["left"])

    assert (model.stem.training, model.left.training, getter.training) == (False, True, False)
    assert (getter.train().training, model.stem.training) == (True, True)


@pytest.mark.parametrize("looks_at_values", [False, True])
def test_a_layer_called_more_than_once_gives_its_first_output(looks_at_values: bool) -> None:
    class Reusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if looks_at_values:
                assert x.sum() > 0
            return self.head(self.layer(self.layer(x)))

    model, x = Reusing(), torch.rand(2, 4)

    outputs = IntermediateLayerGetter(model, ["layer", "head"])(x)

    torch.testing.assert_close(outputs["layer"], model.layer(x))
    torch.testing.assert_close(outputs["head"], model.head(model.layer(model.layer(x))))


@pytest.mark.parametrize("container", [tuple, list, lambda pair: OrderedDict(enumerate(pair))])
def test_an_output_that_is_no_tensor_is_returned_as_it_is(container: Callable[[Any], Any]) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Any:
            return container((self.inner(x), -x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x)[1] * 2

    x = torch.rand(2, 4)

    for paths in (["pair"], ["pair.inner", "pair"]):  # `pair` is one call of the graph, or looked into
        output, expected = IntermediateLayerGetter(Model(), paths)(x)["pair"], container((x, -x))
        assert type(output) is type(expected)
        torch.testing.assert_close(output, expected)


class Forward(nn.Module):
    """Two layers with something in between."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.register_buffer("offset", torch.ones(4))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self, self.first(x)))


def without_gradients(_: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 2


def without_autocast(_: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return x * 2


def skipped_at_random(_: nn.Module, x: Tensor) -> Tensor:
    return x if torch.rand(()) < 2 else x * 2  # always, which a trace cannot know


@pytest.mark.parametrize(
    "between",
    [
        without_gradients,
        without_autocast,
        skipped_at_random,
        lambda _, x: x * torch.ones(4),
        lambda model, x: x + model.offset,
        lambda model, x: x if model.training else x * 2,
        lambda _, x: x if torch.is_grad_enabled() else x * 2,
        lambda _, x: x if isinstance(x, Tensor) else x * 2,
        lambda _, x: x * 2 if hasattr(x, "tensors") else x,
    ],
)
def test_what_a_graph_would_freeze_or_lose_is_left_to_the_model(
    between: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    assert IntermediateLayerGetter(Forward(between), ["second"]).strategy == "hooks"


def test_both_modes_are_right_where_they_differ() -> None:
    model, x = Forward(lambda model, x: x if model.training else x * 2), torch.rand(2, 4)
    getter = IntermediateLayerGetter(model, ["second"])

    torch.testing.assert_close(getter.train()(x)["second"], model.second(model.first(x)))
    torch.testing.assert_close(getter.eval()(x)["second"], model.second(model.first(x) * 2))


def shifted_under_two_names(_: nn.Module, x: Tensor) -> Tensor:
    alias = x
    alias += 1
    return x


def test_a_change_in_place_reaches_every_name_of_a_tensor() -> None:
    model, x = Forward(shifted_under_two_names), torch.rand(2, 4)
    getter = IntermediateLayerGetter(model, ["second"])

    assert getter.strategy == "graph"
    for each in (getter, pickle.loads(pickle.dumps(getter))):
        torch.testing.assert_close(each(x)["second"], model.second(model.first(x) + 1))


def test_a_function_between_all_children_of_a_network_is_computed_too() -> None:
    class Negated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.stage = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.stage(-self.stem(x))

    model, x = Negated(), torch.randn(1, 3, 8, 8)
    (output,) = IntermediateLayerGetter(model, ["stage"])(x).values()

    torch.testing.assert_close(output, model(x))


def test_a_forward_of_its_own_on_a_sequential_is_not_taken_for_a_sequence() -> None:
    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](x + self[0](x))

    model, x = Residual(nn.Linear(4, 4), nn.Linear(4, 4)), torch.rand(2, 4)
    getter = IntermediateLayerGetter(model, ["1"])

    assert getter.strategy == "graph"
    torch.testing.assert_close(getter(x)["1"], model[1](x + model[0](x)))


def test_a_forward_that_catches_exceptions_is_left_too() -> None:
    class Catching(LooksAtValues):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            except Exception:
                return self.head(x)

    calls = []
    model = Catching()
    model.head.register_forward_hook(lambda *_: calls.append("head"))

    IntermediateLayerGetter(model, ["stem"])(torch.rand(1, 4))

    assert not calls


def test_hooks_around_a_layer_fire() -> None:
    calls: list[str] = []
    model = Branched()
    model.left.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.left.register_forward_hook(lambda *_: calls.append("after"))
    getter = IntermediateLayerGetter(model, ["left.0", "right"])
    assert calls == []

    getter(torch.rand(1, 4))
    assert calls == ["before", "after"]


def test_the_model_itself_still_runs_to_its_end() -> None:
    model = LooksAtValues()
    IntermediateLayerGetter(model, ["stem"])(torch.rand(1, 4))

    assert model(torch.rand(1, 4)).shape == (1, 2)


def test_threads_do_not_share_outputs() -> None:
    model = LooksAtValues()
    getter = IntermediateLayerGetter(model, ["stem", "right"])
    meet = threading.Barrier(2, timeout=20)
    model.left.register_forward_hook(lambda *_: meet.wait() and None)  # both are inside before either goes on
    inputs = [torch.rand(1, 4), torch.rand(1, 4)]

    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(getter, inputs))

    for output, x in zip(outputs, inputs, strict=True):
        torch.testing.assert_close(output["stem"], model.stem(x))


class Unused(Branched):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)


class UnusedThatLooksAtValues(LooksAtValues):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)


def test_a_layer_that_is_never_called_is_an_error_at_once_where_a_trace_shows_it() -> None:
    with pytest.raises(ValueError, match=r"never called \['unused'\]"):
        IntermediateLayerGetter(Unused(), ["stem", "unused"])


def test_a_layer_that_is_never_called_is_an_error_of_the_call_where_no_trace_shows_it() -> None:
    getter = IntermediateLayerGetter(UnusedThatLooksAtValues(), ["stem", "unused"])

    with pytest.raises(ValueError, match=r"never called \['unused'\]"):
        getter(torch.rand(1, 4))


def test_an_unknown_path_names_its_neighbours_and_the_nearest_path() -> None:
    with pytest.raises(ValueError, match=r"got 'left.2', expected one of left.0, left.1; did you mean 'left.\d'"):
        IntermediateLayerGetter(Branched(), ["left.2"])


def test_a_path_asked_for_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="a name of its own"):
        IntermediateLayerGetter(Branched(), ["stem", "stem"])


def test_a_layer_that_comes_to_stand_in_two_places_runs_twice() -> None:
    getter = IntermediateLayerGetter(nn.Sequential(nn.ReLU(), nn.Linear(4, 4), nn.ReLU()), ["2"])
    getter["0"] = getter["2"] = nn.Softplus()
    x = torch.rand(2, 4)

    torch.testing.assert_close(getter(x)["2"], F.softplus(getter.get_submodule("1")(F.softplus(x))))


@pytest.mark.parametrize("change", ["replaced", "patched", "extended"])
def test_a_change_of_a_module_that_never_runs_is_refused(change: str) -> None:
    getter = IntermediateLayerGetter(torchvision.models.resnet18(), ["layer2.0.conv2", "layer3"])
    if change == "replaced":
        getter.get_submodule("layer2").add_module("0", nn.Identity())
    elif change == "patched":
        getter.get_submodule("layer2.0").forward = nn.Identity()
    else:
        getter.get_submodule("layer2").add_module("2", nn.Identity())

    with pytest.raises(RuntimeError, match=r"layer2(\.0)? must stay"):
        getter(torch.rand(1, 3, 64, 64))
