"""Where everything stands, and that imports point down only."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT, Command

PACKAGE = ROOT / "detr_backbone"

COMPONENT = {
    "__init__",
    "activation_checkpointing",
    "backbone",
    "describe",
    "description",
    "errors",
    "exactness",
    "frozen_batch_norm",
    "image_by_image",
    "input_channels",
    "layer_getter",
    "folding",
    "layer_strategies",
    "maps",
    "meta",
    "nested_tensor",
    "networks",
    "norms",
    "padding",
    "position_encoding",
    "threads",
    "weight_gradient",
    "weights",
}
# part -> the parts it may import from, besides itself
MAY_IMPORT = {
    "component": set(),
    "detectors": {"component"},
    "coco": {"component"},
    "visualize": {"component"},
    "report": {"component", "coco"},
    "training": {"component", "detectors", "coco", "visualize"},
}
# what the component may import: torch, torchvision and the standard library; inside of the one function that needs it,
# safetensors to read such a file, and timm to build a network of that name
COMPONENT_LIBRARIES = {"torch", "torchvision", "safetensors", "timm"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: Path) -> str:
    relative = module.relative_to(PACKAGE)
    first = relative.parts[0].removesuffix(".py")
    return "component" if len(relative.parts) == 1 and first in COMPONENT else first


def imports_of(module: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.name}: imports are absolute"
            names.append(str(node.module))
    return names


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_every_file_has_a_place_and_imports_point_down(module: Path) -> None:
    part = part_of(module)
    assert part in MAY_IMPORT, f"{module} has no place: give it one in MAY_IMPORT or move it"

    for name in imports_of(module):
        if name.split(".")[0] == "detr_backbone":
            target = part_of(PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py")) if "." in name else "component"
            assert target in MAY_IMPORT[part] | {part}, f"{part} must not import {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) == "component"], ids=lambda module: module.stem)
def test_the_component_needs_torch_and_torchvision_only(module: Path) -> None:
    import sys

    libraries = {name.split(".")[0] for name in imports_of(module)} - sys.stdlib_module_names - {"detr_backbone"}

    assert libraries <= COMPONENT_LIBRARIES


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_no_module_is_long_or_named_after_nothing(module: Path) -> None:
    assert len(module.read_text(encoding="utf-8").splitlines()) <= 300
    assert module.stem not in ("utils", "util", "misc", "helpers", "common")


def test_pickle_never_crosses_ranks_and_no_loader_falls_back() -> None:
    for module in MODULES:
        text = module.read_text(encoding="utf-8")
        assert "import pickle" not in text
        assert "all_gather_object" not in text
        assert "weights_only=False" not in text


def test_a_script_starts_without_what_only_its_work_needs(process: Command, tmp_path: Path) -> None:
    """`--help` and most errors come before it; torchvision alone, which loads torch's compiler, doubles their time."""
    scripts = [str(path) for path in (ROOT / "scripts").glob("*.py") if not path.stem.startswith("benchmark")]
    read = "import runpy, sys; [runpy.run_path(path) for path in sys.argv[1:]]; print(*sys.modules)"
    loaded = process(tmp_path, "-c", read, *scripts).stdout.split()

    assert "detr_backbone.training.engine" in loaded
    assert {"torchvision", "torch._dynamo", "scipy", "accelerate", "rich", "matplotlib"} & set(loaded) == set()
