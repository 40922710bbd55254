"""Interval attention: attention whose mask is two integers per key.

``api.py`` checks the arguments and chooses an implementation. ``reference.py`` is the oracle, ``sdpa.py`` uses torch's
operator, and ``flex.py`` uses FlexAttention. The implementations import neither each other nor the oracle.
"""

from gisting.attention.api import IMPLEMENTATIONS, choose_implementation, interval_attention

__all__ = ["IMPLEMENTATIONS", "choose_implementation", "interval_attention"]
