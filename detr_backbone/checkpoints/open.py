"""A published detector, ready to predict: built from its file, with the categories it knows."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from detr_backbone.checkpoints.categories import COCO_PANOPTIC_CLASSES, UNUSED, class_names
from detr_backbone.checkpoints.config import detector_config
from detr_backbone.checkpoints.detector_file import DetectorFile, read_detector
from detr_backbone.checkpoints.layouts import is_deformable
from detr_backbone.checkpoints.load import LoadReport, load_detector
from detr_backbone.detectors import DETR, DeformableDETR, DetectorConfig, build_detector
from detr_backbone.padding.exact import Padding


@dataclass(frozen=True, kw_only=True)
class OpenedDetector:
    """A published detector.

    Attributes:
        model: in eval mode.
        config: what it was built from; `build_postprocess(config, category_ids=category_ids)` reads its outputs.
        category_ids: the dataset's category id of each class, such as COCO's 1 to 90.
        category_names: the name of each class; "class 3" where nothing tells it.
        report: what was loaded.
    """

    model: DETR | DeformableDETR
    config: DetectorConfig
    category_ids: tuple[int, ...]
    category_names: tuple[str, ...]
    report: LoadReport

    @property
    def categories(self) -> dict[int, str]:
        """Category id -> name, in the order of the classes."""
        return dict(zip(self.category_ids, self.category_names, strict=True))


def open_detector(weights: str, *, padding: Padding = "exact") -> OpenedDetector:
    """Return the detector of a published file, a folder of transformers or a name such as "detr_r50".

    Classes that no category stands for ("N/A": 11 of the 91 of COCO's detectors) are left out of the class head, so
    that a class is one of the dataset's categories. Scores of a sigmoid do not change by it; those of a softmax lose
    only what it gave to classes that never occur.

    Args:
        weights: as `read_detector` takes it.
        padding: of the backbone: "zeros" computes what the original code computes in a padded batch.

    Raises:
        WeightsError: the file cannot be read, or it is not completely a detector that is known here.
    """
    source = read_detector(weights)
    names = class_names(source.file, source.num_classes) or tuple(f"class {n}" for n in range(source.num_classes))
    used = [label for label, name in enumerate(names) if name != UNUSED]
    if source.num_classes == COCO_PANOPTIC_CLASSES:
        used = list(range(source.num_classes))  # things compete with stuff
    source = _select_classes(source, used)
    config = detector_config(source, padding=padding)
    model = build_detector(config)
    report = load_detector(model, source)
    told = source.file.extras.get("category_ids")
    return OpenedDetector(
        model=model.eval(),
        config=config,
        category_ids=tuple(told) if told else tuple(used),
        category_names=tuple(names[label] for label in used),
        report=report,
    )


def _select_classes(source: DetectorFile, used: list[int]) -> DetectorFile:
    background = [] if is_deformable(source.state) else [source.num_classes]
    if len(used) == source.num_classes:
        return source
    state: Mapping[str, Tensor] = {
        key: tensor[used + background] if "class_embed." in key else tensor for key, tensor in source.state.items()
    }
    return replace(source, state=state)
