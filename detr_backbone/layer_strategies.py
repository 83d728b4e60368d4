"""Three ways to take named features out of a network's forward, and the choice of the one that is right for it.

The network is traced, which computes nothing: its graph shows whether the forward is the children in sequence, and is
the computation itself where it is not. A trace that could miss something fails, and then the network runs untouched.
"""

import operator
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from detr_backbone.threads import current_thread

_DEVICES = ("cpu", "cuda")


class Strategy(Protocol):
    """A way to compute the outputs asked for, by name, in the order in which the network computes them."""

    name: str
    network: nn.Module
    """Holds the modules and parameters that are needed, under the paths that they have in the model."""

    def __call__(self, x: Tensor) -> dict[str, Any]: ...


def choose(model: nn.Module, return_layers: Mapping[str, str]) -> Strategy:
    """The first of `Walk`, `Graph` and `Hooks` that computes what the model computes.

    Args:
        model: any module that takes one input.
        return_layers: path of an inner module -> name of its output.

    Raises:
        ValueError: the forward, as far as a trace can tell, does not reach a layer that is asked for.
    """
    try:
        graph, in_evaluation = (_trace(model, return_layers, training=training) for training in (True, False))
    except (Exception, _Untraceable):  # given a tracer's proxy, a forward may raise anything
        return Hooks(model, return_layers)
    if _code(graph) != _code(in_evaluation):
        return Hooks(model, return_layers)
    _check_reached(return_layers, cast(dict[str, fx.Node], graph.output_node().args[0]))
    children = _children_in_sequence(model, graph)
    return Walk(model, children, return_layers) if children else Graph(model, graph)


class Walk:
    """Runs children in sequence."""

    name = "sequential"

    def __init__(self, model: nn.Module, children: Iterable[str], return_layers: Mapping[str, str]) -> None:
        self.network = nn.Module()
        self.network.training = model.training
        for child in children:
            self.network.add_module(child, model.get_submodule(child))
        self._return_layers = dict(return_layers)

    def __call__(self, x: Tensor) -> dict[str, Any]:
        outputs = {}
        for child, module in self.network.named_children():
            x = module(x)
            if child in self._return_layers:
                outputs[self._return_layers[child]] = x
        return outputs


class Graph:
    """Runs the traced forward, which ends at the last layer asked for."""

    name = "graph"

    def __init__(self, model: nn.Module, traced: fx.Graph) -> None:
        graph = fx.Graph()  # without the tracer's class, which unpickling would try to build
        graph.output(graph.graph_copy(traced, {}))
        self.network: nn.Module = fx.GraphModule(model, graph, class_name=type(model).__name__)

    def __call__(self, x: Tensor) -> dict[str, Any]:
        return dict(self.network(x))


class Hooks:
    """Runs the model itself, and leaves its forward when the last layer asked for has returned."""

    name = "hooks"

    def __init__(self, model: nn.Module, return_layers: Mapping[str, str]) -> None:
        self.network = model
        self._return_layers = dict(return_layers)
        self._wanted = _by_module(model, return_layers)
        # Keyed by thread: a server may run one network in several threads at once.
        self._running: dict[int, _Outputs] = {}
        for module in self._wanted:
            module.register_forward_hook(self._returned)

    def __call__(self, x: Tensor) -> dict[str, Any]:
        thread = current_thread()
        outputs = self._running[thread] = _Outputs(self._wanted)
        try:
            with suppress(_AllReturned):
                self.network(x)
        finally:
            del self._running[thread]
        _check_reached(self._return_layers, outputs)
        return dict(outputs)

    def _returned(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        outputs = self._running.get(current_thread())
        if outputs is not None:
            outputs.add(module, output)


class _AllReturned(BaseException):
    """Leaves a forward whose rest is not needed; no `except Exception` on the way holds it up."""


class _Untraceable(BaseException):
    """Ends a trace; an `except Exception` in a forward must not make the trace follow that branch."""


class _Outputs(dict[str, Any]):
    """What each module returned when it was first called, under all its names."""

    def __init__(self, wanted: Mapping[nn.Module, list[str]]) -> None:
        super().__init__()
        self._missing = dict(wanted)

    def add(self, module: nn.Module, output: Any) -> None:
        self.update(dict.fromkeys(self._missing.pop(module, ()), output))
        if not self._missing:
            raise _AllReturned


class _Tracer(fx.Tracer):
    """Records a forward up to the last layer asked for.

    Only modules around such a layer are opened. Any other is one call in the graph, whatever its own forward does.
    """

    def __init__(self, model: nn.Module, return_layers: Mapping[str, str]) -> None:
        super().__init__()
        self._wanted = _by_module(model, return_layers)
        self._around = {m for m in model.modules() if any(n in self._wanted for n in m.modules() if n is not m)}
        self._outputs = _Outputs(self._wanted)
        self._context = _context()

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:
        def forward(x: fx.Proxy) -> dict[str, fx.Proxy]:
            with suppress(_AllReturned):
                self.root(x)  # with the defaults of further parameters, and with hooks
            return dict(self._outputs)

        return forward, [self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._around

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        if m in self._wanted:
            if not isinstance(output, fx.Proxy):
                raise _Untraceable(f"a graph may give back {type(output)} as another type")
            self._outputs.add(m, output)
        return output

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise _Untraceable("a graph has no branches")

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise _Untraceable("a graph may keep a tensor as it is now")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self._context:
            raise _Untraceable("a graph loses the context of what it records")
        return super().create_node(*args, **kwargs)


class _Proxy(fx.Proxy):
    """Stands for a value during a trace, and ends it at a question that only the value can answer."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance asks for it: False here would be True for the tensor. Only torch's own code means the proxy.
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] == "torch" or caller == __name__:
            return _Proxy
        raise _Untraceable("isinstance")

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        if not hasattr(Tensor, k):
            raise _Untraceable(k)
        return super().__getattr__(k)


def _record_in_place(name: str) -> None:
    """Let `x += y` be recorded as what it is to a tensor, which may have more names: the usual proxy records x + y."""
    setattr(_Proxy, f"__{name}__", lambda x, y: _in_place(name, x, y))


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    _record_in_place(f"i{_name}")


@fx.wrap
def _in_place(operation: str, x: Any, y: Any) -> Any:
    return getattr(operator, operation)(x, y)


class _NothingComputed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails at what is computed during a trace: a number drawn or derived now would be a constant of the graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _Untraceable(f"{func} is computed")


def _trace(model: nn.Module, return_layers: Mapping[str, str], *, training: bool) -> fx.Graph:
    with _mode(model, training=training), _NothingComputed():  # type: ignore[no-untyped-call]
        return _Tracer(model, return_layers).trace(model)


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training with gradients, or evaluation under autocast and without: a forward may depend on any of the three."""
    modes = {module: module.training for module in model.modules()}
    autocast = {device: torch.is_autocast_enabled(device) for device in _DEVICES}
    try:
        for module in modes:
            module.training = training
        for device in _DEVICES:
            torch.set_autocast_enabled(device, not training)
        with torch.set_grad_enabled(training):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for device, enabled in autocast.items():
            torch.set_autocast_enabled(device, enabled)


def _context() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in _DEVICES)


def _code(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def _children_in_sequence(model: nn.Module, graph: fx.Graph) -> list[str]:
    """The children that the graph calls, if these are the first ones in their order, each fed by the one before it.

    Empty if the graph does anything else.
    """
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    children = [name for name, _ in model.named_children()][: len(calls)]
    in_sequence = [node.target for node in calls if node.op == "call_module"] == children and all(
        node.args == (node.prev,) and not node.kwargs for node in calls
    )
    return children if in_sequence else []


def _by_module(model: nn.Module, return_layers: Mapping[str, str]) -> dict[nn.Module, list[str]]:
    names: dict[nn.Module, list[str]] = {}
    for path, name in return_layers.items():
        names.setdefault(model.get_submodule(path), []).append(name)
    return names


def _check_reached(return_layers: Mapping[str, str], outputs: Collection[str]) -> None:
    missing = [path for path, name in return_layers.items() if name not in outputs]
    if missing:
        raise ValueError(f"`return_layers` must name layers that the forward calls, it never called {missing}")
