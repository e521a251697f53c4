"""Finds the packages: everything under the folders that pyproject.toml maps to `hsae` and its parts."""

from setuptools import find_packages, setup

PARTS = ("cache", "train", "eval", "cli")
setup(packages=["hsae", *(f"hsae.{name}" for name in find_packages() if name.split(".")[0] in PARTS)])
