"""``gisting cost``: FLOPs and bytes of a request with no cache, a prefix cache and a gist cache."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from gisting.cli.shared import err, json_option, out, print_json, read_dtype
from gisting.errors import GistError

if TYPE_CHECKING:
    from gisting.eval.cost import RequestCost

__all__ = ["cost"]


def cost(
    model: Annotated[
        str,
        typer.Argument(
            help="A config.json, a directory with one, or a repository on the Hugging Face hub. No weights are read."
        ),
    ],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the repeated prompt.")],
    input_tokens: Annotated[int, typer.Option(min=1, help="Length of the text after it in a request.")],
    num_gist_tokens: Annotated[int, typer.Option("--num-gist-tokens", "-k", min=1, help="Number of gist tokens.")] = 1,
    output_tokens: Annotated[
        int, typer.Option(min=1, help="Length of the answer; with 1, only the first pass is counted.")
    ] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of concurrent requests, for the memory they use.")] = 1,
    requests_per_day: Annotated[
        int | None, typer.Option(min=1, help="Also show a day's FLOPs, with answers of --output-tokens.")
    ] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Also show the bytes to keep this many prompts.")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the cached states: float32, bfloat16 or float16.")] = "bfloat16",
    as_json: Annotated[bool, json_option("an object per kind of cache")] = False,
) -> None:
    """Count what a request costs with no cache, a prefix cache and a gist cache.

    Counts FLOPs, as torch's FLOP counter does (matrix products, logits at every token that is run), and the bytes of
    keys and values. Only the configuration is read, so it takes seconds whatever the size of the model. The example
    below is row 0 of LLaMA-7B in the tables published with the gisting paper: num_prompt_tokens there is prompt and
    input together, 58 tokens, of which 34 are the input; the row's 768 and 450 GFLOPs are counted up to the first token
    with "no cache" (standard) and "gist cache" (gist).

    Example: gisting cost huggyllama/llama-7b --prompt-tokens 24 --input-tokens 34 -k 1
    """
    from gisting.eval.cost import request_costs
    from gisting.models.registry import position_limit

    states_dtype = read_dtype(dtype)
    config = _configuration(model)
    rows = request_costs(
        config,
        prompt_tokens,
        input_tokens,
        num_gist_tokens,
        output_tokens=output_tokens,
        batch_size=batch_size,
        dtype=states_dtype,
    )
    limit, longest = position_limit(config), prompt_tokens + input_tokens + output_tokens
    if limit is not None and longest > limit:
        err.print(
            f"note: prompt, input and answer have {longest:,} tokens, but the model has only {limit:,} positions",
            highlight=False,
            soft_wrap=True,
        )
    if as_json:
        asked = {"model": model, "model_type": config.model_type, "requests_per_day": requests_per_day}
        asked |= {"prompt_tokens": prompt_tokens, "input_tokens": input_tokens, "num_gist_tokens": num_gist_tokens}
        asked |= {"num_prompts": prompts}
        for row in rows:
            print_json(asked | _as_dict(row, rows, requests_per_day, prompts))
        return
    out.print(_table(rows, requests_per_day, prompts))
    for sentence in _legend(rows, bool(config.is_encoder_decoder)):
        out.print(sentence, highlight=False)


def _configuration(model: str) -> Any:
    from transformers import AutoConfig

    from gisting.models.adapters import read_about

    try:
        try:
            return AutoConfig.from_pretrained(model)
        except (OSError, TypeError, ValueError):
            about = read_about(model)
            if about is None or not about["base"]:
                raise
            return AutoConfig.from_pretrained(about["base"])
    except (OSError, TypeError, ValueError) as error:
        raise GistError(
            f"{model} has no configuration that transformers can read; give a config.json, a directory with one, or a "
            f"repository on the hub ({error})"
        ) from error


def _as_dict(
    row: RequestCost, rows: list[RequestCost], requests_per_day: int | None, num_prompts: int | None
) -> dict[str, Any]:
    others = [other for other in rows if other is not row]
    return {
        **asdict(row),
        "prompts_per_gb": row.prompts_per_gb,
        "saved_to_first_token": {other.mode: row.saved_to_first_token(other) for other in others},
        "saved": {other.mode: row.saved(other) for other in others},
        "pflops_per_day": None if requests_per_day is None else row.pflops_per_day(requests_per_day),
        "storage_bytes": None if num_prompts is None else row.storage_bytes(num_prompts),
    }


def _table(rows: list[RequestCost], requests_per_day: int | None, num_prompts: int | None) -> Table:
    from gisting.eval.cost import format_bytes

    first = rows[0]
    table = Table("", *(row.mode for row in rows))
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, cells: list[str]) -> None:
        table.add_row(name, *cells)

    add("cached tokens", [f"{row.num_cached_tokens:,}" for row in rows])
    add("new tokens", [f"{row.num_new_tokens:,}" for row in rows])
    add("GFLOPs to the first token", [_giga(row.first_token_flops) for row in rows])
    if first.num_output_tokens > 1:
        add(f"GFLOPs of {first.num_output_tokens:,} tokens", [_giga(row.answer_flops) for row in rows])
    add("GFLOPs to fill the cache", [_giga(row.fill_flops) if row.fill_flops else "-" for row in rows])
    if requests_per_day is not None:
        add(
            f"PFLOPs for {requests_per_day:,} requests",
            [_number(row.pflops_per_day(requests_per_day)) for row in rows],
        )
    add("kept per prompt", [format_bytes(row.prompt_bytes) if row.prompt_bytes else "-" for row in rows])
    add("prompts per GB", ["-" if row.prompts_per_gb is None else f"{row.prompts_per_gb:,}" for row in rows])
    if num_prompts is not None:
        kept = [row.storage_bytes(num_prompts) for row in rows]
        add(f"kept for {num_prompts:,} prompts", [format_bytes(number) if number else "-" for number in kept])
    add(f"in use, {first.batch_size:,} at once", [format_bytes(row.batch_bytes) for row in rows])
    return table


def _legend(rows: list[RequestCost], is_encoder_decoder: bool) -> list[str]:
    *others, gist = rows
    parts = []
    for other in others:
        name = "a prefix cache" if other.num_cached_tokens else "no cache"
        part = f"{_share(gist.saved_to_first_token(other))} compared with {name}"
        if gist.num_output_tokens > 1:
            part += f" ({_share(gist.saved(other))} over the whole answer)"
        parts.append(part)
    sentences = [f"FLOPs that the gist cache saves up to the first token: {', '.join(parts)}."]
    if is_encoder_decoder:
        sentences.append(
            "No prefix cache: an encoder reads in both directions, so a prompt's states depend on the text after it."
        )
    sentences.append(
        f"States are in {gist.dtype}; 1 GB = 10^9 bytes. In use are the keys and values at the last token, each "
        "request with its own copy of the prompt's. FLOPs are not time."
    )
    return sentences


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _giga(flops: int) -> str:
    return _number(flops / 1e9)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1e4 else f"{value:,.5g}"
