"""A data flow knows which operator reads a value, and when memory is written to, read again, or held."""

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_backbone.networks.dataflow import Dataflow


def test_readers_of_a_value_are_the_operators_and_the_caller_each_time_that_they_read_it() -> None:
    flow, x = Dataflow(), torch.ones(2)
    with flow:
        y = x * 2
        value = flow.value(y)
        z = y + y
        flow.read({"outputs": [y, z]})

    first, second, caller = flow.readers(value)
    assert first is second
    assert (first.function, first.gives) == (Tensor.add, (flow.value(z),))
    assert caller is None


def test_an_operator_belongs_to_what_python_code_calls() -> None:
    flow, x = Dataflow(), torch.ones(2)
    value = flow.value(x)
    with flow:
        F.relu(x)
        torch.relu(x)
        x.relu()
        x + 1

    assert [operator.function for operator in flow.readers(value)] == [F.relu, torch.relu, Tensor.relu, Tensor.add]


def test_memory_that_is_written_to_through_a_view_holds_another_value() -> None:
    flow = Dataflow()
    with flow:
        x = torch.zeros(4)
        before, start = flow.value(x), flow.tick()
        view = x[:2]
        view.add_(1)
        end = flow.tick()

    assert flow.value(view).storage == before.storage
    assert flow.value(x).version == before.version + 1
    assert flow.is_written(before.storage, after=start, before=end)
    assert not flow.is_written(before.storage, after=end, before=end + 1)
    assert flow.is_read(before.storage, after=start)
    assert not flow.is_read(before.storage, after=end)


def test_memory_is_made_by_operators_and_may_be_held_when_they_are_done() -> None:
    flow, x = Dataflow(), torch.zeros(4)
    given = flow.value(x)
    with torch.no_grad(), flow:
        view = x[:2]
        held, dropped = view + 1, view + 2
        values = [flow.value(tensor) for tensor in (view, held, dropped)]
        kept = [held[:1]]
    del held, dropped
    flow.forget_tensors()

    of_view, of_held, of_dropped = (value.storage for value in values)
    assert of_view == given.storage
    assert {of_view, of_held, of_dropped} & flow.made == {of_held, of_dropped}
    assert {of_held, of_dropped} & flow.held == {of_held}
    assert len(kept) == 1
