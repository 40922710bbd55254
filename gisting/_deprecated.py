"""Old names that still work for one release, each with a warning that says what to write instead."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from gisting.errors import GistError

__all__ = ["moved_names", "renamed_arguments"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def moved_names(module: str, new_places: Mapping[str, str]) -> Callable[[str], Any]:
    """Make a module's ``__getattr__`` that finds names at their new place, with a ``DeprecationWarning``.

    Args:
        module: the old module, ``__name__`` where this is called.
        new_places: for each old name, the new one with its module, such as ``"gisting.errors.GistError"``.
    """

    def find(name: str) -> Any:
        if name not in new_places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new_module, _, new_name = new_places[name].rpartition(".")
        warnings.warn(
            f"{module}.{name} will be removed in the next release; use {new_places[name]}",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(new_module), new_name)

    return find


def renamed_arguments(**new_names: str) -> Callable[[_Function], _Function]:
    """Decorate a function so that old names of its keyword arguments still work, with a ``DeprecationWarning``.

    Args:
        **new_names: each old name, with the new one as its value.
    """

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in new_names.keys() & kwargs.keys():
                new = new_names[old]
                if new in kwargs:
                    raise GistError(f"{new} was given twice, once under its old name {old}; give {new} alone")
                warnings.warn(
                    f"{function.__name__}: the argument {old} will be removed in the next release; use {new}",
                    DeprecationWarning,
                    stacklevel=2,
                )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # pyright: ignore[reportReturnType]

    return decorate
