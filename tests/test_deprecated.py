"""Old names keep working for one release, and the warning says what to write instead."""

from __future__ import annotations

import inspect

import pytest

from gisting import GistError
from gisting._deprecated import moved_names, renamed_arguments

find = moved_names("gisting.old", {"Thing": "gisting.errors.GistError"})


@renamed_arguments(size="length")
def measure(length: int = 1) -> int:
    """Return it."""
    return length


def test_a_moved_name_is_found_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match=r"gisting\.old\.Thing will be removed .* use gisting\.errors\.GistErr"):
        assert find("Thing") is GistError


def test_any_other_name_is_missing() -> None:
    with pytest.raises(AttributeError, match=r"module 'gisting\.old' has no attribute 'Other'"):
        find("Other")


def test_a_renamed_argument_is_passed_on_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="measure: the argument size will be removed .* use length"):
        assert measure(size=3) == 3  # pyright: ignore[reportCallIssue]


def test_both_names_at_once_are_refused() -> None:
    with pytest.raises(GistError, match="length was given twice"):
        measure(length=1, size=2)  # pyright: ignore[reportCallIssue]


def test_the_new_name_gives_no_warning_and_the_signature_stays() -> None:
    assert measure(length=2) == 2
    assert list(inspect.signature(measure).parameters) == ["length"]
