"""Weights under a network's own keys: python scripts/convert_weights.py --source F --name timm/N --output G."""

from pathlib import Path

import torch

from detr_backbone.networks.build import build_network
from detr_backbone.networks.weights import rename_in_order
from detr_backbone.training import parse_options, plain_errors


def main(*, source: str, name: str, output: str) -> None:
    """Rename the tensors of a weights file to the keys of a network that lists the same tensors in the same order.

    Args:
        source: the file, as other code saved it.
        name: the network, as in `detector.backbone.name`.
        output: the file to write, for `detector.backbone.weights`.
    """
    own = build_network(name).state_dict()
    renamed = rename_in_order(Path(source), own)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    torch.save(renamed, output)
    print(f"{len(renamed)} tensors: {output}")


if __name__ == "__main__":
    with plain_errors():
        main(**parse_options(main))
