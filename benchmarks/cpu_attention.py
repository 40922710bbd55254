"""What attention by pieces saves on a CPU, beside the same attention with a dense mask, alternating in one process.

Both are ``impl="sdpa"``: what it chooses by itself, and the way it takes where pieces do not serve. Nothing is reported
unless outputs and gradients of the two agree, and where pieces are not what is chosen.

    python -m benchmarks.cpu_attention --output docs/results/cpu_attention.jsonl
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gisting.attention.pieces import plan_if_cheaper
from gisting.attention.sdpa import dense_attention, sdpa_attention
from gisting.errors import GistError
from gisting.measure.progress import tracked
from gisting.measure.rows import append_row, spread
from gisting.visibility import Visibility, gist

__all__ = ["LAYOUTS", "CpuAttentionRow", "attention_table", "measure"]

HEADS, HEAD_SIZE = 8, 64
# {tokens: rounds}; at 8,192 one round takes seconds.
REPEATS = {512: 50, 2048: 15, 8192: 5}


def one_prompt(num_tokens: int) -> Visibility:
    """Half the tokens prompt, then 16 gist tokens, then the rest."""
    index = torch.arange(num_tokens)[None]
    return gist((index >= num_tokens // 2) & (index < num_tokens // 2 + 16))


def packed(num_tokens: int) -> Visibility:
    """Documents of 256 tokens: 128 of prompt, 8 gist tokens, the rest."""
    index = torch.arange(num_tokens)[None]
    return gist((index % 256 >= 128) & (index % 256 < 136), documents=index // 256)


LAYOUTS: dict[str, Callable[[int], Visibility]] = {"gist": one_prompt, "packed": packed}


@dataclass(frozen=True)
class CpuAttentionRow:
    """One layout at one length, batch 1; ``ratio`` is dense over pieces, low and high are quartiles."""

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
    find_ms: float  # to find the pieces, once per batch and in no other number
    num_repeats: int
    num_heads: int = HEADS
    head_size: int = HEAD_SIZE
    dtype: str = "float32"


def measure(layout: str, num_tokens: int, *, repeats: int) -> list[CpuAttentionRow]:
    """Both ways in turn: the forward pass, then forward and backward.

    Args:
        layout: one of ``LAYOUTS``.
        num_tokens: N; queries and keys are the same tokens.
        repeats: measured rounds.

    Returns:
        A row without and one with the backward pass: medians and quartiles.

    Raises:
        GistError: outputs or gradients differ, or pieces are not what is chosen for this layout on this machine.
    """
    visibility = LAYOUTS[layout](num_tokens)
    start = time.perf_counter()
    plan = plan_if_cheaper(visibility, num_tokens, HEADS * HEAD_SIZE)
    find_ms = 1000 * (time.perf_counter() - start)
    if plan is None:
        raise GistError(f"pieces are not chosen for layout {layout!r} at {num_tokens} tokens; there is nothing to time")
    generator = torch.Generator().manual_seed(num_tokens)
    q, k, v, upstream = (torch.randn(1, HEADS, num_tokens, HEAD_SIZE, generator=generator) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    options: dict[str, Any] = {"bias": None, "scale": HEAD_SIZE**-0.5, "dropout": 0.0}
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
    """Rows of the JSONL file as Markdown."""
    lines = ["| layout | tokens | pass | by pieces, ms | dense mask, ms | ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['layout']} | {row['num_tokens']:,} | {_pass(row['is_training'])} | "
            f"{_spread(row, 'pieces')} | {_spread(row, 'dense')} | {row['ratio']:.2f} |"
        )
    first = rows[0]
    lines += [
        "",
        f"Batch 1, {first['num_heads']} heads of {first['head_size']}, {first['dtype']}; medians of alternating runs, "
        f"quartiles in brackets ({first['device']}, {first['threads']} threads, torch {first['torch']}).",
    ]
    return "\n".join(lines)


def _pass(is_training: bool) -> str:
    return "forward and backward" if is_training else "forward"


def _spread(row: dict[str, Any], way: str) -> str:
    return f"{row[f'{way}_ms']:,.1f} ({row[f'{way}_ms_low']:,.1f}–{row[f'{way}_ms_high']:,.1f})"


def _gate(layout: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Two orders of the same float32 sums over thousands of keys or rows: 200 machine epsilons of the largest number
    are granted; a pair of row and key too many or too few shows at a hundred times that.
    """
    for name, have, want in zip(("the output", "dq", "dk", "dv"), found, expected, strict=True):
        allowed = 200 * torch.finfo(want.dtype).eps * want.abs().max()
        difference = (have - want).abs().max()
        if not difference <= allowed:
            raise GistError(
                f"{name} by pieces differs from dense by {difference:.2e} (allowed {allowed:.2e}) for layout "
                f"{layout!r}; no time is reported"
            )


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_attention", description="Time attention by pieces on this CPU."
    )
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to which the rows are added")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(REPEATS), help="lengths to measure")
    parser.add_argument("--repeats", type=int, help="measured rounds, in place of 50, 15 and 5 by length")
    options = parser.parse_args(arguments)
    table = Table("layout", "tokens", "pass", "pieces", "seen", "by pieces, ms", "dense mask, ms", "ratio")
    cells = [(layout, num_tokens) for layout in LAYOUTS for num_tokens in options.tokens]
    for layout, num_tokens in tracked(cells, "measuring"):
        for row in measure(layout, num_tokens, repeats=options.repeats or REPEATS.get(num_tokens, 5)):
            append_row(options.output, asdict(row))
            table.add_row(
                row.layout,
                f"{row.num_tokens:,}",
                _pass(row.is_training),
                str(row.num_pieces),
                f"{100 * row.share_seen:.1f} %",
                _spread(asdict(row), "pieces"),
                _spread(asdict(row), "dense"),
                f"{row.ratio:.2f}",
            )
    Console().print(table)


if __name__ == "__main__":
    _main()
