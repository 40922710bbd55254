"""Fused Triton kernels for interval attention: forward, backward, grouped heads, an optional Toeplitz bias.

Place in the flow: below everything. Depends on torch and triton only, knows nothing of prompts, gists or models, and is
imported only by ``gisting.attention.api``, when a kernel is asked for. Empty for now: the kernels arrive as ``op.py``
(checks and autograd), ``tiles.py`` (which tiles an interval falls in), ``forward.py`` and ``backward.py``.
"""

__all__: list[str] = []
