"""Dry run of a network on the meta device: what its layers take and give, as shapes, without computing anything."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from detr_backbone.errors import ConfigError
from detr_backbone.forward_pass import evaluating, hooked
from detr_backbone.nested_tensor import Size
from detr_backbone.networks.dataflow import Dataflow, Value
from detr_backbone.networks.input_channels import first_convolution
from detr_backbone.networks.meta_operators import RememberedOperators

PROBE: Size = (256, 320)
"""(h, w) of the image: every stride that divides both is measured exactly."""


@dataclass(kw_only=True)
class Call:
    """The first call of a layer.

    Attributes:
        start, end: when it began and returned, on a clock that counts such events; `end` is 0 if it did not return.
        input_shape, output_shape: of its first input and of its output; None where that is no tensor.
        count: how often the layer is called in the whole pass.
        input_shapes: of the first inputs of all its calls.
    """

    start: int
    end: int = 0
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    input_shapes: set[tuple[int, ...]] = field(default_factory=set)
    count: int = 1


class DryRun:
    """The calls of a network's layers during one forward in eval mode.

    Args:
        network: takes one batch of images [B, C, H, W]; it stays as it is.
        size: (h, w) of the image that it is run with.

    Attributes:
        calls: of each inner layer that was called, by path, in the order in which they began.
        error: what the forward raised, such as a classifier at an image of a size that it was not made for.
        dataflow: of the operators.
        inputs, outputs: the first input, and the output, of all calls of a layer, by path, where that is a tensor.

    Raises:
        ConfigError: the network has no convolution.
    """

    def __init__(self, network: nn.Module, size: Size = PROBE) -> None:
        self.size = size
        self.calls: dict[str, Call] = {}
        self.error: Exception | None = None
        self.dataflow = Dataflow()
        self.inputs: dict[str, list[Value]] = {}
        self.outputs: dict[str, list[Value]] = {}
        self._run(network)

    def reached(self, path: str) -> Call:
        """Return the call of a layer.

        Raises:
            ConfigError: the forward did not get there.
        """
        call = self.calls.get(path)
        if call is None or not call.end:
            self.refuse_error()
            raise ConfigError(f"the forward must call {path}, got a network that never does")
        return call

    def refuse_error(self) -> None:
        """Refuse a network whose forward fails.

        Raises:
            ConfigError: the message says with what.
        """
        if self.error is not None:
            height, width = self.size
            raise ConfigError(
                f"the network must take images of any size, got for {height} x {width} pixels: {self.error}"
            ) from self.error

    def outputs_of(self, paths: Collection[str]) -> set[Value]:
        """Return what the layers of these paths give."""
        return {value for path in paths for value in self.outputs.get(path, ())}

    def sole_readers(self, returned: Collection[str]) -> dict[str, str]:
        """Return, for each layer whose output only one other layer reads, that layer; both are called once.

        Args:
            returned: paths of layers whose outputs are read by the caller too.
        """
        returned_values = self.outputs_of(returned)
        # The innermost layer returns first: a Sequential gives the output of its last layer.
        makers: dict[Value, str] = {}
        for path, outputs in self.outputs.items():
            if len(outputs) == 1:
                makers.setdefault(outputs[0], path)
        return {
            makers[inputs[0]]: path
            for path, inputs in self.inputs.items()
            if len(inputs) == 1
            and self.calls[path].count == 1
            and inputs[0] in makers
            and inputs[0] not in returned_values
            and len(self.dataflow.readers(inputs[0])) == 1
        }

    def _run(self, network: nn.Module) -> None:
        _, first = first_convolution(network)
        meta = {name: tensor.to("meta") for name, tensor in [*network.named_parameters(), *network.named_buffers()]}
        image = torch.empty(1, first.in_channels, *self.size, device="meta", dtype=first.weight.dtype)
        modules = {path: module for path, module in network.named_modules() if path}
        with (
            torch.no_grad(),
            evaluating(network),
            hooked(modules, before=self._enter, after=self._leave),
            RememberedOperators(),  # type: ignore[no-untyped-call]
            self.dataflow,
        ):
            try:
                output = torch.func.functional_call(network, meta, (image,))
            except Exception as error:  # whatever a network raises at an image that it was not made for
                self.error = error
            else:
                self.dataflow.read(output)
                del output
        self.dataflow.forget_tensors()

    def _enter(self, path: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        time = self.dataflow.tick()
        first = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
        shape = None if first is None else tuple(first.shape)
        if path in self.calls:
            self.calls[path].count += 1
        else:
            self.calls[path] = Call(start=time, input_shape=shape)
        if first is not None:
            self.calls[path].input_shapes.add(tuple(first.shape))
            self.inputs.setdefault(path, []).append(self.dataflow.value(first))

    def _leave(self, path: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        time = self.dataflow.tick()
        call = self.calls[path]
        if not call.end:
            call.end = time
            call.output_shape = tuple(output.shape) if isinstance(output, Tensor) else None
        if isinstance(output, Tensor):
            self.outputs.setdefault(path, []).append(self.dataflow.value(output))
