"""Packaging: the only place of metadata (tool settings are in pyproject.toml, exact versions in constraints.txt)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Return the version by reading its file: importing the package would need torch at build time."""
    text = (ROOT / "gisting" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if found is None:
        raise RuntimeError('gisting/_version.py: expected a line __version__ = "..."')
    return found.group(1)


setup(
    name="gisting",
    version=read_version(),
    description="Compress prompts into a few cached, reusable gist tokens, for unmodified Hugging Face models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["gisting", "prompt compression", "KV cache", "attention mask", "transformers", "LLM"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["gisting", "gisting.*"]), "gisting_kernels"],
    # kernels/ is a source root: as a package it would shadow the PyPI package `kernels`, which transformers imports.
    package_dir={"gisting_kernels": "kernels/gisting_kernels"},
    package_data={"gisting": ["py.typed"], "gisting_kernels": ["configs.json"]},
    entry_points={"console_scripts": ["gisting=gisting.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",  # from here T5 runs on the attention interface
        "safetensors>=0.4",
        # All of these come with torch or transformers anyway; named because gisting imports them itself.
        "tokenizers>=0.22",
        "huggingface_hub>=1.3",
        "numpy>=1.26",
        "packaging>=22",
        "pyyaml>=6",
        "jinja2>=3.1",
        "typer>=0.12",
        "rich>=13",
        "accelerate>=1.1",  # what transformers' Trainer runs on, and so `gisting demo`
    ],
    extras_require={
        "kernels": ["triton>=3.6; sys_platform == 'linux'"],
        "train": ["datasets>=2.15", "peft>=0.20"],  # the floors that transformers asks for itself
        "eval": ["rouge-score>=0.1.2", "sacrebleu>=2.4", "matplotlib>=3.8"],
        "internalize": ["bm25s>=0.3", "llmlingua>=0.2.2"],
        "sentencepiece": ["sentencepiece>=0.2", "protobuf"],
        "vllm": ["vllm>=0.32"],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"],
        "dev": [
            "gisting[kernels,train,eval,sentencepiece,docs]",
            "bm25s>=0.3",  # of the extra internalize; llmlingua is tested by a stand-in, its models are large
            "build>=1.2",
            "ipykernel>=6.29",  # with nbclient: the notebook is run by a test
            "nbclient>=0.10",
            "hypothesis>=6.100",
            "pyright[nodejs]>=1.1.400",  # node as a wheel: pyright needs nothing but the package registry
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
        ],
    },
)
