"""What README.md says is true: its examples run, its links lead somewhere, its commands exist."""

import doctest
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


def test_every_example_gives_what_it_shows() -> None:
    results = doctest.testfile(str(ROOT / "README.md"), module_relative=False)

    assert results.attempted > 10
    assert results.failed == 0


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)]+)\)", README)) - {""}))
def test_every_link_to_a_file_leads_to_one(link: str) -> None:
    assert link.startswith("https://") or (ROOT / link).exists()


def test_every_recipe_is_listed() -> None:
    assert all(f"configs/{path.name}" in README for path in (ROOT / "configs").glob("*.yaml"))


def scripts() -> list[tuple[str, frozenset[str]]]:
    """Each script that README calls, and the options it gives it."""
    calls = []
    for command in COMMANDS:
        words = shlex.split(command)
        if words[:1] == ["python"] and words[1].startswith("scripts/"):
            calls.append((words[1], frozenset(word for word in words if word.startswith("--"))))
    return calls


@pytest.mark.parametrize(("script", "options"), scripts())
def test_every_script_has_the_options_that_it_is_given(script: str, options: frozenset[str]) -> None:
    command = [sys.executable, str(ROOT / script), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout

    assert options <= set(re.findall(r"--[a-z_.]+", shown))


def test_the_continuous_integration_installs_and_tests_as_readme_says() -> None:
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    test_command = next(command for command in COMMANDS if "pytest" in command)

    assert 'pip install --editable ".[dev]"' in test_command
    assert 'pip install --quiet --editable ".[dev]"' in run
    assert "OMP_NUM_THREADS=1 pytest" in test_command
    assert "export OMP_NUM_THREADS=1" in run
    assert "\npytest" in run
