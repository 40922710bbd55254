"""Fused Triton kernels for interval attention: forward, backward, decoding, grouped heads, an optional Toeplitz bias.

Place in the flow: below everything. Depends on torch and triton only, knows nothing of prompts, gists or models. Key
``j`` is seen by the query rows ``first[j] <= i < end[j]``; ``plan_tiles`` finds the tiles in which that is so,
``interval_attention`` computes there and nowhere else. ``README.md`` beside this folder has the derivations.
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
