"""`detr-backbone export`."""

from pathlib import Path
from tempfile import TemporaryDirectory

from detr_backbone.coco.dataset import CocoDetection
from detr_backbone.commands.command_line import Command, output_file, require
from detr_backbone.errors import ConfigError
from detr_backbone.export import ENGINES
from detr_backbone.training import SplitConfig, TrainConfig, open_split
from detr_backbone.training.exported import export_checkpoint, open_exported_detector, quantize_detector

AS_TRAINED = SplitConfig()


def main(
    *,
    checkpoint: str,
    output: str,
    masks: bool = False,
    int8: bool = False,
    calibration: SplitConfig = AS_TRAINED,
    validation: SplitConfig = AS_TRAINED,
    calibration_images: int = 300,
    max_loss: float = 0.01,
    allow_loss: bool = False,
) -> None:
    """Write the detector of a checkpoint as ONNX, for OpenVINO or as .pt2, and check the file against it.

    Args:
        checkpoint: the trained detector.
        output: the file, ending in .onnx, .xml (OpenVINO, with the weights beside it in .bin) or .pt2.
        masks: let the graph take whole padded batches with their mask, for servers that batch.
        int8: compute in int8, for OpenVINO; AP before and after is measured and written into the file.
        calibration: for int8, what ranges are measured on; the training split of the checkpoint if left out.
        validation: for int8, what AP is measured on; the validation split of the checkpoint if left out.
        calibration_images: for int8, how many images of `calibration` are taken, at random with a fixed seed.
        max_loss: for int8, by how much AP may fall, as a fraction: 0.01 is one point.
        allow_loss: for int8, keep the file whatever AP it has.
    """
    output_file(output)
    if Path(output).suffix not in ENGINES:
        raise ConfigError(f"`--output` must end in {', '.join(ENGINES)}, got {output}")
    if not int8:
        for key, given in (("calibration", calibration), ("validation", validation)):
            if given != AS_TRAINED:
                raise ConfigError(f"`--{key}` is read with --int8 only, got --{key}")
        print(export_checkpoint(checkpoint, output, masks=masks))
        return
    if masks or Path(output).suffix != ".xml":
        raise ConfigError(f"`--int8` needs an --output that ends in .xml, without --masks, got {output}, masks={masks}")
    require("accelerate", extra="train")
    with TemporaryDirectory() as folder:
        source = Path(folder) / "float32.xml"
        print(export_checkpoint(checkpoint, source))
        _, config = open_exported_detector(source)
        _, cost = quantize_detector(
            source,
            output,
            calibration=_open(config, config.data.train if calibration == AS_TRAINED else calibration),
            validation=_open(config, config.data.val if validation == AS_TRAINED else validation),
            calibration_images=calibration_images,
            max_loss=max_loss,
            allow_loss=allow_loss,
        )
    print(f"{output}: int8, {cost}")


def _open(config: TrainConfig, split: SplitConfig) -> CocoDetection:
    return open_split(config.data, split, train=False)


COMMAND = Command(
    name="detr-backbone export",
    main=main,
    example="detr-backbone export --checkpoint runs/shapes/checkpoint.pt --output shapes.onnx\n"
    "detr-backbone export --checkpoint runs/shapes/checkpoint.pt --output shapes.xml --int8 true",
)
