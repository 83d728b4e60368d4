"""Data flow of a forward: which operator reads what another one gave, and what it writes to."""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Value(NamedTuple):
    """What a tensor holds at a time.

    Attributes:
        tensor: its id.
        storage: the id of its memory, which views share.
        version: how often the memory was written to before.
    """

    tensor: int
    storage: int
    version: int


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One call of an operator of torch.

    Attributes:
        time: when it was called, on the clock of its data flow.
        function: what Python code called, such as F.relu; None if the operator was called from elsewhere, such as a
            scripted function.
        reads: all tensors among its arguments; one that is given twice stands there twice.
        gives: all tensors among its outputs.
    """

    time: int
    function: Callable[..., Any] | None
    reads: tuple[Value, ...]
    gives: tuple[Value, ...]


class Dataflow:
    """Records the operators that run within its context.

    Attributes:
        made: ids of the memory that operators allocated; that of parameters and of inputs is not in it.
        held: ids of memory that something still refers to after `forget_tensors`.
    """

    def __init__(self) -> None:
        self.made: set[int] = set()
        self.held: set[int] = set()
        self._time = 0
        self._readers: dict[Value, list[Operator | None]] = defaultdict(list)
        self._reads: dict[int, list[int]] = defaultdict(list)  # times, by memory
        self._writes: dict[int, list[int]] = defaultdict(list)
        self._alive: dict[int, Tensor] = {}  # an id is one tensor's as long as that lives
        self._modes = ExitStack()

    def tick(self) -> int:
        """Return the time, which passes with every event."""
        self._time += 1
        return self._time

    def value(self, tensor: Tensor) -> Value:
        """Return what a tensor holds now."""
        self._alive[id(tensor)] = tensor
        storage = _storage(tensor)
        return Value(id(tensor), storage, len(self._writes[storage]))

    def read(self, values: Any) -> None:
        """Let the caller read every tensor in a structure."""
        tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        self._add_reads(map(self.value, tensors), None, self.tick())

    def readers(self, value: Value) -> list[Operator | None]:
        """Return the operators that read a value, each as often as it does; None is the caller."""
        return self._readers[value]

    def is_written(self, storage: int, *, after: int, before: int) -> bool:
        """Return whether memory changes between two times."""
        return any(after < time < before for time in self._writes[storage])

    def is_read(self, storage: int, *, after: int) -> bool:
        """Return whether memory, or a view of it, is read after a time."""
        return any(time > after for time in self._reads[storage])

    def call(self, function: Callable[..., Any] | None, operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Record one call of an operator, and return what it returns."""
        time = self.tick()
        reads = tuple(map(self.value, _tensors_among((*args, *kwargs.values()))))
        output = operator(*args, **kwargs)
        for storage in {_storage(tensor) for tensor in _written(operator, args, kwargs)}:
            self._writes[storage].append(time)
        gives = tuple(map(self.value, _tensors_among((output,))))
        # What was never read before is new, unless it shares the memory of an input.
        self.made.update({value.storage for value in gives} - self._reads.keys() - {value.storage for value in reads})
        self._add_reads(reads, Operator(time=time, function=function, reads=reads, gives=gives), time)
        return output

    def forget_tensors(self) -> None:
        """Let go of all tensors, and note whose memory something else still refers to."""
        tensors = [(weakref.ref(tensor), _storage(tensor)) for tensor in self._alive.values()]
        self._alive = {}
        self.held = {storage for reference, storage in tensors if reference() is not None}

    def _add_reads(self, values: Iterable[Value], reader: Operator | None, time: int) -> None:
        for value in values:
            self._readers[value].append(reader)
            self._reads[value.storage].append(time)

    def __enter__(self) -> None:
        functions = _Functions()
        self._modes.enter_context(functions)
        self._modes.enter_context(_Operators(self, functions))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._modes.close()


class _Functions(TorchFunctionMode):
    """Knows the function of torch that Python code is calling: the outermost."""

    running: Callable[..., Any] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outer, self.running = self.running, func
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.running = outer


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, dataflow: Dataflow, functions: _Functions) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dataflow = dataflow
        self._functions = functions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._dataflow.call(self._functions.running, func, args, kwargs or {})


def _tensors_among(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among an operator's arguments or outputs, which are tensors, lists of them, or none."""
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            tensors += [entry for entry in value if isinstance(entry, Tensor)]
    return tensors


def _storage(tensor: Tensor) -> int:
    if tensor.layout != torch.strided:
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


def _written(operator: Any, args: Any, kwargs: dict[str, Any]) -> Iterable[Tensor]:
    """Return the tensors among the arguments that an operator changes in place, as its schema says."""
    arguments = operator._schema.arguments
    given = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
    return _tensors_among(value for argument, value in given if argument.alias_info and argument.alias_info.is_write)
