"""Interval attention: attention whose mask is two integers per key.

``api.py`` checks and dispatches, ``reference.py`` is the oracle, ``sdpa.py`` the torch path; the implementations
import neither each other nor the oracle.
"""

from gisting.attention.api import IMPLEMENTATIONS, choose_implementation, interval_attention

__all__ = ["IMPLEMENTATIONS", "choose_implementation", "interval_attention"]
