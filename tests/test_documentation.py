"""What README.md and docs/*.md say is true: their examples run, their links lead somewhere, their commands exist."""

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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


def scripts() -> list[tuple[str, frozenset[str]]]:
    """Each script that a page calls, and the options it gives it."""
    calls = []
    for command in (command for page in PAGES for command in commands_of(page)):
        words = shlex.split(command, comments=True)
        if words[:1] == ["python"] and words[1].startswith("scripts/"):
            calls.append((words[1], frozenset(word.partition("=")[0] for word in words if word.startswith("--"))))
    return calls


@pytest.mark.parametrize(("script", "options"), scripts())
def test_every_script_has_the_options_that_it_is_given(script: str, options: frozenset[str]) -> None:
    command = [sys.executable, str(ROOT / script), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout

    assert options <= set(re.findall(r"--[a-z0-9_.]+", shown))


def test_the_continuous_integration_installs_and_tests_as_readme_says() -> None:
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    test_command = next(command for command in commands_of(README) if "pytest" in command)

    assert 'pip install --editable ".[dev]"' in test_command
    assert 'pip install --quiet --editable ".[dev]"' in run
    assert "OMP_NUM_THREADS=1 pytest" in test_command
    assert "export OMP_NUM_THREADS=1" in run
    assert "\npytest" in run
