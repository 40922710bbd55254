"""Old place of :mod:`gisting.measure.rows`.

Place in the flow: an alias for one release.
"""

from gisting._deprecated import moved_names

__getattr__ = moved_names(
    __name__, {name: f"gisting.measure.rows.{name}" for name in ("append_row", "environment", "read_rows", "spread")}
)
