"""What README.md and docs/*.md say is true: their examples run, their links lead somewhere, their commands exist."""

import doctest
import re
import shlex
from pathlib import Path

import pytest

from tests.processes import ROOT, Command

README = ROOT / "README.md"
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text_of(page))} - {""}

    assert [link for link in links if not (link.startswith("https://") or (page.parent / link).exists())] == []


def test_every_page_and_every_recipe_is_listed() -> None:
    readme = text_of(README)

    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in readme] == []
    assert [path.name for path in (ROOT / "configs").glob("*.yaml") if f"configs/{path.name}" not in readme] == []


def scripts() -> dict[str, set[str]]:
    """The scripts that the pages call, each with all options it is given."""
    options: dict[str, set[str]] = {}
    for command in (command for page in PAGES for command in commands_of(page)):
        words = shlex.split(command, comments=True)
        if words[:1] == ["python"] and words[1].startswith("scripts/"):
            given = {word.partition("=")[0] for word in words if word.startswith("--")}
            options.setdefault(words[1].removeprefix("scripts/"), set()).update(given)
    return options


@pytest.mark.parametrize(("name", "options"), scripts().items())
def test_every_script_has_the_options_that_it_is_given(script: Command, name: str, options: set[str]) -> None:
    shown = script(ROOT, name, "--help")

    assert shown.returncode == 0
    assert options <= set(re.findall(r"--[a-z0-9_.]+", shown.stdout))


def test_the_continuous_integration_installs_and_tests_as_readme_says() -> None:
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    test_command = next(command for command in commands_of(README) if "pytest" in command)

    assert 'pip install --editable ".[dev]"' in test_command
    assert 'pip install --quiet --editable ".[dev]"' in run
    assert "OMP_NUM_THREADS=1 pytest" in test_command
    assert "export OMP_NUM_THREADS=1" in run
    assert "\npytest" in run
