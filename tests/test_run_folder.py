"""Nothing fails late: what a run needs of its folder is known before any work, and a full disk loses nothing."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_backbone.errors import CheckpointError, ConfigError, ResourceError
from detr_backbone.training import Checkpoint, TrainConfig, config_to_dict, load_checkpoint, train
from detr_backbone.training.checkpoint import restore, save_checkpoint
from detr_backbone.training.progress import write_rows
from detr_backbone.training.run_folder import CHECKPOINT, METRICS, RunFolder


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        model={"weight": torch.full((1000,), float(step))},
        optimizer={},
        schedule={},
        step=step,
        epoch=0,
        images_per_step=1,
        seconds=0.0,
        losses={},
        rows=[],
        threshold=None,
        config=config_to_dict(TrainConfig()),
        category_ids=(1,),
        category_names=("cat",),
    )


def test_a_file_where_the_folder_should_be_is_named_before_any_data_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(ConfigError, match=rf"key=output_dir file={tmp_path / place} \| got \w+"):
            train(TrainConfig(output_dir=str(tmp_path / place)))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody may write into")
def test_a_folder_that_cannot_be_written_is_named_before_any_data_is_read() -> None:
    with pytest.raises(ConfigError, match=r"key=output_dir file=/proc/self/run \| got"):
        train(TrainConfig(output_dir="/proc/self/run"))


def test_a_folder_is_of_one_run_at_a_time(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path, keep=2), RunFolder(tmp_path, keep=2)
    with first.claim(), pytest.raises(ConfigError, match=rf"another run .* key=output_dir file={tmp_path}"):
        second.claim().__enter__()
    with second.claim():
        pass


def test_too_little_space_names_what_is_needed_and_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1999)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    folder = RunFolder(tmp_path, keep=2)

    folder.require_space(999)
    with pytest.raises(ConfigError, match=r"got 1,999 bytes free expected 2,000"):
        folder.require_space(1000)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(checkpoint(1), tmp_path / CHECKPOINT)
    (tmp_path / "checkpoint.partial").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"file=.*checkpoint\.pt \| got .*No space .* 4,000 bytes") as error:
        save_checkpoint(checkpoint(2), tmp_path / CHECKPOINT)

    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT]
    assert load_checkpoint(tmp_path / CHECKPOINT).step == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_full_disk_leaves_the_table_as_it_was(tmp_path: Path) -> None:
    write_rows([{"epoch": 1}], tmp_path / METRICS)
    before = (tmp_path / METRICS).read_bytes()
    (tmp_path / "metrics.partial").symlink_to("/dev/full")
    with pytest.raises(ResourceError, match=rf"file={tmp_path / METRICS} \| got No space left on device \| fix"):
        write_rows([{"epoch": 1}, {"epoch": 2}], tmp_path / METRICS)

    assert [file.name for file in tmp_path.iterdir()] == [METRICS]
    assert (tmp_path / METRICS).read_bytes() == before


def test_the_checkpoints_before_the_newest_move_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, keep=3)
    for step in (1, 2, 3, 4, 4):  # the last is a later state of the same step
        folder.save(checkpoint(step))

    assert [load_checkpoint(file).step for file in folder.files()] == [4, 3, 2]


def test_the_newest_whole_checkpoint_is_chosen_and_damage_said(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, keep=3)
    for step in (1, 2, 3):
        folder.save(checkpoint(step))
    torn = folder.newest.read_bytes()[:-100]
    folder.newest.unlink()
    folder.newest.write_bytes(torn)
    found, damaged = folder.newest_valid()

    assert found.step == 2
    assert len(damaged) == 1
    assert f"file={folder.newest}" in damaged[0]


def test_a_folder_of_damaged_checkpoints_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, keep=2)
    folder.newest.write_bytes(b"PK torn")

    with pytest.raises(CheckpointError, match=f"file={folder.newest}"):
        folder.newest_valid()


def test_a_kill_between_two_names_leaves_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path, keep=2)
    folder.save(checkpoint(1))

    def die(*_: Any) -> None:
        raise SystemError

    monkeypatch.setattr("detr_backbone.training.run_folder.save_checkpoint", die)
    with pytest.raises(SystemError):
        folder.save(checkpoint(2))
    assert folder.newest_valid()[0].step == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [([3, 1], "a moment of \\[1, 3\\] expected \\[1, 2\\]"), ([2, 3, 1], "doesn't match the size")],
)
def test_the_optimiser_of_another_detector_is_refused_before_its_first_step(other: list[int], message: str) -> None:
    def trained(*widths: int) -> tuple[torch.nn.Module, torch.optim.AdamW]:
        layers = [torch.nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)]
        optimizer = torch.optim.AdamW(torch.nn.ModuleList(layers).parameters())
        sum(layer.weight.sum() for layer in layers).backward()
        optimizer.step()
        return torch.nn.Sequential(*layers), optimizer

    model, optimizer = trained(2, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, float)
    swapped = replace(checkpoint(1), model=model.state_dict(), optimizer=trained(*other)[1].state_dict())
    with pytest.raises(CheckpointError, match=rf"key=optimizer \| got .*{message}"):
        restore(swapped, model, optimizer, schedule)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from detr_backbone.training.checkpoint import load_model

    model = torch.nn.Linear(1, 1)
    bad = replace(checkpoint(1), model={"weight": torch.tensor([[float("nan")]]), "bias": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="key=weight"):
        load_model(bad, model)
