"""Contrastive denoising: in training, queries that start from noised targets learn to restore them or to say no object.

They come before the matching queries. No matching query attends to them, and no group of them to another group, so the
predictions of matching queries are those of a detector without them.

Beside the package's axis letters: G groups, M targets of the image with the most, N = G * 2 * M noised queries. In a
group come the positive queries of all targets, then the negative ones.

Source: "DINO" (https://arxiv.org/abs/2203.03605), section 3.3.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detr_backbone.detectors.matcher import Target
from detr_backbone.detectors.targets import targets_on
from detr_backbone.errors import ConfigError

SMALLEST_SIDE = 0.01
"""Of a noised box, as a fraction of the image, so that its logit stays finite and attention samples around it."""


class NoisedQueries(NamedTuple):
    """Queries that start from noised targets."""

    content: Tensor
    """[B, N, C], the embedding of a label that may have been replaced."""
    boxes: Tensor
    """[B, N, 4] cxcywh as fractions of the image."""
    valid: Tensor
    """bool [B, N], False on what fills the batch up for images with fewer than M targets."""
    groups: int
    """G."""

    def attention_mask(self, num_queries: int) -> Tensor:
        """Return the mask of self-attention among N noised and `num_queries` matching queries.

        Returns:
            bool [B, N + Q, N + Q], True where a query does not attend to another: a matching query to a noised one, a
            noised one to one of another group, any to an invalid one but itself.
        """
        batch, noised = self.valid.shape
        device = self.valid.device
        group = torch.arange(noised, device=device) // (noised // self.groups)
        mask = torch.zeros(batch, noised + num_queries, noised + num_queries, dtype=torch.bool, device=device)
        mask[:, noised:, :noised] = True
        mask[:, :noised, :noised] = (group[:, None] != group) | ~self.valid[:, None]
        return mask & ~torch.eye(noised + num_queries, dtype=torch.bool, device=device)


class ContrastiveDenoising(nn.Module):
    """Noised queries from targets.

    Box noise moves each corner by up to half a side times `box_noise_scale` for positive queries, and by one to two
    times as much for negative ones.

    Args:
        num_classes: K.
        width: C.
        number: targets' copies in a batch that are aimed at, as pairs of a positive and a negative query: there are as
            many groups as fit, at least one, so that images of many objects do not multiply the queries.
        label_noise_ratio: twice the probability that a query's label is replaced by a random one.
        box_noise_scale: see above.

    Raises:
        ConfigError: a number is out of range.

    >>> denoising = ContrastiveDenoising(num_classes=3, width=8, number=4)
    >>> some = {"labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.1, 0.4]])}
    >>> none = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    >>> noised = denoising([some, none])
    >>> noised.groups, noised.content.shape, noised.valid.sum(dim=1)
    (2, torch.Size([2, 8, 8]), tensor([8, 0]))
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        *,
        number: int = 100,
        label_noise_ratio: float = 0.5,
        box_noise_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if number < 1:
            raise ConfigError(f"`number` must be at least 1, got {number}")
        if not 0 <= label_noise_ratio <= 1:
            raise ConfigError(f"`label_noise_ratio` must be within 0 … 1, got {label_noise_ratio}")
        if not 0 <= box_noise_scale <= 1:
            raise ConfigError(f"`box_noise_scale` must be within 0 … 1, got {box_noise_scale}")
        self.number = number
        self.label_noise_ratio = label_noise_ratio
        self.box_noise_scale = box_noise_scale
        self.label_enc = nn.Embedding(num_classes, width)

    def forward(self, targets: Sequence[Target]) -> NoisedQueries:
        """Return the noised queries of a batch; a batch without targets has one group of invalid ones.

        Random numbers are drawn on the CPU, the same for every device.

        Args:
            targets: for each image `labels` int64 [T], `boxes` [T, 4] cxcywh as fractions of the image.
        """
        targets = targets_on(torch.device("cpu"), targets)
        most = max(1, *(len(target["labels"]) for target in targets))
        groups = max(1, self.number // most)
        labels = torch.zeros(len(targets), most, dtype=torch.int64)
        boxes = torch.full((len(targets), most, 4), 0.5)
        valid = torch.zeros(len(targets), most, dtype=torch.bool)
        for index, target in enumerate(targets):
            count = len(target["labels"])
            labels[index, :count], boxes[index, :count], valid[index, :count] = target["labels"], target["boxes"], True
        copies = groups * 2
        labels, boxes, valid = labels.repeat(1, copies), boxes.repeat(1, copies, 1), valid.repeat(1, copies)
        negative = torch.arange(copies).repeat_interleave(most) % 2
        device = self.label_enc.weight.device
        # From pageable memory a non-blocking copy is safe, and does not wait for the device.
        labels, boxes, valid = (
            tensor.to(device, non_blocking=True)
            for tensor in (self._noise_labels(labels), self._noise_boxes(boxes, negative[:, None]), valid)
        )
        return NoisedQueries(self.label_enc(labels), boxes, valid, groups)

    def _noise_labels(self, labels: Tensor) -> Tensor:
        replaced = torch.rand(labels.shape) < self.label_noise_ratio / 2
        return torch.where(replaced, torch.randint(self.label_enc.num_embeddings, labels.shape), labels)

    def _noise_boxes(self, boxes: Tensor, negative: Tensor) -> Tensor:
        from torchvision.ops import box_convert

        half_sides = boxes[..., 2:].repeat(1, 1, 2) / 2
        distance = (torch.rand(boxes.shape) + negative) * self.box_noise_scale
        direction = torch.randint(2, boxes.shape) * 2 - 1
        corners = (box_convert(boxes, "cxcywh", "xyxy") + direction * distance * half_sides).clamp(0, 1)
        low, high = corners.chunk(2, dim=-1)
        # Corners that pass each other leave the least box: exchanged, they could make a negative query's that of its
        # target.
        return torch.cat([(low + high) / 2, (high - low).clamp(min=SMALLEST_SIDE)], dim=-1)


def noised_pairs(counts: Sequence[int], groups: int, layers: int) -> Tensor:
    """Return layer, image, query and target (counted through the batch) of every positive query, [4, L, G * T].

    Args:
        counts: targets of each image, T in all.
        groups: G.
        layers: L.

    >>> noised_pairs([2, 1], groups=1, layers=1)[:, 0]
    tensor([[0, 0, 0],
            [0, 0, 1],
            [0, 1, 0],
            [0, 1, 2]])
    """
    most = max(1, *counts)
    pairs, before = [], 0
    for image, count in enumerate(counts):
        target = torch.arange(count).repeat(groups)
        query = (torch.arange(groups)[:, None] * (2 * most) + torch.arange(count)).flatten()
        pairs.append(torch.stack([torch.full_like(target, image), query, target + before]))
        before += count
    one_layer = torch.cat(pairs, dim=1)
    layer = torch.arange(layers)[:, None].expand(-1, one_layer.shape[1])
    return torch.cat([layer[None], one_layer[:, None].expand(-1, layers, -1)])
