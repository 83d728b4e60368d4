"""What setup.cfg cannot say: the recipes of configs/ are installed as detr_backbone/configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["detr_backbone*"]), "detr_backbone.configs"],
    package_dir={"detr_backbone.configs": "configs"},
)
