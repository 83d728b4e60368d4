"""Weights of a library whose names are not known, renamed by their order."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from detr_backbone.errors import WeightsError
from detr_backbone.weights.read import read_weights


def rename_in_order(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a weights file under the keys of a network that holds the same ones in the same order.

    Libraries name the layers of one architecture differently, and mostly build them in the same order. Every tensor is
    checked for its shape and for the last part of its key, such as "running_var"; what the file holds after the last
    of them, such as a classifier, is left out.

    Args:
        path: the file, as `read_weights` reads it.
        own: the network's state.

    Raises:
        WeightsError: the file cannot be read, or a tensor is not the one at its index in the network.
    """
    state = read_weights(path).tensors
    renamed: dict[str, Tensor] = {}
    for (key, tensor), (own_key, own_tensor) in zip(state.items(), own.items(), strict=False):
        same = key.rpartition(".")[2] == own_key.rpartition(".")[2] and tensor.shape == own_tensor.shape
        if not same:
            raise WeightsError(
                f"weights in another order | where: file={path} key={key} | got {list(tensor.shape)} | expected "
                f"{own_key} {list(own_tensor.shape)}"
            )
        renamed[own_key] = tensor
    if len(renamed) < len(own):
        raise WeightsError(f"weights lack tensors | where: file={path} | got {len(renamed)} | expected {len(own)}")
    return renamed
