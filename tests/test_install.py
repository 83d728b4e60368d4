"""The package as a user gets it: a wheel with all of its files, each command of which works without a checkout."""

import email
import json
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import detr_backbone
from detr_backbone.commands.program import COMMANDS
from tests.processes import ROOT

PACKAGE = ROOT / "detr_backbone"
FOLDERS = ("detr_backbone", "benchmarks", "configs", "docs", "scripts", "tests")
CONTRIBUTORS_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
NOT_NEEDED = ("scipy", "pycocotools", "yaml", "jsonargparse", "accelerate", "matplotlib", "rich", "timm", "safetensors")
"""What the component does without. torchvision itself imports Pillow and NumPy; that the component's modules do not is
seen from their imports, in test_architecture.py."""

USE_OF_THE_COMPONENT = """
import torch, detr_backbone
from detr_backbone import BackboneConfig, build_backbone

backbone = build_backbone(BackboneConfig(name="resnet18", return_layers=("layer3", "layer4")))
features, positions = backbone([torch.rand(3, 64, 96), torch.rand(3, 50, 33)])
sum(level.tensors.sum() for level in features).backward()
assert backbone[0].body.layer4[1].conv2.weight.grad.isfinite().all()
print(detr_backbone.__file__, [tuple(level.tensors.shape) for level in features])
"""

USE_OF_THE_PROGRAM = """
import runpy, sys
from pathlib import Path
import torch, torchvision
from detr_backbone.coco.shapes import draw_shapes

program, draw = sys.argv[1], draw_shapes("shapes", train=4, val=3, image_size=64)
torch.save(torchvision.models.resnet18().state_dict(), "resnet18.pth")
Path("shapes/labels").mkdir()
Path("shapes/labels/000001.txt").write_text("1 0.5 0.25 0.125 0.5")
Path("shapes/data.yaml").write_text("val: val\\nnames: [star, disc]")
for line in sys.stdin:
    sys.argv = [program, *line.split()]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, line
"""
"""Runs the installed program, in one process: starting one takes as long as most of these commands."""

TRUTH = "shapes/annotations/instances_val.json"
SPLITS = " ".join(
    f"--data.{split}.images shapes/{split} --data.{split}.annotations shapes/annotations/instances_{split}.json"
    for split in ("train", "val")
)
SMALL = (
    "--optimizer.epochs 1 --data.batch_size 2 --data.num_workers 0 --data.transforms.scales 64 --calibration_images 2 "
    "--detector.dec_layers 1 --detector.backbone.return_layers [layer3]"  # each layer takes the export a second
)
COMMAND_LINES = f"""
train --config shapes --output_dir run {SPLITS} {SMALL}
evaluate --checkpoint run/checkpoint.pt --output judged --report report --intervals 20
predict --checkpoint run/checkpoint.pt --images shapes/val --annotations {TRUTH} --output found
evaluate --detections found/detections.json --annotations {TRUTH} --output again --intervals 0
compare --annotations {TRUTH} --a judged/detections.json --b found/detections.json --resamples 20
check-data --images shapes/val --annotations {TRUTH}
make-subset --annotations {TRUTH} --images shapes/val --count 2 --output two
inspect --checkpoint run/checkpoint.pt --images shapes/val --limit 1 --output look
export --checkpoint run/checkpoint.pt --output detector.pt2
convert-data --layout yolo --folder shapes --split val --output yolo.json
convert-weights --source resnet18.pth --resnet huggingface --output resnet18.safetensors
"""


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, of a copy: what was built in the checkout before would add old files to it."""
    copy, target = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("source")
    for path in (ROOT / name for name in FOLDERS):
        shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (
        "setup.py",
        "detr_backbone_cli.py",
        "setup.cfg",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        *CONTRIBUTORS_PAGES,
    ):
        shutil.copy(ROOT / name, copy)
    run(copy, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(target)!r})")
    (archive,) = target.iterdir()
    with tarfile.open(archive) as packed:
        packed.extractall(target, filter="data")
    (unpacked,) = (path for path in target.iterdir() if path.is_dir())
    return unpacked


@pytest.fixture(scope="module")
def wheel(source_distribution: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    run(source_distribution, "-c", f"from setuptools import build_meta; build_meta.build_wheel({str(target)!r})")
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel, and with the libraries of this one, so that nothing is downloaded."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # a line of a .pth names a folder; .pth files inside of it, such as that of an editable install, are not read
    (packages / "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    pip = ("-m", "pip", "--isolated", "--disable-pip-version-check", "--python", str(folder / "bin" / "python"))
    run(folder, *pip, "install", "--no-deps", "--no-index", "--ignore-installed", str(wheel))
    return folder


def run(folder: Path, *words: str, python: Path = Path(sys.executable), stdin: str = "") -> str:
    done = subprocess.run(
        [str(python), "-I", *words], cwd=folder, input=stdin, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_component_builds_and_learns_without_any_other_library(environment: Path) -> None:
    absent = f"import sys; sys.modules.update(dict.fromkeys({NOT_NEEDED}))"  # importing what is None fails

    printed = run(environment, "-c", f"{absent}\n{USE_OF_THE_COMPONENT}", python=environment / "bin" / "python")

    assert printed.startswith(str(environment))  # not this checkout
    assert printed.endswith("[(2, 256, 4, 6), (2, 512, 2, 3)]\n")


def test_every_command_works_with_the_wheel_alone(environment: Path, tmp_path: Path) -> None:
    program, python = environment / "bin" / "detr-backbone", environment / "bin" / "python"
    lines = COMMAND_LINES.strip()
    run(tmp_path, "-c", USE_OF_THE_PROGRAM, str(program), python=python, stdin=lines)

    assert {line.split()[0] for line in lines.splitlines()} == set(COMMANDS)
    numbers = [json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("judged", "again")]
    assert numbers[0]["stats"] == numbers[1]["stats"]  # what is predicted is what is evaluated
    assert zipfile.is_zipfile(tmp_path / "detector.pt2")  # which is kept only if it gives what the model gives
    (box,) = json.loads((tmp_path / "yolo.json").read_text())["annotations"]
    assert box["bbox"] == pytest.approx([28, 0, 8, 32])  # of 64 x 64 pixels
    assert len(load_file(tmp_path / "resnet18.safetensors")) == 122  # the tensors of torchvision's
    assert {path.name for path in (tmp_path / "found").glob("*.jpg")} == {f"00000{i}.jpg" for i in (1, 2, 3)}


def files_of(folder: Path) -> set[str]:
    """All files below a folder of the repository, as paths in it."""
    paths = (path.relative_to(ROOT).as_posix() for path in folder.rglob("*") if path.is_file())
    return {path for path in paths if "__pycache__" not in path}


def test_the_wheel_holds_every_file_of_the_package_the_recipes_and_nothing_else(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    recipes = {f"detr_backbone/{recipe}" for recipe in files_of(ROOT / "configs")}
    assert packed == files_of(PACKAGE) | recipes | {"detr_backbone_cli.py"}


def test_the_source_distribution_holds_what_the_repository_shows(source_distribution: Path) -> None:
    packed = {path.relative_to(source_distribution).as_posix() for path in source_distribution.rglob("*")}

    assert set().union(*(files_of(ROOT / folder) for folder in FOLDERS), CONTRIBUTORS_PAGES) <= packed


def test_the_wheel_says_its_version_and_carries_the_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))

    assert email.message_from_bytes(archive.read(metadata))["Version"] == detr_backbone.__version__
    assert any(name.endswith("/LICENSE") for name in archive.namelist())


LINK = re.compile(r"\]\((?!https://|#)")  # that leads nowhere from another site


def test_the_page_of_the_wheel_names_files_of_the_source_distribution(wheel: Path, source_distribution: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    message = email.message_from_bytes(archive.read(metadata))
    page = message.get_payload()

    assert message["Description-Content-Type"] == "text/markdown"
    assert LINK.search(page) is None
    named = re.findall(r"`((?:docs|configs|benchmarks)/[^`]+)`", page)
    assert len(named) > 20
    assert [name for name in named if not (source_distribution / name.partition("#")[0]).exists()] == []


def test_links_of_the_page_are_absolute_once_the_repository_has_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text("# Title\n\n![A](docs/a.jpg) [b](docs/b.md) [c](#c) [d](https://d.e)")
    (tmp_path / "setup.cfg").write_text("[metadata]\nproject_urls =\n    Source = https://host/us/it\n")
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("setuptools.setup", lambda **options: asked.append(options))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "setup.py"))

    assert asked[0]["long_description"] == (
        "# Title\n\n![A](https://host/us/it/raw/HEAD/docs/a.jpg) [b](https://host/us/it/blob/HEAD/docs/b.md) [c](#c) "
        "[d](https://d.e)"
    )


def test_the_changelog_opens_with_this_version() -> None:
    versions = re.findall(r"^## \[?([\d.]+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)

    assert versions[0] == detr_backbone.__version__
