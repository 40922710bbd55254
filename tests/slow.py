"""Mark rows of a test's table as slow: `make test` leaves them out, `make test-all` runs them."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any, id: str | None = None) -> Any:
    """Make a row of ``pytest.mark.parametrize`` that only `make test-all` runs."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)
