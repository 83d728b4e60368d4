"""Whose pass through a network this is: a server may run one network in several threads at once."""

import threading

import torch


def current_thread() -> int:
    """A key for what belongs to one pass, the same throughout it and another in every thread."""
    # Dynamo cannot trace get_ident, and what it compiles runs as a whole.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
