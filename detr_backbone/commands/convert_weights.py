"""`detr-backbone convert-weights`."""

from pathlib import Path

from detr_backbone.checkpoints.layouts import Names
from detr_backbone.checkpoints.write import convert_weights, write_weights
from detr_backbone.commands.command_line import Command, output_file, require
from detr_backbone.errors import ConfigError
from detr_backbone.networks.build import build_network
from detr_backbone.weights.locate import locate_weights
from detr_backbone.weights.read import read_weights
from detr_backbone.weights.rename import rename_in_order
from detr_backbone.weights.resnet_keys import ResNetLayout


def main(
    *,
    source: str,
    output: str,
    names: Names = "original",
    resnet: ResNetLayout = "torchvision",
    name: str | None = None,
) -> None:
    """Write the weights of a detector or a network under the names of another library.

    Args:
        source: a file or folder, a published detector such as detr_r50, or hf-hub:OWNER/NAME@REVISION.
        output: the file to write; .safetensors writes safetensors, any other ending what torch.save writes.
        names: of a detector: original, huggingface (files of transformers), huggingface_modules (transformers 5).
        resnet: of a ResNet, alone or in a detector: torchvision, detectron2, huggingface or presnet.
        name: a network, as in `detector.backbone.name`, that holds the tensors of `source` in the same order under
            names of its own, which are then written; for libraries whose names are not known here.
    """
    file = output_file(output)
    if file.suffix == ".safetensors":
        require("safetensors", extra="hub")
    path = locate_weights(source).path
    if file.resolve() == Path(path).resolve():
        raise ConfigError(f"`--output` must be another file than the source, got {output}")
    if name is not None:
        layout, renamed = "order", rename_in_order(path, build_network(name).state_dict())
    else:
        layout, renamed = convert_weights(read_weights(path).tensors, names=names, resnet=resnet)
    write_weights(renamed, file)
    print(f"{len(renamed)} tensors, found by {layout}: {output}")


COMMAND = Command(
    name="detr-backbone convert-weights",
    main=main,
    example="detr-backbone convert-weights --source detr_r50 --output out/model.safetensors --names huggingface",
)
