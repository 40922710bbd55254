"""``python -m benchmarks NAME``: run one benchmark, or list all of them.

Place in the flow: above every other module here. A benchmark is a module with a function ``main`` that has typed
keyword options, as for typer, and a docstring whose first line is shown in the list. ``main`` returns None or an exit
status. To add a benchmark, write the module and add it to ``BENCHMARKS``.
"""

from __future__ import annotations

import ast
import functools
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from gisting.cli.shared import Commands, err
from gisting.errors import GistError

__all__ = ["BENCHMARKS", "run"]

#: The module of each benchmark. Only the module that runs is imported.
BENCHMARKS = {
    "adapter": "benchmarks.adapter.recipe",
    "adapter-distil": "benchmarks.adapter.on_top",
    "card": "benchmarks.card",
    "check": "benchmarks.check",
    "cpu-attention": "benchmarks.cpu_attention",
    "distill": "benchmarks.distill",
    "distill-time": "benchmarks.distill_time",
    "distillation": "benchmarks.distillation",
    "families": "benchmarks.families",
    "flood": "benchmarks.flood",
    "internalize": "benchmarks.internalize",
    "kernels": "benchmarks.kernels.attention",
    "memory": "benchmarks.memory",
    "methods": "benchmarks.methods",
    "nl2bash": "benchmarks.nl2bash",
    "objective": "benchmarks.objective",
    "pages": "benchmarks.pages",
    "quality": "benchmarks.quality",
    "resources": "benchmarks.kernels.resources",
    "storage": "benchmarks.storage",
    "store": "benchmarks.store",
    "training": "benchmarks.training",
    "tune": "benchmarks.kernels.tune",
    "vllm": "benchmarks.vllm",
}


def run(words: Sequence[str]) -> int:
    """Run the benchmark that the first word names, with the other words as its options.

    Returns:
        The exit status: 1 after an error that the user can correct, 2 for a wrong name or a wrong option.
    """
    if not words or words[0] in ("-h", "--help"):
        print("Usage: python -m benchmarks NAME [OPTIONS]\n\n--help after a name lists its options.\n")
        width = max(map(len, BENCHMARKS))
        for name, module in BENCHMARKS.items():
            print(f"  {name:{width}}  {_summary(module)}")
        return 0
    name, *options = words
    if name not in BENCHMARKS:
        err.print(
            f"error: there is no benchmark {name!r}; choose from {', '.join(BENCHMARKS)}",
            highlight=False,
            soft_wrap=True,
        )
        return 2
    function = importlib.import_module(BENCHMARKS[name]).main

    @functools.wraps(function)
    def with_status(**given: Any) -> None:
        raise typer.Exit(function(**given) or 0)

    app = Commands(add_completion=False, pretty_exceptions_enable=False)
    app.command(name)(with_status)
    try:
        app(list(options), prog_name=f"python -m benchmarks {name}")
    except (GistError, OSError, ImportError) as error:
        err.print(f"error: {error}", highlight=False, soft_wrap=True)
        return 1
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _summary(module: str) -> str:
    """The first line of the docstring of ``main``, read from the source so that nothing heavy is imported."""
    source = Path(__file__).resolve().parents[1] / f"{module.replace('.', '/')}.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    return (ast.get_docstring(function) or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
