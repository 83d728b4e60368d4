"""The package as a user gets it: a wheel with all of its files, whose component needs torch and torchvision alone."""

import email
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import detr_backbone
from tests.processes import ROOT

PACKAGE = ROOT / "detr_backbone"
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources: a `build` folder in the checkout would add old files to it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(source, "-c", f"from setuptools import build_meta; build_meta.build_wheel({str(target)!r})")
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


def run(folder: Path, *words: str, python: Path = Path(sys.executable)) -> str:
    done = subprocess.run([str(python), "-I", *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_component_builds_and_learns_without_any_other_library(environment: Path) -> None:
    absent = f"import sys; sys.modules.update(dict.fromkeys({NOT_NEEDED}))"  # importing what is None fails

    printed = run(environment, "-c", f"{absent}\n{USE_OF_THE_COMPONENT}", python=environment / "bin" / "python")

    assert printed.startswith(str(environment))  # not this checkout
    assert printed.endswith("[(2, 256, 4, 6), (2, 512, 2, 3)]\n")


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    expected = {file for file in files if "__pycache__" not in file}

    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    assert packed == expected


def test_the_wheel_says_its_version_and_carries_the_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))

    assert email.message_from_bytes(archive.read(metadata))["Version"] == detr_backbone.__version__
    assert any(name.endswith("/LICENSE") for name in archive.namelist())


def test_the_changelog_opens_with_this_version() -> None:
    versions = re.findall(r"^## \[?([\d.]+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)

    assert versions[0] == detr_backbone.__version__
