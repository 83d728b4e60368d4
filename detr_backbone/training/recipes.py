"""Recipes by name: the YAML files that come with the package, `--config shapes` for configs/shapes.yaml."""

from pathlib import Path

from detr_backbone.errors import ConfigError, unknown_name

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
"""In an installed package, and in a checkout; setup.py puts the second where the first is."""


def recipes() -> dict[str, Path]:
    """Return the file of every recipe that comes with the package, by its name."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Return the configuration file that is meant: a path, or the name of a recipe.

    Raises:
        ConfigError: it is neither; the message lists the recipes.
    """
    if Path(name).is_file():
        return Path(name)
    known = recipes()
    if name in known:
        return known[name]
    if Path(name).suffix:
        raise ConfigError(f"configuration does not exist | where: file={name} | fix: recipes are {', '.join(known)}")
    raise ConfigError(f"`config` must be a YAML file or the name of a recipe: {unknown_name(name, known)}")
