"""Where a run computes: the processes and devices that Accelerate finds, checked against what was launched."""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from detr_backbone.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator


def build_accelerator(
    mixed_precision: str = "no",
    *,
    timeout: int = 600,
    trackers: Sequence[str] = (),
    folder: Path | str | None = None,
    cpu: bool = False,
) -> "Accelerator":
    """Return the Accelerate of this process, one of those that `torchrun` started, or the only one.

    Args:
        mixed_precision: "no" or "bf16".
        timeout: seconds after which a collective that some process never joins is an error.
        trackers: names of experiment trackers that Accelerate knows.
        folder: where trackers write that write files.
        cpu: use no other device.

    Raises:
        ConfigError: Accelerate joined another number of processes than were launched; each would train for itself.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    # Left alone on a machine without accelerators, Accelerate does not join the processes of torchrun.
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=cpu or not torch.accelerator.is_available(),
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigError(f"{launched} processes were launched, Accelerate joined {accelerator.num_processes}")
    return accelerator
