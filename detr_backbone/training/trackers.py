"""Experiment trackers by name: TensorBoard, Weights & Biases, MLflow, through Accelerate."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from detr_backbone.errors import ConfigError
from detr_backbone.training.config import TrainConfig, config_to_dict, flat

if TYPE_CHECKING:
    from accelerate import Accelerator

_LIBRARIES: Mapping[str, Sequence[str]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


def require_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose library is not installed; Accelerate would leave it out with a line in its log.

    Raises:
        ConfigError: naming the tracker and the package.
    """
    for name in names:
        if not any(find_spec(library) for library in _LIBRARIES[name]):
            package = _LIBRARIES[name][0]
            raise ConfigError(
                f"tracker is not installed | where: key=trackers | got {name} | fix: pip install {package}"
            )


def start_trackers(accelerator: "Accelerator", config: TrainConfig) -> None:
    """Open the run in every tracker, with its configuration."""
    if config.trackers:
        settings = {
            key: value if isinstance(value, int | float | str) else str(value)
            for key, value in flat(config_to_dict(config))
        }
        accelerator.init_trackers("detr_backbone", config=settings)


def track(accelerator: "Accelerator", row: Mapping[str, float]) -> None:
    """Hand a row of `metrics.csv` to every tracker, by its step."""
    accelerator.log({key: value for key, value in row.items() if key != "step"}, step=int(row["step"]))
