"""Whose pass through a network this is: a server may run one network in several threads at once."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def current_thread() -> int:
    """A key for what belongs to one pass, the same throughout it and another in every thread."""
    # Dynamo cannot trace get_ident, and what it compiles runs as a whole.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Within this context, a network is in eval mode; afterwards every module is in its own again."""
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        yield
    finally:
        network.train(modes[network])  # a layer getter passes it on to the network that it runs, which is no child
        for module, training in modes.items():
            module.training = training
