"""Where the packages lie; the rest of the metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["gisting", "gisting.*"]), "gisting_kernels"],
    # kernels/ is a source root: as a package it would shadow the package `kernels` that transformers imports.
    package_dir={"gisting_kernels": "kernels/gisting_kernels"},
    package_data={
        "gisting": ["py.typed", "adapters/*/*", "demo/*.txt", "demo/*.jsonl"],
        "gisting_kernels": ["configs.json"],
    },
)
