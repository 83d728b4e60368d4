"""What README.md and docs/*.md say is true: their examples run, their links lead somewhere, their commands exist."""

import doctest
import re
import runpy
import shlex
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from torchvision.models import get_model_weights

from detr_backbone.training.config import TrainConfig, parse_config
from detr_backbone.training.config_errors import keys_of
from tests.processes import ROOT, Ended

README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
SCRIPTS = {"scripts/inspect_backbone.py": "inspect"}
"""Scripts that have another name than their command."""
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def commands_of(page: Path) -> list[str]:
    return [
        line.strip()
        for block in re.findall(r"```bash\n(.*?)```", text_of(page), re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_example_gives_what_it_shows(page: Path) -> None:
    results = doctest.testfile(str(page), module_relative=False)

    assert results.attempted == sum(line.startswith(">>> ") for line in text_of(page).splitlines())
    assert results.failed == 0


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text_of(page))} - {""}

    assert [link for link in links if not (link.startswith("https://") or (page.parent / link).exists())] == []


def test_every_page_and_every_recipe_is_listed() -> None:
    readme = text_of(README)

    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in readme] == []
    assert [path.name for path in (ROOT / "configs").glob("*.yaml") if f"configs/{path.name}" not in readme] == []


def test_every_folder_of_the_package_has_a_place_in_the_table_of_contributing() -> None:
    folders = {path.parent.name for path in (ROOT / "detr_backbone").glob("*/__init__.py")}

    assert [folder for folder in folders if f"`{folder}/`" not in text_of(CONTRIBUTING)] == []


def options_given() -> dict[str, set[str]]:
    """The commands that the pages call, by script or by name, each with all options it is given."""
    options: dict[str, set[str]] = {}
    for command in (command for page in PAGES for command in commands_of(page)):
        words = shlex.split(command, comments=True)
        if words[:1] == ["python"] and words[1].startswith("scripts/"):
            name = SCRIPTS.get(words[1], words[1].removeprefix("scripts/").removesuffix(".py").replace("_", "-"))
        elif words[:1] == ["detr-backbone"]:
            name = words[1]
        else:
            continue
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        options.setdefault(name, set()).update(given)
    return options


@pytest.mark.parametrize(("name", "options"), options_given().items())
def test_every_command_has_the_options_that_it_is_given(
    command: Callable[..., Ended], name: str, options: set[str]
) -> None:
    shown = command(ROOT, name, "--help-all")

    assert shown.code == 0
    keys = {f"--{key}" for key in keys_of(TrainConfig)} if name in ("evaluate", "predict", "inspect") else set()
    assert options <= set(re.findall(r"--[a-z0-9_.]+", shown.out)) | keys


def test_the_recipe_for_own_data_starts_from_pretrained_weights() -> None:
    (command,) = [command for command in commands_of(README) if command.startswith("detr-backbone train")]
    backbone = parse_config(shlex.split(command)[2:]).detector.backbone

    assert "mine/train.json" in command
    assert backbone.weights in get_model_weights(backbone.name).__members__


def setup() -> ConfigParser:
    parser = ConfigParser()
    parser.read_string((ROOT / "setup.cfg").read_text(encoding="utf-8"))
    return parser


def requirements() -> dict[str, list[Requirement]]:
    """What setup.cfg names, by extra; that of every installation under "."."""
    options = {".": setup()["options"]["install_requires"], **setup()["options.extras_require"]}
    return {extra: [Requirement(line) for line in text.split("\n") if line] for extra, text in options.items()}


def test_readme_lists_what_every_installation_brings() -> None:
    _, _, section = text_of(README).partition("## What an install brings")
    extra, brought = "", dict[str, list[str]]()
    for first, second in re.findall(r"^\| (?:`([^|]+)`)? ?\| ([^|]+) \|", section.partition("\n#")[0], re.MULTILINE):
        extra = re.sub(r'"\.\[(.+)\]"', r"\1", first) or extra
        brought.setdefault(extra, []).extend(second.split(", "))

    for extra, needed in requirements().items():
        if extra not in ("test", "dev"):
            assert sorted(brought[extra]) == sorted(requirement.name for requirement in needed), extra


def test_the_lowest_versions_are_tested() -> None:
    lines = (ROOT / ".ci" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition(" ")[0] for line in lines if not line.startswith("#")}
    (tested,) = (requirement.extras for requirement in requirements()["test"] if requirement.extras)
    lowest = {
        f"{requirement.name}=={bound[1]}"
        for extra, needed in requirements().items()
        if extra in (".", "test", *tested)
        for requirement in needed
        if (bound := re.search(r">=([\d.]+)", str(requirement.specifier)))
    }

    assert lowest <= pinned


def test_the_workflow_runs_the_script_on_every_version_of_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["run"]
    matrix = job["strategy"]["matrix"]
    versions = re.findall(r"Python :: (3\.\d+)", setup()["metadata"]["classifiers"])

    assert matrix["python"] == versions
    assert setup()["options"]["python_requires"] == f">={versions[0]}"
    assert {"python": versions[0], "constraint": ".ci/lowest.txt"} in matrix["include"]
    assert {"python": versions[-1], "arguments": "--cov"} in matrix["include"]
    assert job["steps"][-1] == {"run": ".ci/run ${{ matrix.arguments }}"}


def test_the_workflow_runs_the_tests_that_need_what_is_no_test_dependency() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    command = workflow["jobs"]["transformers"]["steps"][-1]["run"]
    line = re.compile(r"^ *(transformers|peft) = pytest\.importorskip", re.MULTILINE)
    needing = {f"tests/{path.name}" for path in ROOT.glob("tests/test_*.py") if line.search(text_of(path))}

    assert needing
    assert set(command.split()) >= needing


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "summary.py"))


def test_the_speed_in_readme_is_that_of_the_record_beside_it(summary: dict[str, Any]) -> None:
    (record,) = set(re.findall(r"\((benchmarks/table-\w+\.md)\)", text_of(README)))

    assert summary["milliseconds_table"](ROOT / record) in text_of(README)


def test_the_page_on_speed_shows_every_record(summary: dict[str, Any]) -> None:
    page = text_of(ROOT / "docs" / "speed.md")

    assert summary["summary_table"](summary["summarised"]()) in page
    linked = page + "".join(text_of(ROOT / "docs" / name) for name in ("networks.md", "convergence.md"))
    assert [path.name for path in (ROOT / "benchmarks").glob("*.md") if f"benchmarks/{path.name}" not in linked] == []


def test_the_page_on_speed_shows_the_records_of_a_gpu(summary: dict[str, Any]) -> None:
    page = text_of(ROOT / "docs" / "speed.md")

    for records in summary["on_a_gpu"]():
        assert summary["contenders_table"](records, "images_per_second") in page


def test_the_page_on_deployment_shows_the_record_of_engines(summary: dict[str, Any]) -> None:
    assert summary["contenders_table"](summary["engines"]()) in text_of(ROOT / "docs" / "deploy.md")
    assert summary["contenders_table"](summary["engines"](), size=" 1 x 800 x 1088") in text_of(README)


def test_the_continuous_integration_installs_and_tests_as_readme_says() -> None:
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    test_command = next(command for command in commands_of(README) if "pytest" in command)

    assert 'pip install --editable ".[dev]"' in test_command
    assert 'pip install --quiet --no-compile --editable ".[dev]"' in run
    assert test_command.endswith("OMP_NUM_THREADS=1 pytest -n 3")
    assert "export OMP_NUM_THREADS=1" in run
    assert "\npytest -n 3" in run
