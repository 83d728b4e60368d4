"""What holds during one forward pass of a network: its mode, the hooks that watch it, and the state of its thread."""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from detr_backbone.nested_tensor import NestedTensor

State = TypeVar("State")


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Within this context, a network is in eval mode; afterwards every module is in its own again."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        network.eval()
        yield
    finally:
        for module, mode in modes:  # parents first; train() rather than the flag, as a getter passes it on
            module.train(mode)


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module],
    *,
    before: Callable[..., Any] | None = None,
    after: Callable[..., Any] | None = None,
    first: bool = False,
    with_kwargs: bool = False,
) -> Iterator[None]:
    """Within this context, hooks see every call of some modules.

    Args:
        modules: the modules by path.
        before: called with path, module and positional inputs; what it returns, if anything, replaces the inputs.
        after: called with path, module, positional inputs and output; what it returns, if anything, replaces the
            output.
        first: call them before all other hooks of a module, instead of after them.
        with_kwargs: keyword inputs follow the positional ones, and `before` returns both.
    """
    options = {"prepend": first, "with_kwargs": with_kwargs}
    with ExitStack() as stack:
        for path, module in modules.items():
            if before is not None:
                stack.callback(module.register_forward_pre_hook(partial(before, path), **options).remove)
            if after is not None:
                stack.callback(module.register_forward_hook(partial(after, path), **options).remove)
        yield


def is_transformed() -> bool:
    """Return whether operators are recorded, as by torch.export and TorchScript, or transformed, as by vmap."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return True
    return bool(torch._C._are_functorch_transforms_active())


def is_watched(network: nn.Module, *, own: Collection[Callable[..., Any]]) -> bool:
    """Return whether forward hooks see what the modules of a network take and return.

    Args:
        network: the network.
        own: functions and methods that do not count.
    """
    hooks = [
        hook
        for module in network.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ]
    return has_global_hooks() or any(_function(hook) not in own for hook in hooks)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks of its own, on what it takes or returns or on their gradients."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def has_global_hooks() -> bool:
    """Return whether hooks are registered for every module there is."""
    return bool(nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


def _function(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of a method or of a partial of either."""
    if isinstance(hook, partial):
        hook = hook.func
    return getattr(hook, "__func__", hook)


@dataclass(frozen=True)
class Pass:
    """State of one pass of a backbone, read by its layers.

    Attributes:
        padded: the batch whose padded cells are zeroed before every window; None if nothing is padded.
        norms: by path the FrozenBatchNorm2d whose work the convolutions before them do.
        fuses: whether convolutions that are fused for inference run together with the sums and ReLUs behind them.
    """

    padded: NestedTensor | None = None
    norms: Mapping[str, "FoldedNorm"] = field(default_factory=dict)
    fuses: bool = False


class FoldedNorm(NamedTuple):
    """A FrozenBatchNorm2d, and what it multiplies each channel by and adds then: two tensors [C]."""

    module: nn.Module
    scale: Tensor
    shift: Tensor


class PerThread(Generic[State]):
    """State of the forward pass that a thread is in: a server may run one network in several threads at once.

    A pass within a pass has state of its own, and ends by restoring that of the pass around it. Copies and pickles hold
    no state.

    >>> state = PerThread[str]()
    >>> with state.set("outer"):
    ...     with state.set("inner"):
    ...         inner = state.get()
    ...     inner, state.get()
    ('inner', 'outer')
    >>> state.get() is None
    True
    """

    def __init__(self) -> None:
        self._states: dict[int, State] = {}

    def get(self) -> State | None:
        """Return the state of this thread's pass; None outside of one."""
        return self._states.get(_thread())

    def set(self, state: State | None) -> "_Within[State]":
        """Return a context in which this thread has a state; it can be entered again and again, by any thread."""
        return _Within(self._states, state)

    def __getstate__(self) -> dict[str, Any]:
        return {"_states": {}}


class _Within(Generic[State]):
    # A class, and not a generator: torch.compile follows it, and a checkpointed layer enters it twice.
    def __init__(self, states: dict[int, State], state: State | None) -> None:
        self._states = states
        self._state = state
        self._outer: list[State | None] = []

    def __enter__(self) -> None:
        self._outer.append(self._states.get(_thread()))
        self._put(self._state)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put(self._outer.pop())

    def _put(self, state: State | None) -> None:
        if state is None:
            self._states.pop(_thread(), None)
        else:
            self._states[_thread()] = state


def _thread() -> int:
    # Dynamo cannot trace get_ident, and what it compiles runs as a whole.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
