"""Weights, images and targets that anyone can draw again, and the published numbers they led to.

`detr.npz` and `deformable_detr.npz` hold what the original DETR and Deformable DETR computed in float32 on a CPU for
the weights, images and targets drawn here. Weights are drawn per state-dict key, so equal outputs also prove the key
layout. Array names are `case/batch/what`.
"""

import functools
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detr_backbone.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

BATCHES = {
    "padded": [(96, 128), (64, 160)],
    "odd": [(97, 131)],
    "oddpadded": [(97, 131), (65, 170)],
}
NUM_CLASSES = 5
NUM_BOXES = (3, 0)  # of the first and of the second image


def drawn_state(module: nn.Module) -> dict[str, Tensor]:
    """A state dict for `module`, every floating tensor drawn from a generator that its key seeds."""
    state = module.state_dict()
    return {key: _drawn(key, value.shape) if value.is_floating_point() else value for key, value in state.items()}


def load_drawn(module: nn.Module) -> None:
    """Give `module` its drawn weights; where it holds one tensor under several keys, the last key wins."""
    module.load_state_dict(drawn_state(module))


def drawn_batch(name: str) -> NestedTensor:
    """The images of a batch of `BATCHES`, padded with zeros."""
    images = [np.random.default_rng(100 + i).normal(0, 1, (3, *size)) for i, size in enumerate(BATCHES[name])]
    return nested_tensor_from_tensor_list([torch.from_numpy(image).float() for image in images])


def drawn_targets(name: str) -> list[dict[str, Any]]:
    """The targets of a batch: `boxes` [N, 4] cxcywh as a share of the image, `labels` [N], `image_id`."""
    targets = []
    for i in range(len(BATCHES[name])):
        g, n = np.random.default_rng(200 + i), NUM_BOXES[i]
        boxes = np.concatenate([g.uniform(0.3, 0.7, (n, 2)), g.uniform(0.1, 0.5, (n, 2))], axis=1)
        labels = g.integers(0, NUM_CLASSES, n)
        targets.append({"boxes": torch.from_numpy(boxes).float(), "labels": torch.from_numpy(labels), "image_id": i})
    return targets


@functools.cache
def published(name: str) -> Mapping[str, np.ndarray]:
    """All arrays of `detr` or `deformable_detr`, by name."""
    with np.load(Path(__file__).with_name(f"{name}.npz")) as archive:
        return {key: archive[key] for key in archive.files}


def assert_reproduced(
    name: str,
    prefix: str,
    computed: Mapping[str, Any],
    *,
    rtol: float = 1e-4,
    looser: Mapping[str, float] | None = None,
) -> None:
    """Every published array under `prefix`, and nothing else, is in `computed` and equal within `rtol` of its largest.

    Args:
        name: `detr` or `deformable_detr`.
        prefix: as `detr_r18/odd/`.
        computed: tensors, arrays or numbers by the rest of the name, as `pred_boxes`.
        rtol: of the largest magnitude in the array, for sums in another order; booleans and integers must be equal.
        looser: other tolerances, by the rest of the name.
    """
    expected = {key.removeprefix(prefix): value for key, value in published(name).items() if key.startswith(prefix)}
    assert set(computed) == set(expected)
    for what, value in expected.items():
        got = computed[what].detach().numpy() if isinstance(computed[what], Tensor) else np.asarray(computed[what])
        assert got.shape == value.shape, what
        exact = value.dtype.kind != "f"
        atol = 0 if exact or not value.size else (looser or {}).get(what, rtol) * np.abs(value).max()
        np.testing.assert_allclose(got, value, rtol=0, atol=atol, err_msg=prefix + what)


@functools.cache  # the backbone is the same in all cases
def _drawn(key: str, shape: tuple[int, ...]) -> Tensor:
    g = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("running_var"):
        value = g.uniform(0.5, 1.5, shape)
    elif key.endswith("running_mean"):
        value = g.normal(0, 0.1, shape)
    elif len(shape) < 2:
        value = g.uniform(0.8, 1.2, shape) if key.endswith("weight") else g.normal(0, 0.05, shape)
    else:
        value = g.normal(0, 1, shape) / math.sqrt(math.prod(shape[1:]))
    return torch.as_tensor(value, dtype=torch.float32)
