"""Recording a forward up to the last layer asked for, or failing where a record could miss something."""

import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from detr_backbone.forward_pass import has_hooks

_DEVICES = ("cpu", "cuda")


class AllReturned(BaseException):
    """Leaves a forward whose rest is not needed; no `except Exception` on the way holds it up."""


class Outputs(dict[str, Any]):
    """Outputs of the wanted layers at their first calls, by name."""

    def __init__(self, wanted: Iterable[str]) -> None:
        super().__init__()
        self._count = len(set(wanted))

    def add(self, names: Iterable[str], output: Any) -> None:
        """Add the output of a layer that returns, under its names.

        Raises:
            AllReturned: it was the last that is wanted.
        """
        for name in names:
            self.setdefault(name, output)
        if len(self) == self._count:
            raise AllReturned


def by_module(model: nn.Module, return_layers: Mapping[str, str]) -> dict[nn.Module, list[str]]:
    """Return the names of the outputs of each module: several, where one module has several paths."""
    names: dict[nn.Module, list[str]] = {}
    for path, name in return_layers.items():
        names.setdefault(model.get_submodule(path), []).append(name)
    return names


class Untraceable(BaseException):
    """Ends a trace; an `except Exception` in a forward must not make the trace follow that branch."""


class _Tracer(fx.Tracer):
    """Records a forward up to the last layer asked for.

    Only modules around such a layer are opened. Any other is one call in the graph, whatever its own forward does.
    """

    def __init__(self, model: nn.Module, return_layers: Mapping[str, str]) -> None:
        super().__init__()
        self._wanted = by_module(model, return_layers)
        self._around = {m for m in model.modules() if any(n in self._wanted for n in m.modules() if n is not m)}
        self._outputs = Outputs(return_layers.values())
        self._context = _context()

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:
        def forward(x: fx.Proxy) -> dict[str, fx.Proxy]:
            with suppress(AllReturned):
                self.root(x)  # with the defaults of further parameters, and with hooks
            return dict(self._outputs)

        return forward, [self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._around

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if m in self._around and has_hooks(m):
            raise Untraceable("a graph never calls the hooks of a module that it opens")
        output = super().call_module(m, forward, args, kwargs)
        if m in self._wanted:
            if not isinstance(output, fx.Proxy):
                raise Untraceable(f"a graph may give back {type(output)} as another type")
            self._outputs.add(self._wanted[m], output)
        return output

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise Untraceable("a graph has no branches")

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise Untraceable("a graph may keep a tensor as it is now")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self._context:
            raise Untraceable("a graph loses the context of what it records")
        return super().create_node(*args, **kwargs)


class _Proxy(fx.Proxy):
    """Stands for a value during a trace, and ends it at a question that only the value can answer."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance asks for it: False here would be True for the tensor. Only torch's own code means the proxy.
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] == "torch" or caller == __name__:
            return _Proxy
        raise Untraceable("isinstance")

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        if not hasattr(Tensor, k):
            raise Untraceable(k)
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
        raise Untraceable(f"{func} is computed")


def trace(model: nn.Module, return_layers: Mapping[str, str], *, training: bool) -> fx.Graph:
    """Return the graph of a forward up to the last layer asked for.

    Raises:
        Untraceable: a graph could miss something; what the forward itself raises at a proxy comes through too.
    """
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


def code(graph: fx.Graph) -> str:
    """Return a graph as Python source, by which two graphs are compared."""
    return graph.python_code("self").src
