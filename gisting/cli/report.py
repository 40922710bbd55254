"""``gisting report``: compare finished internalisations with their controls, the full prompt and prefix caching."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.measure import Measurement
from rich.table import Table

from gisting.cli.shared import DeviceOption, DtypeOption, err, json_option, load_patched, out, print_json

__all__ = ["report"]


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Output directories of gisting internalize: the staged run and its controls.")
    ],
    prices: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON file with currency, input_per_million, cached_input_per_million, output_per_million "
            "and, optionally, training_per_million and finetuned_factor."
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="A metric by which all runs were scored. [default: the first one]")
    ] = None,
    time: Annotated[
        bool, typer.Option("--time", help="Also measure the time of a request, with the first run's model.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at once, with --time.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds, with --time.")] = 30,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    output: Annotated[Path | None, typer.Option(help="Markdown file for the report.")] = None,
    as_json: Annotated[bool, json_option("an object for each line of the tables")] = False,
) -> None:
    """Compare the costs and scores of internalised runs.

    The report has tokens, score, cost and time of a request for the staged run and its controls, for the full prompt
    and for the full prompt with a prefix cache, and then the staged run stage by stage. The runs must have been
    evaluated on the same records.

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
    from gisting.internalize.comparison import Times
    from gisting.measure.requests import serving
    from gisting.measure.rows import environment

    model, tokenizer = load_patched(str(run), None, dtype, device, is_to_be_trained=True)
    if tokenizer.is_encoder_decoder:
        return report.noted("Times are left out, because only decoders with a prefix cache are timed.")
    num_answer_tokens = max(1, round(report.rows[0].output_tokens))
    rows = serving(
        model,
        tokenizer,
        report.full,
        report.prompt,
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
    """A table that is turned, with a column for each row of ``cells``, if its words would not fit in the terminal."""
    table = _table(cells, title)
    is_too_wide = Measurement.get(out, out.options.update(max_width=1_000), table).minimum > out.width
    return _table([*zip(*cells, strict=True)], title) if is_too_wide else table


def _table(cells: list[tuple[str, ...]], title: str | None) -> Table:
    header, *rows = cells
    table = Table(title=title)
    for column in header:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
