"""What setup.cfg cannot say: where recipes are installed, and how README.md reads on a page without this repository."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup


def long_description() -> str:
    """Return README.md without links that are relative: to the repository if setup.cfg names it, or in words.

    `project_urls` in setup.cfg has a line `Source = https://…` once the repository has a public address.
    """
    settings = ConfigParser()
    settings.read("setup.cfg", encoding="utf-8")
    lines = settings.get("metadata", "project_urls", fallback="").splitlines()
    source = dict(re.split(r"\s*=\s*", line, maxsplit=1) for line in lines if line).get("Source")
    text = Path("README.md").read_text(encoding="utf-8")

    def absolute(link: re.Match[str]) -> str:
        picture, words, path = link.groups()
        if source is not None:
            return f"{picture}[{words}]({source}/{'raw' if picture else 'blob'}/HEAD/{path})"
        file = path.partition("#")[0]
        return f"`{file}`" if file.endswith(words) else f"{words} (`{file}`)"

    note = "" if source else "Files that are named here come with the source distribution.\n\n"
    title, rest = re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)]+)\)", absolute, text).split("\n\n", 1)
    return f"{title}\n\n{note}{rest}"


setup(
    packages=[*find_packages(include=["detr_backbone*"]), "detr_backbone.configs"],
    package_dir={"detr_backbone.configs": "configs"},
    py_modules=["detr_backbone_cli"],
    long_description=long_description(),
)
