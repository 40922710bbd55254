"""Write the layout of the Hugging Face ``kernels`` project, ready to load from a folder or to upload.

    python kernels/build_hub.py build/hub
    python -c "import kernels; kernels.get_local_kernel('build/hub')"

The layout consists of ``build.toml``, ``CARD.md``, ``torch-ext/gisting_kernels/`` (the sources for that project's own
builder) and ``build/torch-cuda/`` (what it would build; for pure Triton, the same files). The namespace of the
operators contains a hash of the sources, so that several versions and the installed package can be loaded into one
process. Needs only the standard library.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "gisting_kernels"
CARD = """---
license: apache-2.0
tags: [kernels]
---

# gisting-kernels

Attention whose mask is two integers per key: key j is seen by the query rows `first[j] <= i < end[j]`. Triton, forward,
backward and decoding, deterministic, with an optional relative bias. Documentation: `README.md` of the project gisting.
"""


def build(output: Path, *, backends: Sequence[str] | None = None) -> Path:
    """Write the layout to ``output``, which must be new or empty.

    Args:
        output: the folder.
        backends: the backends to write variants for, by default those in ``build.toml``. ``"cpu"`` is for Triton's
            interpreter.

    Raises:
        FileExistsError: ``output`` is not empty.
    """
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; name a new folder")
    general = tomllib.loads((HERE / "build.toml").read_text(encoding="utf-8"))["general"]
    sources = sorted(path for path in (HERE / PACKAGE).iterdir() if path.suffix in (".py", ".json"))
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    output.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "build.toml", output)
    (output / "CARD.md").write_text(CARD, encoding="utf-8")
    _copy(sources, output / "torch-ext" / PACKAGE)
    for backend in backends or general["backends"]:
        namespace = f"_{PACKAGE}_{backend}_{digest.hexdigest()[:8]}"
        variant = output / "build" / f"torch-{backend}"
        _copy(sources, variant)
        (variant / "_ops.py").write_text(
            '"""The namespace of the operators of this build."""\n\n'
            f"import torch\n\nops = torch.ops.{namespace}\n\n\n"
            "def add_op_namespace_prefix(op_name: str) -> str:\n"
            '    """The full name of an operator."""\n'
            f'    return f"{namespace}::{{op_name}}"\n',
            encoding="utf-8",
        )
        metadata = {
            "id": namespace,
            "name": general["name"],
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return output


def _copy(sources: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in sources:
        shutil.copy(path, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a new folder")
    build(parser.parse_args(arguments).output)


if __name__ == "__main__":
    main()
