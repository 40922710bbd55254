"""Fused Triton kernels for interval attention: forward, backward, decoding, grouped heads, a bias by distance.

Place in the flow: below everything else. Depends only on torch and triton, and is independent of prompts, gists and
models. Query row ``i`` sees key ``j`` where ``first[j] <= i < end[j]``. ``plan_tiles`` finds the tiles that contain
such pairs, and ``interval_attention`` visits no others. ``README.md`` in the parent folder has the derivations.
"""

from .op import decode_attention, interval_attention, is_interpreting, keep_attention, plan_tiles, why_not
from .plan import Plan, TileLists, TileSizes, list_tiles, make_plan, mean_segment_length

__all__ = [
    "Plan",
    "TileLists",
    "TileSizes",
    "decode_attention",
    "interval_attention",
    "is_interpreting",
    "keep_attention",
    "list_tiles",
    "make_plan",
    "mean_segment_length",
    "plan_tiles",
    "why_not",
]
