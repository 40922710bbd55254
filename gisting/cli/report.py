"""``gisting report``: finished internalisations beside their controls, the full prompt and prefix caching."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gisting.cli.shared import DeviceOption, DtypeOption, err, json_option, load_patched, out, print_json

__all__ = ["report"]


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Directories that gisting internalize wrote: the staged run, its controls.")
    ],
    prices: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON file with currency, input_per_million, cached_input_per_million, output_per_million "
            "and, if they count, training_per_million and finetuned_factor."
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="One that all runs were scored by. [default: the first of them]")
    ] = None,
    time: Annotated[
        bool, typer.Option("--time", help="Also measure the time of a request, with the first run's model.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="With --time: requests at once.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="With --time: measured rounds.")] = 30,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    output: Annotated[Path | None, typer.Option(help="Markdown file for the report.")] = None,
    as_json: Annotated[bool, json_option("an object for each line of the tables")] = False,
) -> None:
    """Compare what internalised runs cost and score.

    Tokens, score, cost and time of a request for the staged run and its controls, beside the full prompt and the full
    prompt behind a prefix cache; then the staged run stage by stage. The runs must have been asked the same.

    Example: gisting report runs/in-stages runs/full runs/bare --prices prices.yaml --time --output report.md
    """
    from gisting.internalize.prices import load_prices
    from gisting.internalize.report import make_report
    from gisting.storage import write_atomically

    found = make_report(runs, None if prices is None else load_prices(prices), metric=metric)
    if time:
        found = _timed(found, runs[0], batch_size, repeats, dtype, device)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, found.markdown().encode())
    if as_json:
        for item in found.items():
            print_json(item)
    else:
        out.print(_shown(found.request_cells()))
        if found.stages:
            out.print(_shown(found.stage_cells(), "by stage"))
        for sentence in found.legend():
            out.print(sentence, highlight=False)
    if output is not None:
        err.print(f"written to {output}", highlight=False, soft_wrap=True)


def _timed(report: Any, run: Path, batch_size: int, repeats: int, dtype: str, device: str) -> Any:
    from gisting.internalize.report import Times
    from gisting.measure.requests import serving
    from gisting.measure.rows import environment

    model, tokenizer = load_patched(str(run), None, dtype, device, is_to_be_trained=True)
    if tokenizer.is_encoder_decoder:
        return report.noted("Times are left out: what is timed is a decoder behind a prefix cache.")
    num_answer_tokens = max(1, round(report.rows[0].output_tokens))
    rows = serving(
        model,
        tokenizer,
        report.full,
        report.template,
        batch_size=batch_size,
        shorter=report.shorter,
        num_answer_tokens=num_answer_tokens,
        repeats=repeats,
    )
    about = environment()
    return report.timed(
        Times(
            {
                row.mode: (1000 / row.requests_per_s, 1000 / row.requests_per_s_high, 1000 / row.requests_per_s_low)
                for row in rows
            },
            f"{num_answer_tokens} tokens by stock generate, batch size {batch_size}: median (quartiles) of {repeats} "
            f"alternating rounds with the model of {run.resolve().name} ({device}, {about['device']}, "
            f"{about['threads']} threads, torch {about['torch']}, transformers {about['transformers']})",
        )
    )


def _shown(cells: list[tuple[str, ...]], title: str | None = None) -> Table:
    header, *rows = cells
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    return table
