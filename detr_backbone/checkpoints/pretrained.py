"""Backbones and detectors with `save_pretrained`, `from_pretrained` and `push_to_hub`, by the mixin of the hub.

A folder holds `model.safetensors`, under the original names, and `config.json`, from which the module is built again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self, cast

from torch import Tensor, nn

from detr_backbone.backbone import BackboneBase, BackboneConfig, Joiner, build_backbone
from detr_backbone.checkpoints.config import dataclass_from_dict
from detr_backbone.checkpoints.load import load_detector
from detr_backbone.checkpoints.open import open_detector
from detr_backbone.checkpoints.write import write_weights
from detr_backbone.detectors import DetectorConfig, build_detector
from detr_backbone.errors import ConfigError, WeightsError
from detr_backbone.nested_tensor import NestedTensor
from detr_backbone.weights.hub import WEIGHTS, hub_folder
from detr_backbone.weights.load import check_tensor
from detr_backbone.weights.read import read_weights

try:
    from huggingface_hub import ModelHubMixin
    from huggingface_hub.constants import CONFIG_NAME
except ImportError as error:
    raise ConfigError(f"{__name__} needs huggingface_hub: pip install 'detr_backbone[hub]'") from error


class _FromFolder(ModelHubMixin):
    """The mixin, with weights of the hub as everywhere here: of a named revision, checked, with errors of one line."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, revision: str | None = None, **options: Any
    ) -> Self:
        """Return the module of a folder, or of a repository on the hub at a revision: a commit, a tag or a branch.

        Raises:
            WeightsError: there is no such folder or repository, no revision is named, or the weights do not fit.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            if revision is None:
                raise WeightsError(f"`revision` must be a commit, a tag or a branch on the hub, got None for {folder}")
            folder = hub_folder(f"{pretrained_model_name_or_path}@{revision}")
        module: Self = super().from_pretrained(folder, **options)
        return module


class PretrainedBackbone(
    Joiner, _FromFolder, library_name="detr_backbone", tags=["object-detection", "detr", "backbone"]
):
    """A `Joiner` that can be saved with its configuration, and built again from the folder or the hub.

    Args:
        backbone: its configuration, or what `config.json` holds of it.
    """

    def __init__(self, backbone: BackboneConfig | Mapping[str, Any]) -> None:
        config = backbone if isinstance(backbone, BackboneConfig) else dataclass_from_dict(BackboneConfig, backbone)
        joiner = build_backbone(config)
        super().__init__(cast(BackboneBase, joiner[0]), joiner[1])
        self.config = config

    def _save_pretrained(self, save_directory: Path) -> None:
        write_weights(self.state_dict(), save_directory / WEIGHTS)
        config = replace(self.config, weights=None)  # the folder holds them
        _write_config({"backbone": asdict(config)}, save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Self:
        file = read_weights(model_id)
        module = cls(_told(options, "backbone", model_id))
        own = module.state_dict()
        if file.tensors.keys() != own.keys():
            different = sorted(file.tensors.keys() ^ own.keys())
            raise WeightsError(
                f"weights of another backbone | where: file={file.path} key={different[0]} | got "
                f"{len(different)} tensors that only one of the file and {CONFIG_NAME} has"
            )
        for key, tensor in own.items():
            check_tensor(file.path, key, file.tensors[key], tensor)
        module.load_state_dict(dict(file.tensors))
        return module


class PretrainedDetector(nn.Module, _FromFolder, library_name="detr_backbone", tags=["object-detection", "detr"]):
    """A detector that can be saved with its configuration and categories, and built again from the folder or the hub.

    Args:
        detector: its configuration, with `num_classes`, or what `config.json` holds of it.
        category_names: the name of each class.
        category_ids: the dataset's category id of each class.

    Attributes:
        detector: the DETR or DeformableDETR that is built; the file has its keys.
    """

    def __init__(
        self,
        detector: DetectorConfig | Mapping[str, Any],
        category_names: Sequence[str] = (),
        category_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.config = (
            detector if isinstance(detector, DetectorConfig) else dataclass_from_dict(DetectorConfig, detector)
        )
        self.detector = build_detector(self.config)
        self.category_names = tuple(category_names)
        self.category_ids = tuple(category_ids)

    @classmethod
    def from_file(cls, weights: str) -> Self:
        """Return the detector of a checkpoint or a published file, as `open_detector` opens it."""
        opened = open_detector(weights)
        module = cls(opened.config, opened.category_names, opened.category_ids)
        module.detector.load_state_dict(opened.model.state_dict())
        return module

    def forward(self, images: NestedTensor | Sequence[Tensor] | Tensor) -> dict[str, Any]:
        """Predictions for every query, as the detector gives them."""
        outputs: dict[str, Any] = self.detector(images)
        return outputs

    def _save_pretrained(self, save_directory: Path) -> None:
        write_weights(self.detector.state_dict(), save_directory / WEIGHTS)
        config = replace(self.config, backbone=replace(self.config.backbone, weights=None))
        names = {"category_names": self.category_names, "category_ids": self.category_ids}
        _write_config({"detector": asdict(config), **names}, save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Self:
        categories = {key: options.get(key, ()) for key in ("category_names", "category_ids")}
        module = cls(_told(options, "detector", model_id), **categories)
        load_detector(module.detector, model_id)
        return module


def _told(options: Mapping[str, Any], key: str, path: str) -> Mapping[str, Any]:
    if not isinstance(options.get(key), Mapping):
        raise WeightsError(f"{CONFIG_NAME} lacks {key!r} | where: file={path} | fix: was it saved by this package?")
    told: Mapping[str, Any] = options[key]
    return told


def _write_config(content: Mapping[str, Any], folder: Path) -> None:
    (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
