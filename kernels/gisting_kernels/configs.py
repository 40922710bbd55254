"""Look up tile sizes in a committed table, by GPU class, kernel, head size, dtype and mean segment length.

Nothing is timed at run time, so the same input on the same card always runs the same code. ``python -m benchmarks
tune`` writes ``configs.json`` on a card. Rows that no card has timed yet say ``"measured": false``. The environment
variable ``GISTING_KERNEL_CONFIG`` forces sizes, for instance ``forward=128,64,8,3,descriptors;key=64,64,4,2`` (rows,
keys, warps, stages and optionally the path; the kernels are forward, query, key and table).

Place in the flow: a card, a shape -> **configs** -> op, which plans with these sizes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .plan import PATHS, TileSizes

__all__ = [
    "CLASSES",
    "ENVIRONMENT_VARIABLE",
    "HEAD_SIZES",
    "HOPPER",
    "KERNELS",
    "has_little_shared_memory",
    "read_table",
    "tile_sizes",
]

KERNELS = ("forward", "query", "key", "table")
HEAD_SIZES = (64, 128, 256)
# A segment is short if a key is seen by at most this many rows on average: most of a large tile would be masked.
SHORT = 384
# Beyond this length, a row of the table for the longest segments is used if there is one. With half of the tokens in
# the prompt, that is at 8,192 tokens.
LONG = 2048
# The only cards with the instructions of the ping-pong kernel. Others of their class skip its rows.
HOPPER = (9, 0)
# The lowest compute capability of each class of the table, and the shared memory for its tiles, in bytes.
CLASSES = {80: 166_912, 90: 232_448}
ENVIRONMENT_VARIABLE = "GISTING_KERNEL_CONFIG"


# Read at import, because torch.compile traces the look-up and cannot trace reading a file.
_ROWS = tuple(json.loads(Path(__file__).with_name("configs.json").read_text(encoding="utf-8"))["rows"])


def read_table() -> tuple[dict[str, Any], ...]:
    """Return the rows of ``configs.json``."""
    return _ROWS


def tile_sizes(
    capability: tuple[int, int],
    head_size: int,
    bits: int,
    segment_length: float,
    *,
    has_bias: bool,
    can_pingpong: bool = True,
) -> tuple[TileSizes, TileSizes, TileSizes, TileSizes]:
    """Return the sizes of the forward, dQ, dK/dV and table-gradient kernels.

    Args:
        capability: compute capability of the GPU, from ``torch.cuda.get_device_capability``.
        head_size: D, at most 256.
        bits: bits per element of q, 16 or 32.
        segment_length: mean number of rows that see a key; see :func:`~gisting_kernels.plan.mean_segment_length`.
        has_bias: whether there is a relative bias.
        can_pingpong: whether rows of ``pingpong`` are used, which has neither dropout nor a softcap. Only
            those that a card has timed are used.

    Raises:
        ValueError: ``GISTING_KERNEL_CONFIG`` is not valid, or the table has no row for this head size.
    """
    forced = _forced(os.environ.get(ENVIRONMENT_VARIABLE, ""))
    is_small = has_little_shared_memory(capability)
    arch = 90 if capability >= (9, 0) and not is_small else 80
    wanted = {
        "arch": arch,
        "bits": 16 if bits <= 16 else 32,
        "head_size": next((size for size in HEAD_SIZES if head_size <= size), head_size),
        "bias": has_bias,
    }
    segments = ("short",) if segment_length <= SHORT or is_small else ("long",)
    if segment_length > LONG and not is_small:
        segments = ("longest", "long")
    sizes = []
    for kernel in KERNELS:
        rows = [
            row
            for row in read_table()
            if row["kernel"] == kernel
            and all(row.get(key, value) == value for key, value in wanted.items())
            and row.get("segment", segments[-1]) in segments
            and (row.get("path") != "pingpong" or (can_pingpong and capability == HOPPER and row["measured"]))
        ]
        if not rows:
            raise ValueError(f"there are no tile sizes for head size {head_size} with {bits} bits")
        row = min(rows, key=lambda row: segments.index(row.get("segment", segments[-1])))
        size = forced.get(kernel, TileSizes(*row["tile"], path=row.get("path", "pointers")))
        if is_small and kernel not in forced:
            most = 32 if head_size > 128 else 128
            size = TileSizes(min(size.rows, most), min(size.keys, most), size.warps, 1)
        sizes.append(size)
    return tuple(sizes)  # pyright: ignore[reportReturnType]


def has_little_shared_memory(capability: tuple[int, int]) -> bool:
    """Return whether a card has only 99 KiB of shared memory per program, less than others of its class.

    These are the cards of compute ``capability`` 8.6, 8.7, 8.9 and 12.x.
    """
    return capability in ((8, 6), (8, 7), (8, 9)) or capability >= (12, 0)


def _forced(text: str) -> dict[str, TileSizes]:
    forced = {}
    for part in text.replace(" ", "").split(";"):
        if not part:
            continue
        kernel, _, numbers = part.partition("=")
        *values, path = numbers.split(",")
        if path.isdigit():
            values, path = [*values, path], PATHS[0]
        if (
            kernel not in KERNELS
            or path not in PATHS
            or len(values) != 4
            or not all(value.isdigit() for value in values)
        ):
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}: expected KERNEL=ROWS,KEYS,WARPS,STAGES or "
                "KERNEL=ROWS,KEYS,WARPS,STAGES,PATH, separated by ';', where KERNEL is one of "
                f"{', '.join(KERNELS)} and PATH one of {', '.join(PATHS)}, got {part!r}"
            )
        size = TileSizes(*(int(value) for value in values), path=path)
        for name in ("rows", "keys", "warps"):
            value = getattr(size, name)
            at_least = "" if name == "warps" else " of at least 16"
            if value & (value - 1) or (name != "warps" and value < 16) or value < 1:
                raise ValueError(f"{ENVIRONMENT_VARIABLE}: {name} must be a power of two{at_least}, got {part!r}")
        if size.stages < 1:
            raise ValueError(f"{ENVIRONMENT_VARIABLE}: stages must be at least 1, got {part!r}")
        forced[kernel] = size
    return forced
