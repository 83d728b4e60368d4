"""Every command with every kind of wrong argument: one line, the right exit code, no traceback, nothing written."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_backbone.commands.command_line import Command
from detr_backbone.commands.program import COMMANDS
from tests.processes import ROOT, Ended
from tests.processes import Command as Process

Run = Callable[..., Ended]

VALID = {
    "train": "--config tiny.yaml --output_dir out_train",
    "evaluate": "--checkpoint run/checkpoint.pt --output out_evaluate",
    "predict": "--checkpoint run/checkpoint.pt --images shapes/val --output out_predict",
    "export": "--checkpoint run/checkpoint.pt --output out_export/detector.pt2",
    "check-data": "--images shapes/val --annotations truth.json --output out_check-data/report.json",
    "convert-data": "--layout yolo --folder yolo --output out_convert-data/coco.json",
    "make-subset": "--annotations truth.json --images shapes/val --count 2 --output out_make-subset",
    "compare": "--annotations truth.json --a results.json --b results.json --output out_compare/comparison.json",
    "inspect": "--checkpoint run/checkpoint.pt --limit 1 --output out_inspect",
    "convert-weights": "--source weights.pth --name resnet18 --output out_convert-weights/weights.pth",
}
"""A command line that works; each wrong one below differs from it in one thing."""

INPUTS = {
    "--config": "a configuration",
    "--checkpoint": "a checkpoint",
    "--annotations": "JSON",
    "--a": "JSON",
    "--source": "weights",
}
BAD_FILES = ("missing.any", "", "shapes", "empty.any", "binary.any", "text.any", "list.json", 300 * "x", "\udcff.any")
"""For what must be a file of some kind: none, nothing, a folder, nothing in it, no text, no such syntax, …"""

ANY_COMMAND = (
    *("--nonsense 1", "--outptu out", "stray", "--output", "-x", "--outp out", "--=", "''", "--output ''"),
    *("--output /dev/null/below/below", f"--output {300 * 'x'}/y", "--output.folder out"),
)
"""Kinds of mistakes that every command can be given."""

PARTICULAR = {
    "train": [
        "--lr 1",
        "--optimizer.lr abc",
        "--optimizer.lr -1",
        "--optimizer.lr nan",
        "--optimizer.epochs 0",
        "--optimizer.epochs 1.5",
        "--optimizer.schedule linear",
        "--data.batch_size 0",
        "--data.num_workers -1",
        "--data.train.subset.count 0",
        "--data.train.images missing",
        "--data.val.annotations tiny.yaml",
        "--data.val.images ''",
        "--data.train.images ''",
        "--data.eval_backend numpy",
        "--detector.name yolo",
        "--detector.backbone.name resnet19",
        "--detector.backbone.weights missing.pth",
        "--detector.backbone.weights IMAGENET1K_V9",
        "--detector.backbone.return_layers layer9",
        "--detector.backbone.return_layers []",
        "--detector.backbone.in_channels 1",
        "--detector.backbone.padding reflect",
        "--detector.nheads 5",
        "--detector.num_queries 0",
        "--detector.num_classes 99",
        "--detector 5",
        "--data.transforms.std 0 1 1",
        "--data.transforms.mean 0.5",
        "--mixed_precision fp8",
        "--seed -1",
        "--resume maybe",
        "--output_dir tiny.yaml",
        "--output_dir tiny.yaml/below",
        "--output_dir run",
        "--config shpes",
    ],
    "evaluate": [
        "--config tiny.yaml",
        "--detections results.json",
        "--images shapes/val",
        "--images missing --annotations truth.json",
        "--annotations truth.json",
        "--images shapes/val --annotations others.json",
        "--intervals 1",
        "--intervals -5",
        "--intervals many",
        "--backend numpy",
        "--output tiny.yaml",
        "--report tiny.yaml",
        "--report tiny.yaml/below",
        "--subset.count 0",
        "--subset.count 99",
        "--subset.categories unicorn",
        "--subset.share 2",
        "--data.batch_size 0",
        "--data.batch_sise 4",
        "--data.transforms.eval_size 0",
        "--detector.num_queries 7",
        "--detector.backbone.name resnet34",
        "--optimizer.lr x",
        "--engine torch",
        "--threads 2",
        "--engine tensorrt",
    ],
    "export": [
        "--output out_export/detector.any",
        "--output tiny.yaml/below.pt2",
        "--int8 true",
        "--calibration.images shapes/val",
        "--calibration_images many",
        "--calibration.share 0.5",
        "--validation.annotations truth.json",
        "--max_loss x",
        "--masks maybe",
        "--allow_loss 3",
        "--checkpoint weights.pth",
        "--output out_export/detector",
        "--output run/checkpoint.pt",
        "--output shapes",
    ],
    "predict": [
        "--images missing",
        "--images empty_folder",
        "--images text.any",
        "--images truth.json",
        "--output tiny.yaml",
        "--output tiny.yaml/below",
        "--output shapes/val",
        "--threshold 1.5",
        "--threshold -1",
        "--threshold nan",
        "--threshold high",
        "--limit 0",
        "--limit -1",
        "--limit 1.5",
        "--batch_size 0",
        "--pictures gif",
        "--annotations missing.json",
        "--annotations list.json",
        "--annotations others.json",
        "--strict maybe",
        "--data.transforms.eval_size x",
        "--detector.nheads 8",
    ],
    "check-data": [
        "--config tiny.yaml",
        "--images missing",
        "--images truth.json",
        "--annotations missing.json",
        "--output shapes",
        "--output tiny.yaml/report.json",
        "--policies.box_outside ignore",
        "--policies.box_outsid drop",
        "--segmentations maybe",
        "--decode 2",
        "--workers -1",
        "--workers two",
    ],
    "convert-data": [
        "--layout coco",
        "--layout voc",
        "--layout cvat",
        "--folder missing",
        "--folder tiny.yaml",
        "--folder empty_folder",
        "--layout YOLO",
        "--folder ''",
        "--folder yolo/train",
        "--folder truth.json",
        "--split test",
        "--split ''",
        "--images missing",
        "--images empty_folder",
        "--output shapes",
        "--output truth.json",
        "--output tiny.yaml/coco.json",
        "--policies box_outside",
        "--policies.box_outside ignore",
    ],
    "make-subset": [
        "--count 0",
        "--count -1",
        "--count 99",
        "--count two",
        "--share 2",
        "--share 0.5",
        "--categories unicorn",
        "--image_ids 99",
        "--image_ids one",
        "--image_list missing.txt",
        "--min_area -1",
        "--seed -1",
        "--images missing",
        "--output shapes",
        "--output tiny.yaml",
        "--output tiny.yaml/below",
        "--pictures move",
        "--balanced maybe",
    ],
    "compare": [
        "--b missing.json",
        "--b others.json",
        "--b truth.json",
        "--b unknown_images.json",
        "--annotations results.json",
        "--resamples 1",
        "--resamples 0",
        "--resamples some",
        "--level 0",
        "--level 1",
        "--level nan",
        "--output shapes",
        "--output tiny.yaml/comparison.json",
    ],
    "inspect": [
        "--config tiny.yaml",
        "--images missing",
        "--images text.any",
        "--images empty_folder",
        "--layers layer9",
        "--layers 0",
        "--layers -1",
        "--limit 0",
        "--limit few",
        "--queries 0",
        "--output tiny.yaml",
        "--output tiny.yaml/below",
        "--data.transforms.eval_size 0",
        "--detector.nheads 8",
        "--detektor.nheads 8",
    ],
    "convert-weights": [
        "--name resnet19",
        "--name timm/nothing",
        "--name resnet34",
        "--name ''",
        "--output shapes",
        "--output tiny.yaml/weights.pth",
        "--output weights.pth",
        "--source run/checkpoint.pt",
        "--names nothing",
        "--resnet nothing",
    ],
}


def wrong_lines(name: str) -> Iterator[list[str]]:
    """Command lines that differ from a valid one in one mistake."""
    valid = shlex.split(VALID[name])
    for words in (*ANY_COMMAND, *PARTICULAR[name]):
        yield [*valid, *shlex.split(words)]
    for option in INPUTS.keys() & set(valid):
        for file in BAD_FILES:
            yield [*valid, option, file]
    for index, word in enumerate(valid):
        if word.startswith("--") and word not in ("--limit", "--count", "--output", "--output_dir"):
            yield valid[:index] + valid[index + 2 :]  # a required option left out


@pytest.fixture(scope="module")
def folder(tiny_run: Path) -> Path:
    """The run with what its commands can be given, right and wrong."""
    truth = json.loads((tiny_run / "shapes" / "annotations" / "instances_val.json").read_text(encoding="utf-8"))
    result = {"image_id": 1, "category_id": truth["categories"][0]["id"], "bbox": [1, 1, 9, 9], "score": 0.5}
    for name, content in {
        "truth.json": truth,
        "others.json": truth | {"categories": [{"id": 1, "name": "cat"}], "annotations": []},
        "results.json": [result],
        "unknown_images.json": [result | {"image_id": 99}],
        "list.json": [1, 2],
    }.items():
        (tiny_run / name).write_text(json.dumps(content), encoding="utf-8")
    for part in ("images", "labels"):
        (tiny_run / "yolo" / "train" / part).mkdir(parents=True)
    shutil.copy(tiny_run / "shapes" / "val" / "000001.png", tiny_run / "yolo" / "train" / "images" / "a.png")
    (tiny_run / "yolo" / "train" / "labels" / "a.txt").write_text("0 0.2 0.375 0.2 0.25", encoding="utf-8")
    (tiny_run / "yolo" / "data.yaml").write_text("train: ../train/images\nnames: [cat]", encoding="utf-8")
    (tiny_run / "empty.any").touch()
    (tiny_run / "binary.any").write_bytes(bytes(range(256)))
    (tiny_run / "text.any").write_text("{ : no syntax of any kind [", encoding="utf-8")
    (tiny_run / "empty_folder").mkdir()
    torch.save({"a": torch.zeros(2)}, tiny_run / "weights.pth")
    return tiny_run


@pytest.mark.parametrize("name", COMMANDS)
def test_every_mistake_is_one_line_without_a_traceback(name: str, folder: Path, command: Run) -> None:
    told, count = {}, 0
    for words in wrong_lines(name):
        count += 1
        try:
            ended = command(folder, name, *words)
        except Exception as error:  # what a user would see as a traceback
            told[shlex.join(words)] = repr(error)
            continue
        lines = ended.err.strip().splitlines()
        if name == "check-data" and ended.code == 2 and not lines:  # what it finds is its result
            lines = [line for line in ended.out.splitlines() if line.startswith("error")][:1]
        is_told = len(lines) == 1 and lines[0].startswith("error") and len(lines[0]) <= 900
        if ended.code not in (1, 2) or not is_told or re.search("weights_only|NestedArg|Config\\(", lines[0]):
            told[shlex.join(words)] = f"{ended.code}: {ended.err[-900:]}"

    assert told == {}
    assert count >= 30
    written = {path.name for path in (folder / f"out_{name}").rglob("*") if path.is_file()}
    assert written <= {"predictions.json", "report.json"}  # which say themselves what is missing


def test_a_run_without_a_validation_split_needs_no_more_than_to_leave_it_out(command: Run, folder: Path) -> None:
    words = ("--config", "tiny.yaml", "--data.val.images", "", "--data.val.annotations", "", "--dry_run", "true")
    ended = command(folder, "train", *words, "--output_dir", "no_validation")

    assert ended.code == 0, ended.err
    assert "4 images to train on, nothing to evaluate" in ended.out


OUTPUT = {
    "train": ("--output_dir", "lacks"),
    "convert-data": ("--output", "lacks.json"),
    "convert-weights": ("--output", "lacks.safetensors"),
}


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [
        *(("train", library, "train") for library in ("accelerate", "rich")),
        ("evaluate", "accelerate", "train"),
        ("predict", "matplotlib", "train"),
        *(("inspect", library, "train") for library in ("rich", "matplotlib")),
        ("convert-data", "hotcoco", "convert"),
        ("convert-weights", "safetensors", "hub"),
    ],
)
def test_a_missing_library_is_one_line_before_any_work(
    name: str, library: str, extra: str, command: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    ended = command(folder, name, *shlex.split(VALID[name]), *OUTPUT.get(name, ("--output", "lacks")))

    assert (ended.code, ended.out) == (2, "")
    assert ended.err == f'error: `{library}` is not installed | fix: pip install "detr_backbone[{extra}]"\n'
    assert [path for path in folder.glob("lacks*/**/*") if path.is_file()] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_fits_a_screen_and_shows_a_command_that_works(
    name: str, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    ended = command(ROOT, name, "--help")
    everything = command(ROOT, name, "--help-all").out

    assert ended.code == 0
    assert len(ended.out.splitlines()) <= 40
    assert f"detr-backbone {name} --" in ended.out.partition("example:")[2]
    options = re.findall(r"^  (--[a-z_.]+)(?= |$)", ended.out, re.MULTILINE)
    assert options
    assert [option for option in options if option not in everything] == []


def test_the_help_says_what_a_group_of_options_is_for_and_shows_numbers_as_people_write_them(command: Run) -> None:
    assert re.search(r"--calibration\.KEY +for int8, what ranges are", command(ROOT, "export", "--help").out)
    assert "0.85, 0.9," in " ".join(command(ROOT, "evaluate", "--help").out.split())


def test_the_overview_names_every_command(command: Run) -> None:
    ended = command(ROOT, "--help")

    assert ended.code == 0
    assert set(re.findall(r"^  ([a-z-]+)  ", ended.out, re.MULTILINE)) == set(COMMANDS)
    assert (command(ROOT).code, command(ROOT, "--version").code) == (2, 0)


def test_a_command_that_does_not_exist_names_the_nearest(command: Run) -> None:
    ended = command(ROOT, "evalute")

    assert ended.code == 2
    assert "did you mean 'evaluate'?" in ended.err


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "there/results.json"), 1, "Permission denied | where: file=there"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "out of memory"),
        (MemoryError(), 1, "out of memory"),
    ],
)
def test_what_stops_a_command_has_one_line_and_a_code(
    command: Run, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, told: str
) -> None:
    def stop(self: Command, words: object) -> int:
        raise raised

    monkeypatch.setattr(Command, "run", stop)
    ended = command(ROOT, "compare")

    assert ended.code == code
    assert ended.err.startswith("error: ")
    assert told in ended.err
    assert len(ended.err.splitlines()) == 1


def test_a_fault_of_the_program_is_not_hidden(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Command, words: object) -> int:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Command, "run", stop)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        command(ROOT, "compare")


def test_a_console_that_cannot_show_a_name_costs_no_numbers(process: Process, folder: Path) -> None:
    code = "import sys; from detr_backbone_cli import main; sys.exit(main(['train\\xe9']))"
    result = process(folder, "-c", code, PYTHONIOENCODING="ascii")

    assert result.returncode == 2
    assert "train\\xe9" in result.stderr


def test_an_output_that_nobody_reads_is_no_traceback(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    help_of_all = [sys.executable, "-m", "detr_backbone_cli", "--help"]
    options: dict[str, Any] = {
        "cwd": tmp_path,
        "env": os.environ | {"PYTHONPATH": str(ROOT)},
        "stderr": subprocess.PIPE,
    }
    broken = subprocess.run(help_of_all, stdout=writer, check=False, **options)
    os.close(writer)
    closed = subprocess.run(["sh", "-c", 'exec "$0" "$@" >&-', *help_of_all], check=False, **options)

    assert (broken.returncode, broken.stderr) == (1, b"")
    assert (closed.returncode, closed.stderr) == (0, b"")


@pytest.mark.parametrize("words", [("-m", "detr_backbone_cli"), ("-c", "from detr_backbone_cli import main; main([])")])
def test_ctrl_c_while_torch_is_imported_is_one_line(process: Process, tmp_path: Path, words: tuple[str, str]) -> None:
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nassert False")
    result = process(tmp_path, *words, PYTHONPATH=f"{tmp_path}:{ROOT}")

    assert (result.returncode, result.stderr) == (130, "error: interrupted\n")
