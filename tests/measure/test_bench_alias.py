"""The old place of ``gisting.measure`` works for one release, with a warning."""

from __future__ import annotations

import importlib

import pytest

from gisting.measure import latency, rows


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("gisting.bench.rows", "environment", rows.environment),
        ("gisting.bench.latency", "first_token", latency.first_token),
    ],
)
def test_old_names_warn_and_work(old: str, name: str, new: object) -> None:
    module = importlib.import_module(old)
    with pytest.warns(
        DeprecationWarning, match=f"{old}.{name} will be removed in the next release; use gisting.measure"
    ):
        assert getattr(module, name) is new
