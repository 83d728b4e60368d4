"""A detector's file, with its tensors under the original names whatever library wrote it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from detr_backbone.checkpoints.categories import folder_config
from detr_backbone.checkpoints.layouts import DetectorLayout, find_detector_layout, is_deformable, to_original
from detr_backbone.errors import WeightsError
from detr_backbone.weights.locate import IMAGENET_MEAN_STD, MeanStd, locate_weights
from detr_backbone.weights.read import WeightsFile, read_weights

HEADS = ("class_embed.", "bbox_embed.")
DECODER = "transformer.decoder."


@dataclass(frozen=True, kw_only=True)
class DetectorFile:
    """A detector's file with its tensors under the original names.

    Attributes:
        file: as it was read.
        layout: whose names it uses.
        state: its tensors under the original names; heads that are one module under several names, under all of them.
        mean_std: mean and std of the images that the weights were trained with, where known.
    """

    file: WeightsFile
    layout: DetectorLayout
    state: Mapping[str, Tensor]
    mean_std: MeanStd | None

    @property
    def num_classes(self) -> int:
        """K: the classes of its head, without "no object"."""
        deformable = is_deformable(self.state)
        head = "class_embed.0.weight" if deformable else "class_embed.weight"
        if head not in self.state:
            raise WeightsError(f"weights lack the class head | where: file={self.file.path} key={head}")
        return len(self.state[head]) - (not deformable)


def read_detector(weights: str) -> DetectorFile:
    """Return the tensors of a detector under the original names.

    Args:
        weights: a file, a folder or the name of a published detector, as `locate_weights` takes it.

    Raises:
        WeightsError: there is none, it cannot be read, or its layout is not known.
    """
    located = locate_weights(weights)
    file = _with_folder_config(read_weights(located.path))
    try:
        layout = find_detector_layout(file.tensors)
        state = _with_shared_heads(to_original(file.tensors, layout))
    except WeightsError as error:
        raise WeightsError(f"{error} | where: file={file.path}") from error
    return DetectorFile(file=file, layout=layout, state=state, mean_std=located.mean_std or _mean_std(file))


def _with_folder_config(file: WeightsFile) -> WeightsFile:
    """Return the file with what `PretrainedDetector` wrote beside it, as a checkpoint of training holds it inside."""
    config = folder_config(file)
    if not isinstance(config.get("detector"), Mapping):
        return file
    told = {key: tuple(config[key]) for key in ("category_names", "category_ids") if config.get(key)}
    return replace(file, extras={"config": config, **told})


def _with_shared_heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with heads under all their names: Deformable DETR's are shared, and files may hold them once.

    With `with_box_refine` and `two_stage` heads are the decoder's too; without, all layers share one.
    """
    complete = dict(state)
    for key, tensor in state.items():
        name = key.removeprefix(DECODER)
        if name != key and name.startswith(HEADS):
            complete.setdefault(name, tensor)
    layers = {key.split(".")[3] for key in state if key.startswith(f"{DECODER}layers.")}
    for head in HEADS:
        if not any(key.startswith(f"{head}1.") for key in complete):
            first = {key: tensor for key, tensor in complete.items() if key.startswith(f"{head}0.")}
            for layer in layers:
                complete |= {key.replace(f"{head}0.", f"{head}{layer}.", 1): tensor for key, tensor in first.items()}
    return complete


def _mean_std(file: WeightsFile) -> MeanStd | None:
    config = file.extras.get("config")
    transforms = config.get("data", {}).get("transforms", {}) if isinstance(config, Mapping) else {}
    if "mean" in transforms and "std" in transforms:  # of this package's training
        return tuple(transforms["mean"]), tuple(transforms["std"])
    processor = folder_config(file, "preprocessor_config.json")
    if "image_mean" in processor and "image_std" in processor:
        return tuple(processor["image_mean"]), tuple(processor["image_std"])
    return IMAGENET_MEAN_STD if "args" in file.extras else None  # of the original code, which knows no other
