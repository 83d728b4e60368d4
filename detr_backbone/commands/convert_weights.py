"""`detr-backbone convert-weights`."""

from pathlib import Path

import torch

from detr_backbone.commands.command_line import Command, output_file
from detr_backbone.networks.build import build_network
from detr_backbone.weights.rename import rename_in_order


def main(*, source: str, name: str, output: str) -> None:
    """Rename the tensors of a weights file to the keys of a network that lists the same tensors in the same order.

    Args:
        source: the file, as other code saved it.
        name: the network, as in `detector.backbone.name`.
        output: the file to write, for `detector.backbone.weights`.
    """
    file = output_file(output)
    own = build_network(name).state_dict()
    renamed = rename_in_order(Path(source), own)
    torch.save(renamed, file)
    print(f"{len(renamed)} tensors: {output}")


COMMAND = Command(
    name="detr-backbone convert-weights",
    main=main,
    example="detr-backbone convert-weights --source published.pth --name timm/tf_efficientnet_lite0 --output own.pth",
)
