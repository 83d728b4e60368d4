"""The package as a user gets it: a wheel with all of its files, whose component needs torch and torchvision alone."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import detr_backbone
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


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, of a copy: what was built in the checkout before would add old files to it."""
    copy, target = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("source")
    for path in (ROOT / name for name in FOLDERS):
        shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", *CONTRIBUTORS_PAGES):
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


def run(folder: Path, *words: str, python: Path = Path(sys.executable)) -> str:
    done = subprocess.run([str(python), "-I", *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_component_builds_and_learns_without_any_other_library(environment: Path) -> None:
    absent = f"import sys; sys.modules.update(dict.fromkeys({NOT_NEEDED}))"  # importing what is None fails

    printed = run(environment, "-c", f"{absent}\n{USE_OF_THE_COMPONENT}", python=environment / "bin" / "python")

    assert printed.startswith(str(environment))  # not this checkout
    assert printed.endswith("[(2, 256, 4, 6), (2, 512, 2, 3)]\n")


def test_the_program_starts_in_a_new_environment(environment: Path) -> None:
    printed = run(
        environment, str(environment / "bin" / "detr-backbone"), "--help", python=environment / "bin" / "python"
    )

    assert printed.startswith("usage: detr-backbone")


def files_of(folder: Path) -> set[str]:
    """All files below a folder of the repository, as paths in it."""
    paths = (path.relative_to(ROOT).as_posix() for path in folder.rglob("*") if path.is_file())
    return {path for path in paths if "__pycache__" not in path}


def test_the_wheel_holds_every_file_of_the_package_the_recipes_and_nothing_else(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}

    assert packed == files_of(PACKAGE) | {f"detr_backbone/{recipe}" for recipe in files_of(ROOT / "configs")}


def test_the_source_distribution_holds_what_the_repository_shows(source_distribution: Path) -> None:
    packed = {path.relative_to(source_distribution).as_posix() for path in source_distribution.rglob("*")}

    assert set().union(*(files_of(ROOT / folder) for folder in FOLDERS), CONTRIBUTORS_PAGES) <= packed


def test_the_wheel_says_its_version_and_carries_the_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))

    assert email.message_from_bytes(archive.read(metadata))["Version"] == detr_backbone.__version__
    assert any(name.endswith("/LICENSE") for name in archive.namelist())


def test_the_changelog_opens_with_this_version() -> None:
    versions = re.findall(r"^## \[?([\d.]+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)

    assert versions[0] == detr_backbone.__version__
