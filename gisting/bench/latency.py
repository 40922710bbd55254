"""Old place of :mod:`gisting.measure.latency`.

Place in the flow: an alias for one release.
"""

from gisting._deprecated import moved_names

__getattr__ = moved_names(__name__, {name: f"gisting.measure.latency.{name}" for name in ("LatencyRow", "first_token")})
