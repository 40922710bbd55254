"""Compare attention in pieces with the same attention under a dense mask on a CPU, alternating in one process.

Place in the flow: ``gisting.attention`` -> **cpu_attention** -> rows and a table. Both are ``impl="sdpa"``: the way it
chooses by itself, and the way it falls back to where pieces do not pay. Nothing is reported unless outputs and
gradients agree, nor where pieces are not chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.cells import spread_cell
from benchmarks.command import OutputOption, Rows, numbers, where
from gisting.attention.pieces import plan_if_cheaper
from gisting.attention.sdpa import dense_attention, sdpa_attention
from gisting.errors import GistError
from gisting.markdown import markdown_table
from gisting.measure.progress import tracked
from gisting.measure.rows import spread
from gisting.visibility import Visibility, gist

__all__ = ["LAYOUTS", "CpuAttentionRow", "attention_table", "main", "measure"]

HEADS, HEAD_SIZE = 8, 64
#: Rounds by length; at 8,192 tokens one round takes seconds.
REPEATS = {512: 50, 2048: 15, 8192: 5}


def one_prompt(num_tokens: int) -> Visibility:
    """Half of the tokens are prompt, then come 16 gist tokens, then the rest."""
    index = torch.arange(num_tokens)[None]
    return gist((index >= num_tokens // 2) & (index < num_tokens // 2 + 16))


def packed(num_tokens: int) -> Visibility:
    """Documents of 256 tokens, each with a prompt of 128 tokens, 8 gist tokens, and the rest."""
    index = torch.arange(num_tokens)[None]
    return gist((index % 256 >= 128) & (index % 256 < 136), documents=index // 256)


LAYOUTS: dict[str, Callable[[int], Visibility]] = {"gist": one_prompt, "packed": packed}


@dataclass(frozen=True)
class CpuAttentionRow:
    """One layout at one length, batch size 1; ``ratio`` is dense over pieces, low and high are quartiles."""

    layout: str
    num_tokens: int
    is_training: bool  # forward and backward, or forward alone
    num_pieces: int
    share_seen: float
    pieces_ms: float
    pieces_ms_low: float
    pieces_ms_high: float
    dense_ms: float
    dense_ms_low: float
    dense_ms_high: float
    ratio: float
    find_ms: float  # to find the pieces, once per batch
    num_repeats: int
    num_heads: int = HEADS
    head_size: int = HEAD_SIZE
    dtype: str = "float32"


def measure(layout: str, num_tokens: int, *, repeats: int) -> list[CpuAttentionRow]:
    """Time both ways alternately: the forward pass, then forward and backward.

    Args:
        layout: one of ``LAYOUTS``.
        num_tokens: N; queries and keys are the same tokens.
        repeats: measured rounds.

    Returns:
        A row for the forward pass and one for forward and backward, with medians and quartiles.

    Raises:
        GistError: outputs or gradients differ, or pieces are not chosen for this layout on this machine.
    """
    visibility = LAYOUTS[layout](num_tokens)
    start = time.perf_counter()
    plan = plan_if_cheaper(visibility, num_tokens, HEADS * HEAD_SIZE)
    find_ms = 1000 * (time.perf_counter() - start)
    if plan is None:
        raise GistError(
            f"pieces are not chosen for layout {layout!r} at {num_tokens} tokens; there is nothing to compare"
        )
    generator = torch.Generator().manual_seed(num_tokens)
    q, k, v, upstream = (torch.randn(1, HEADS, num_tokens, HEAD_SIZE, generator=generator) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    options: dict[str, Any] = {"bias": None, "sinks": None, "scale": HEAD_SIZE**-0.5, "dropout": 0.0}
    ways: dict[str, Callable[[], Tensor]] = {
        "pieces": lambda: sdpa_attention(q, k, v, visibility, **options),
        "dense": lambda: dense_attention(q, k, v, visibility, **options),
    }

    def forward(way: str) -> Tensor:
        with torch.no_grad():
            return ways[way]()

    def both(way: str) -> tuple[Tensor, ...]:
        out = ways[way]()
        return (out.detach(), *torch.autograd.grad(out, leaves, upstream))

    _gate(layout, both("pieces"), both("dense"))
    rows = []
    for run, is_training in ((forward, False), (both, True)):
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way in ways:
                start = time.perf_counter()
                run(way)
                times[way].append(1000 * (time.perf_counter() - start))
        pieces, dense = (spread(times[way]) for way in ("pieces", "dense"))
        rows.append(
            CpuAttentionRow(
                layout=layout,
                num_tokens=num_tokens,
                is_training=is_training,
                num_pieces=sum(len(group.steps) for group in plan.groups),
                share_seen=visibility.to_dense().count_nonzero().item() / num_tokens**2,
                pieces_ms=pieces[1],
                pieces_ms_low=pieces[0],
                pieces_ms_high=pieces[2],
                dense_ms=dense[1],
                dense_ms_low=dense[0],
                dense_ms_high=dense[2],
                ratio=dense[1] / pieces[1],
                find_ms=find_ms,
                num_repeats=repeats,
            )
        )
    return rows


def attention_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of the JSONL file as Markdown."""
    lines = [
        [
            row["layout"],
            f"{row['num_tokens']:,}",
            "forward and backward" if row["is_training"] else "forward",
            spread_cell(row, "pieces_ms", 1),
            spread_cell(row, "dense_ms", 1),
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    first = rows[0]
    text = [
        *markdown_table(("layout", "tokens", "pass", "by pieces, ms", "dense mask, ms", "ratio"), lines),
        "",
        f"Batch 1, {first['num_heads']} heads of {first['head_size']}, {first['dtype']}; medians of alternating runs, "
        f"quartiles in brackets ({where(first, 'threads', 'torch')}).",
    ]
    return "\n".join(text)


def _gate(layout: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Check that outputs and gradients agree.

    Both sum the same float32 numbers, over thousands of keys or rows, in different orders, so 200 machine epsilons of
    the largest number are allowed. One pair of row and key too many or too few differs by a hundred times that.
    """
    for name, have, want in zip(("the output", "dq", "dk", "dv"), found, expected, strict=True):
        allowed = 200 * torch.finfo(want.dtype).eps * want.abs().max()
        difference = (have - want).abs().max()
        if not difference <= allowed:
            raise GistError(
                f"{name} by pieces differs from dense by {difference:.2e} (allowed {allowed:.2e}) for layout "
                f"{layout!r}; no time is reported"
            )


def main(
    output: OutputOption = None,
    tokens: Annotated[str, typer.Option(help="Lengths to measure, comma-separated.")] = "512,2048,8192",
    repeats: Annotated[int | None, typer.Option(min=1, help="Measured rounds; by default 50, 15 and 5.")] = None,
) -> None:
    """Attention on this CPU: in pieces, against one dense mask.

    Example: python -m benchmarks cpu-attention --output docs/results/cpu_attention.jsonl
    """
    rows = Rows("cpu-attention", output, "cpu")
    cells = [(layout, num_tokens) for layout in LAYOUTS for num_tokens in numbers("--tokens", tokens)]
    for layout, num_tokens in tracked(cells, "measuring"):
        rows.add(measure(layout, num_tokens, repeats=repeats or REPEATS.get(num_tokens, 5)))
    rows.show(attention_table)
