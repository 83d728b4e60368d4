"""Training and using a detector: the one place where the data side and the model side meet."""

from detr_backbone.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from detr_backbone.training.config import (
    TrainConfig,
    config_from_dict,
    config_parser,
    config_to_dict,
    parse_config,
)
from detr_backbone.training.data import DataConfig, SplitConfig, open_split
from detr_backbone.training.devices import build_accelerator
from detr_backbone.training.engine import train
from detr_backbone.training.inference import detector_of, evaluate
from detr_backbone.training.normalisation import check_normalisation
from detr_backbone.training.optimizer import OptimizerConfig
from detr_backbone.training.signals import Stopped

__all__ = [
    "Checkpoint",
    "DataConfig",
    "OptimizerConfig",
    "SplitConfig",
    "Stopped",
    "TrainConfig",
    "build_accelerator",
    "check_normalisation",
    "config_from_dict",
    "config_parser",
    "config_to_dict",
    "detector_of",
    "evaluate",
    "load_checkpoint",
    "open_split",
    "parse_config",
    "save_checkpoint",
    "train",
]
