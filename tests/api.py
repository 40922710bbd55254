"""Write the public API as text: a line for every public name, with its signature.

``tests/golden/api.txt`` holds the promised API. An intended change is written there and added to CHANGELOG.md:

    python -m tests.api --write
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

GOLDEN = Path(__file__).resolve().parent / "golden" / "api.txt"

# The modules that the documentation tells users to import. The rest of the package may change without notice.
# gisting.serving.vllm is missing because it can only be imported if vLLM is installed.
MODULES = (
    *("gisting", "gisting.attention", "gisting.cache", "gisting.doctor", "gisting.errors", "gisting.generation"),
    *("gisting.pipeline", "gisting.storage", "gisting.store", "gisting.table", "gisting.tokens", "gisting.visibility"),
    *(f"gisting.models.{name}" for name in ("adapters", "check", "fingerprint", "hub", "load", "patch", "published")),
    *(f"gisting.models.{name}" for name in ("registry", "weight_difference")),
    *(f"gisting.data.{name}" for name in ("alpaca_plus", "collate", "packing", "plain", "prompts", "records", "tasks")),
    *(f"gisting.eval.{name}" for name in ("conditions", "cost", "divergence", "judge", "kl", "metrics")),
    *(f"gisting.eval.{name}" for name in ("report", "results")),
    *("gisting.eval.check", "gisting.eval.spans", "gisting.eval.statistics"),
    "gisting.distillation",
    *(f"gisting.train.{name}" for name in ("finetune", "methods", "objective", "recipe", "self_distil")),
    *(f"gisting.internalize.{name}" for name in ("comparison", "examples", "plan", "prices", "report", "settings")),
    *(f"gisting.internalize.{name}" for name in ("requests", "result", "schedule", "shorteners", "stages")),
    "gisting.serving.command",
)


def api(modules: tuple[str, ...] = MODULES) -> list[str]:
    """List the API of some modules, sorted. A name in several modules has its signature only the first time."""
    found: list[str] = []
    homes: dict[int, str] = {}
    for name in modules:
        found += lines_of(importlib.import_module(name), homes)
    return sorted(found)


def lines_of(module: ModuleType, homes: dict[int, str]) -> Iterator[str]:
    for name in module.__all__:
        value, path = getattr(module, name), f"{module.__name__}.{name}"
        if not callable(value):
            yield f"{path}: {type(value).__name__}"
        elif homes.setdefault(id(value), path) != path:
            yield f"{path} is {homes[id(value)]}"
        elif inspect.isclass(value):
            yield from _class_lines(value, path)
        else:
            yield f"{path}{_signature(value)}"


def _class_lines(kind: type, path: str) -> Iterator[str]:
    bases = ", ".join(base.__name__ for base in kind.__bases__)
    package = kind.__module__.partition(".")[0]
    own = [base for base in kind.__mro__ if base.__module__.partition(".")[0] == package]
    # The constructors of exceptions and Trainers belong to Python and transformers; protocols are not constructed.
    maker = next(base for base in kind.__mro__ if "__init__" in vars(base) or "__new__" in vars(base))
    is_made = maker in (*own, object) and not getattr(kind, "_is_protocol", False)
    yield f"{path}{_signature(kind) if is_made else ''} < {bases}"
    members = {name: raw for base in reversed(own) for name, raw in vars(base).items()}
    for name, raw in members.items():
        if name.startswith("_") and name not in ("__call__", "__getitem__", "__len__", "__contains__"):
            continue
        if isinstance(raw, property | functools.cached_property):
            getter: Any = raw.fget if isinstance(raw, property) else raw.func
            yield f"{path}.{name} -> {_plain(str(getter.__annotations__.get('return', 'Any')))}"
        elif isinstance(raw, classmethod | staticmethod) or inspect.isfunction(raw):
            yield f"{path}.{name}{_signature(getattr(kind, name))}"


def _signature(value: Any) -> str:
    try:
        return _plain(str(inspect.signature(value)))
    except ValueError:
        return "(...)"


def _plain(text: str) -> str:
    """Remove quotes around annotations, and addresses, which differ each time."""
    text = re.sub(r"ForwardRef\('([^']*)'\)", r"\1", text)
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)
    return re.sub(r" at 0x[0-9a-f]+>", ">", text)


if __name__ == "__main__":
    text = "\n".join(api()) + "\n"
    if sys.argv[1:] == ["--write"]:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
