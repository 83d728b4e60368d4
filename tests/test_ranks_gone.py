"""Processes of one run end together."""

import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from detr_backbone.training import TrainConfig, ranks
from tests.tiny_run import StepHook, in_two, launch, six_steps


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return six_steps(tmp_path_factory.mktemp("ranks"))


def fail_one(rank: int, how: str, started: str) -> StepHook:
    """Let rank 1 stand still, be killed, raise an error, or live and never come, in the second step; note when."""
    ranks.SILENCE = 10.0

    def hook(step: int) -> None:
        if rank == 1 and step == 2:
            Path(started).write_text(str(time.time()))
            if how == "raises":
                raise ValueError("the message of rank 1")
            if how == "sleeps":
                time.sleep(100)
            os.kill(os.getpid(), getattr(signal, how))

    return hook


@pytest.mark.parametrize(
    ("how", "code"), [("SIGSTOP", -signal.SIGKILL), ("SIGKILL", -signal.SIGKILL), ("raises", 1), ("sleeps", 1)]
)
def test_a_process_that_is_gone_ends_the_others_soon(config: TrainConfig, tmp_path: Path, how: str, code: int) -> None:
    start = time.monotonic()
    if how == "sleeps":
        config = replace(config, collective_timeout=20)
    configs = in_two(config, tmp_path / "run")
    codes, errors = launch(fail_one, configs, how, str(tmp_path / "started"))

    assert codes == [1, code]
    assert time.monotonic() - start < 60
    if how == "raises":
        assert "the message of rank 1" in errors
        assert "error: a process of the run is gone" not in errors
    if how == "sleeps":
        assert re.search(r"does not answer \| where: rank=0 \| got .*[Tt]imed out", errors), errors
    if how == "SIGSTOP":
        assert "rank 1 gave no sign of life for 10 seconds" in errors
