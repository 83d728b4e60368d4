"""Three ways to take named features out of a network's forward, and the choice of the one that is right for it.

The network is traced, which computes nothing: its graph shows whether the forward is the children in sequence, and is
the computation itself where it is not. A trace that could miss something fails, and then the network runs untouched.
"""

import warnings
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from detr_backbone.forward_pass import PerThread
from detr_backbone.layer_getter.tracing import AllReturned, Outputs, Untraceable, by_module, code, trace


class Strategy(Protocol):
    """A way to compute the outputs asked for, by name, in the order in which the network computes them."""

    name: str
    network: nn.Module
    """Holds the modules and parameters that are needed, under the paths that they have in the model."""

    def run(self, network: nn.Module, x: Tensor) -> dict[str, Any]:
        """Return the outputs of `network`: this strategy's own, or a replica of it."""


def choose(model: nn.Module, return_layers: Mapping[str, str]) -> Strategy:
    """Return the first of `Walk`, `Graph` and `Hooks` that computes what the model computes.

    Args:
        model: any module that takes one input.
        return_layers: path of an inner module -> name of its output.

    Raises:
        ValueError: the forward, as far as a trace can tell, does not reach a layer that is asked for.
    """
    try:
        graph, in_evaluation = (trace(model, return_layers, training=training) for training in (True, False))
    except (Exception, Untraceable):  # given a tracer's proxy, a forward may raise anything
        return Hooks(model, return_layers)
    if code(graph) != code(in_evaluation):
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

    def run(self, network: nn.Module, x: Tensor) -> dict[str, Any]:
        outputs = {}
        for child, module in network._modules.items():  # named_children leaves out a layer's second place
            x = x if module is None else module(x)
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
        for parent in list(self.network.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.Module:  # what fx makes of a module that the trace opened
                    parent.add_module(name, OpenedModule(child))
        self._opened = {
            path: tuple(module._modules)
            for path, module in self.network.named_modules()
            if isinstance(module, OpenedModule)
        }

    def run(self, network: nn.Module, x: Tensor) -> dict[str, Any]:
        for path, parts in self._opened.items():
            module = network.get_submodule(path)
            if not isinstance(module, OpenedModule) or "forward" in vars(module) or tuple(module._modules) != parts:
                raise RuntimeError(
                    f"{path} must stay as it was when the layers were chosen, since layers inside of it are asked for "
                    "and its own forward never runs | fix: change it before, or ask for whole layers"
                )
        return dict(network(x))


class OpenedModule(nn.Module):
    """A module around a layer that is asked for: its parts run, and its own forward does not."""

    def __init__(self, parts: nn.Module) -> None:
        super().__init__()
        vars(self).update(vars(parts))

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        self._warn()
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        self._warn()
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        self._warn()
        return super().register_full_backward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        self._warn()
        return super().register_full_backward_pre_hook(*args, **kwargs)

    def _warn(self) -> None:
        parts = ", ".join(name for name, _ in self.named_children())
        warnings.warn(f"this module is never called, since layers inside of it are: hook one of {parts}", stacklevel=3)


class Hooks:
    """Runs the model itself, and leaves its forward when the last layer asked for has returned."""

    name = "hooks"

    def __init__(self, model: nn.Module, return_layers: Mapping[str, str]) -> None:
        self.network = model
        self._return_layers = dict(return_layers)
        self._running: PerThread[Outputs] = PerThread()
        for module, names in by_module(model, return_layers).items():
            module.register_forward_hook(partial(self.add_output, names))

    def run(self, network: nn.Module, x: Tensor) -> dict[str, Any]:
        outputs = Outputs(self._return_layers.values())
        with self._running.set(outputs), suppress(AllReturned):
            network(x)
        _check_reached(self._return_layers, outputs)
        return dict(outputs)

    def add_output(self, names: Iterable[str], _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        """Add the output of a layer to those of this thread's pass: the forward hook of the layers asked for."""
        outputs = self._running.get()
        if outputs is None:
            return
        try:
            outputs.add(names, output)
        except AllReturned:
            # torch.export follows modules in and out; what comes after the last layer is no part of its graph anyway.
            if not torch.compiler.is_exporting():
                raise


def _children_in_sequence(model: nn.Module, graph: fx.Graph) -> list[str]:
    """Return the children that the graph calls, if these are the first in their order, each fed by the one before it.

    Empty if the graph does anything else.
    """
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    children = [name for name, _ in model.named_children()][: len(calls)]
    called = [node.target if node.op == "call_module" else None for node in calls]
    in_sequence = called == children and all(node.args == (node.prev,) and not node.kwargs for node in calls)
    return children if in_sequence else []


def _check_reached(return_layers: Mapping[str, str], outputs: Collection[str]) -> None:
    missing = [path for path, name in return_layers.items() if name not in outputs]
    if missing:
        raise ValueError(f"`return_layers` must name layers that the forward calls, it never called {missing}")
