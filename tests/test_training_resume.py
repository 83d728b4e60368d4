"""A run that is stopped or killed anywhere ends as one that was not."""

import os
import random
import shutil
import signal
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from detr_backbone.coco.shapes import draw_shapes
from detr_backbone.errors import CheckpointError
from detr_backbone.training import OptimizerConfig, Stopped, load_checkpoint, train
from detr_backbone.training.checkpoint import save_checkpoint
from detr_backbone.training.run_folder import CHECKPOINT, METRICS, RunFolder
from detr_backbone.training.signals import StopSignals
from tests.tiny_run import StepHook, before_step, differences, launch, raise_at, tiny, twelve_steps


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twelve")
    draw_shapes(folder, train=12, val=4, image_size=64)
    return folder


@pytest.fixture(scope="module")
def straight(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of twelve steps that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(twelve_steps(shapes, folder, ema_decay=0.9))  # the average changes nothing but itself
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking beside threads
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker")  # on a machine of one core
@pytest.mark.parametrize(("name", "step", "workers"), [("SIGTERM", 4, 0), ("SIGINT", 7, 2), ("SIGHUP", 5, 0)])
def test_a_signal_loses_no_step_of_a_run_that_began_with_resume_auto(
    straight: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, step: int, workers: int
) -> None:
    config = twelve_steps(shapes, tmp_path / "run", checkpoint_every=0, resume="auto", ema_decay=0.9)
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, raise_at(step, name))
        with pytest.raises(Stopped) as end:
            train(config)

    assert end.value.code == 75
    assert capsys.readouterr().err.count("\n") == 1
    assert f"stopped by {name} " in end.value.message
    assert f"file={tmp_path / 'run' / CHECKPOINT}" in end.value.message
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT).step == step + 1
    train(replace(config, data=replace(config.data, num_workers=workers)))
    assert differences(straight, tmp_path / "run") == []


def test_ctrl_c_before_the_first_step_is_one_line(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("detr_backbone.training.engine.Run", interrupted)
    with pytest.raises(Stopped) as end:
        train(twelve_steps(shapes, tmp_path / "run"))

    assert end.value.code == 75
    assert capsys.readouterr().err == f"{end.value.message}\n"
    assert list((tmp_path / "run").iterdir()) == []


def stop_at(rank: int, step: int) -> StepHook:
    return raise_at(step, "SIGTERM")


def test_a_stopped_run_ends_with_its_workers(shapes: Path, tmp_path: Path) -> None:
    config = twelve_steps(shapes, tmp_path / "run", checkpoint_every=0)
    config = replace(config, data=replace(config.data, num_workers=1))
    codes, errors = launch(stop_at, config, 2)

    assert codes == [75]
    assert errors.splitlines()[-1].startswith("stopped by SIGTERM | go on with --resume auto")


def kill_at(rank: int, step: int) -> StepHook:
    return raise_at(step, "SIGKILL")


def kill_while_writing(rank: int, step: int) -> StepHook:
    def hook(number: int) -> None:
        if number == step:
            os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]

    return hook


@pytest.mark.parametrize("kill", [pytest.param(kill_at, marks=pytest.mark.sweep), kill_while_writing])
def test_twelve_steps_are_five_a_kill_and_seven(straight: Path, shapes: Path, tmp_path: Path, kill: Any) -> None:
    config = twelve_steps(shapes, tmp_path / "run")

    assert launch(kill, config, 5)[0] == [-signal.SIGKILL]
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT).step == 5
    train(replace(config, resume=True))
    assert differences(straight, tmp_path / "run") == []
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking beside threads
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker")  # on a machine of one core
@pytest.mark.parametrize("seed", range(20))
def test_a_kill_at_any_moment_changes_nothing(straight: Path, shapes: Path, tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    changes = {"checkpoint_every": generator.choice([1, 2, 3])}
    config = twelve_steps(shapes, tmp_path / "run", resume="auto", **changes)
    config = replace(config, data=replace(config.data, num_workers=generator.choice([0, 2])))

    assert launch(kill_soon, config, generator.randrange(12), generator.uniform(0, 0.3))[0] == [-signal.SIGKILL]
    train(config)
    assert differences(straight, tmp_path / "run") == []


def kill_soon(rank: int, step: int, seconds: float) -> StepHook:
    """Kill within a step, or in the writing after it, whenever the clock says so."""

    def hook(number: int) -> None:
        if number == step:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))

    return hook


def stop_one(rank: int, step: int) -> StepHook:
    """Signal one process of several, and only that one."""
    return raise_at(step if rank == 1 else -1, "SIGTERM")


def test_two_processes_stop_together_and_go_on_as_two_or_as_one(shapes: Path, tmp_path: Path) -> None:
    config = twelve_steps(shapes, tmp_path / "run", resume="auto", checkpoint_every=0)
    # Noised queries differ in number between the processes, and there are images without objects.
    options = {"two_stage": True, "query_selection": "mixed", "dn_number": 4, "label_loss": "mal"}
    config = replace(config, detector=replace(config.detector, **options))
    config = replace(config, data=replace(config.data, batch_size=1))
    whole = replace(config, output_dir=str(tmp_path / "whole"))

    assert launch(None, [whole] * 2)[0] == [0, 0]
    assert launch(stop_one, [config] * 2, 3)[0] == [75, 75]
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT).step == 4
    with pytest.raises(CheckpointError, match=r"key=data.batch_size \| got 1 over all processes expected 2 "):
        train(config)
    shutil.copytree(tmp_path / "run", tmp_path / "one")
    assert launch(None, [config] * 2)[0] == [0, 0]
    assert differences(tmp_path / "whole", tmp_path / "run") == []

    train(replace(config, output_dir=str(tmp_path / "one"), data=replace(config.data, batch_size=2)))
    whole, one = (load_checkpoint(tmp_path / name / CHECKPOINT) for name in ("whole", "one"))
    assert (one.step, one.schedule) == (whole.step, whole.schedule)  # with the learning rates of two processes


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_taken(
    straight: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = twelve_steps(shapes, tmp_path / "run")
    train(replace(config, optimizer=replace(config.optimizer, epochs=1)))
    flip_bit(tmp_path / "run" / CHECKPOINT)
    train(replace(config, resume=True))

    output = capsys.readouterr().out
    assert f"file={tmp_path / 'run' / CHECKPOINT} | got another CRC-32 than recorded in" in output
    assert "resumed after step 5 of 12" in output
    assert differences(straight, tmp_path / "run") == []


def flip_bit(path: Path) -> None:
    """Change one bit of the largest tensor in a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 1000 + largest.file_size // 2] ^= 1
    path.write_bytes(content)


def test_no_bit_of_a_checkpoint_flips_unseen(straight: Path, tmp_path: Path) -> None:
    whole = (straight / CHECKPOINT).read_bytes()
    expected = load_checkpoint(straight / CHECKPOINT)
    generator = random.Random(0)
    for _ in range(10):
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        (tmp_path / "flipped.pt").write_bytes(flipped)
        try:
            found = load_checkpoint(tmp_path / "flipped.pt")
        except CheckpointError:
            continue
        assert all(found.model[name].equal(tensor) for name, tensor in expected.model.items())  # between the records


def test_as_many_checkpoints_are_kept_as_asked_for_and_the_best(shapes: Path, tmp_path: Path) -> None:
    config = tiny(shapes, tmp_path / "run", keep_checkpoints=2, optimizer=OptimizerConfig(epochs=3, lr_drop=3))
    train(config)

    folder = RunFolder(tmp_path / "run", keep=2)
    checkpoints = {file.name: load_checkpoint(file) for file in folder.files()}
    assert {name: found.epoch for name, found in checkpoints.items() if "best" not in name} == {
        "checkpoint.pt": 3,
        "checkpoint_1.pt": 2,
    }
    precision = [row["AP"] for row in checkpoints["checkpoint.pt"].rows]
    assert checkpoints["checkpoint_best.pt"].epoch == 1 + precision.index(max(precision))
    assert 0 <= checkpoints["checkpoint.pt"].threshold <= 1


def test_a_kill_in_an_evaluation_loses_no_row(shapes: Path, tmp_path: Path) -> None:
    config = tiny(shapes, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detr_backbone.training.run.evaluate", interrupt)
        with pytest.raises(SystemError):
            train(config)
    metrics = tmp_path / "run" / "metrics.csv"
    metrics.write_text("epoch,step,sec", encoding="utf-8")  # a torn row
    train(replace(config, resume=True))

    assert [line.split(",")[:2] for line in metrics.read_text(encoding="utf-8").splitlines()] == [
        ["epoch", "step"],
        ["1", "3"],
        ["2", "6"],
    ]


def test_a_table_that_a_kill_left_behind_its_checkpoint_is_written_again(shapes: Path, tmp_path: Path) -> None:
    config = twelve_steps(shapes, tmp_path / "run", checkpoint_every=0, optimizer=OptimizerConfig(epochs=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detr_backbone.training.engine.write_rows", interrupt)
        with pytest.raises(SystemError):
            train(config)
    train(replace(config, resume=True))

    assert [line[:4] for line in (tmp_path / "run" / METRICS).read_text(encoding="utf-8").splitlines()] == [
        "epoc",
        "1,6,",
    ]


def test_minutes_make_checkpoints_too_and_seconds_go_on_counting(shapes: Path, tmp_path: Path) -> None:
    options = {"checkpoint_every": 0, "checkpoint_minutes": 1e-9, "optimizer": OptimizerConfig(epochs=1)}
    config = twelve_steps(shapes, tmp_path / "run", **options)
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, lambda step: interrupt() if step == 2 else None)
        with pytest.raises(SystemError):
            train(config)
    file = tmp_path / "run" / CHECKPOINT
    assert load_checkpoint(file).step == 2
    save_checkpoint(replace(load_checkpoint(file), seconds=5000.0), file)
    train(replace(config, resume=True))

    assert 5000 < load_checkpoint(file).rows[0]["seconds"] < 5600


def test_a_signal_that_the_program_was_started_to_ignore_stays_ignored() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "getsignal", {signal.SIGHUP: signal.SIG_IGN}.get)  # as nohup does
        handled: list[int] = []
        patch.setattr(signal, "signal", lambda number, _: handled.append(number))
        with StopSignals(""):
            pass

    assert set(handled) == {signal.SIGINT, signal.SIGTERM}


def interrupt(*_: Any) -> None:
    raise SystemError
