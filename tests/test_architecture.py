"""Where everything stands, and that imports point down only."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from detr_backbone.commands.program import COMMANDS
from tests.processes import ROOT, Command

PACKAGE = ROOT / "detr_backbone"

COMPONENT = {"backbone", "folding", "layer_getter", "networks", "padding", "inspection", "weights"}
"""Folders of the component; the modules beside them belong to it too."""
# part -> the parts it may import from, besides itself
MAY_IMPORT = {
    "component": set(),
    "detectors": {"component"},
    "adapters": {"component"},
    "export": {"component"},
    "checkpoints": {"component", "detectors"},
    "coco": {"component"},
    "evaluation": {"component", "coco"},
    "visualize": {"component"},
    "report": {"component", "coco", "evaluation"},
    "training": {"component", "export", "detectors", "checkpoints", "coco", "evaluation", "visualize"},
    "prediction": {"component", "export", "detectors", "checkpoints", "coco", "training"},
    "commands": {
        *("component", "export", "detectors", "checkpoints", "coco", "evaluation", "visualize", "report", "training"),
        "prediction",
    },
}
# what the component may import: torch, torchvision, what these install, and the standard library; inside of the one
# function that needs it, safetensors and huggingface_hub for such files, and timm for its networks
COMPONENT_LIBRARIES = {"torch", "torchvision", "numpy", "filelock", "safetensors", "huggingface_hub", "timm"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: Path) -> str:
    folder = module.relative_to(PACKAGE).parts[0]
    return "component" if folder.endswith(".py") or folder in COMPONENT else folder


def imported_files(module: Path) -> set[Path]:
    """The files of this package that a module imports, wherever in it the import stands."""
    files = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name}: imports are absolute"
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            path = ROOT.joinpath(*name.split("."))
            files |= {file for file in (path.with_suffix(".py"), path / "__init__.py") if file in MODULES}
    return files - {module}


def imports_of(module: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(str(node.module))
    return names


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_every_file_has_a_place_and_imports_point_down(module: Path) -> None:
    part = part_of(module)
    assert part in MAY_IMPORT, f"{module} has no place: give it one in MAY_IMPORT or move it"

    for file in imported_files(module):
        assert part_of(file) in MAY_IMPORT[part] | {part}, f"{part} must not import {file.relative_to(ROOT)}"


def test_no_module_imports_itself_through_others() -> None:
    """Nor for annotations alone: two files that need each other are one, or one of them stands too low."""
    order = TopologicalSorter({_name(module): map(_name, imported_files(module)) for module in MODULES})
    order.prepare()  # raises CycleError, with the files of the circle


def _name(module: Path) -> str:
    return str(module.relative_to(ROOT))


def test_the_root_holds_what_a_reader_of_detr_looks_for() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 11  # with __init__


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) == "component"], ids=lambda module: module.stem)
def test_the_component_needs_torch_and_torchvision_only(module: Path) -> None:
    import sys

    libraries = {name.split(".")[0] for name in imports_of(module)} - sys.stdlib_module_names - {"detr_backbone"}

    assert libraries <= COMPONENT_LIBRARIES


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_no_module_is_long_or_named_after_nothing(module: Path) -> None:
    assert len(module.read_text(encoding="utf-8").splitlines()) <= 300
    assert module.stem not in ("utils", "util", "misc", "helpers", "common")


@pytest.mark.parametrize("module", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda module: module.stem)
def test_no_test_imports_another_ones_module(module: Path) -> None:
    """What two of them share stands in a module without tests beside them, or is a fixture."""
    imports = re.findall(r"^\s*(?:from|import) tests\b.*", module.read_text(encoding="utf-8"), re.MULTILINE)

    assert [line for line in imports if re.search(r"\b(test_\w+|conftest)\b", line)] == []


def test_pickle_never_crosses_ranks_and_no_loader_falls_back() -> None:
    for module in MODULES:
        text = module.read_text(encoding="utf-8")
        assert "import pickle" not in text
        assert "all_gather_object" not in text
        assert "weights_only=False" not in text


def test_a_command_starts_without_what_only_its_work_needs(process: Command, tmp_path: Path) -> None:
    """`--help` and most errors come before it; torchvision alone, which loads torch's compiler, doubles their time."""
    names = [name.replace("-", "_") for name in COMMANDS]
    read = f"import importlib, sys; [importlib.import_module('detr_backbone.commands.' + name).COMMAND.help() \
        for name in {names}]; print(*sys.modules)"
    loaded = process(tmp_path, "-c", read).stdout.split()

    assert "detr_backbone.commands.train" in loaded
    assert {"torchvision", "torch._dynamo", "scipy", "accelerate", "rich", "matplotlib"} & set(loaded) == set()
