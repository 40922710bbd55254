"""``gisting compare``: answers from the gist, from the full prompt and without a prompt, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gisting.cli.caches import held_prompts, open_store
from gisting.cli.shared import (
    DeviceOption,
    DtypeOption,
    KOption,
    ModelArgument,
    TemplateOption,
    json_option,
    load_patched,
    out,
    plain,
    print_json,
    wanted_k,
)
from gisting.errors import GistError
from gisting.tokens.text import read_text

__all__ = ["CacheOption", "PromptFileOption", "StoreOption", "check_text", "compare", "given_prompt"]

CacheOption = Annotated[Path | None, typer.Option(help="A cache file that holds one prompt.")]
StoreOption = Annotated[Path | None, typer.Option(help="Directory of a store, instead of a file.")]
PromptFileOption = Annotated[Path | None, typer.Option(help="A text file that is the prompt, instead of --prompt.")]


def compare(
    model: ModelArgument,
    cache: CacheOption = None,
    store: StoreOption = None,
    name: Annotated[str | None, typer.Option(help="With --store: name of the prompt.")] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="The prompt's text, which neither a cache file nor a store keeps. Without --cache and --store, it is "
            "compressed first."
        ),
    ] = None,
    prompt_file: PromptFileOption = None,
    num_gist_tokens: KOption = None,
    input: Annotated[list[str] | None, typer.Option(help="An input; may be repeated. By default an empty one.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 64,
    template: TemplateOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: Annotated[bool, json_option("an object for each input, with the three answers and their costs")] = False,
) -> None:
    """Show answers from the gist, from the full prompt and without a prompt, side by side.

    The controls are ordinary text for the model as it is. Each answer comes with the tokens read for it, the bytes to
    keep for the prompt, and its times; and gist and full prompt with the first token in which they differ and the share
    of equal tokens. Decoding is greedy.

    Example: gisting compare runs/demo --prompt 'please reverse the letters , answer plainly' --input 'a b c d e'

    Example: gisting compare runs/demo --store gists --name capitals --prompt 'write capitals' --input 'a b c d e'
    """
    from gisting.generation import compress
    from gisting.measure.compare import compare as run
    from gisting.models.load import trained_chunk_length

    text = given_prompt(prompt, prompt_file)
    is_given = cache is not None or store is not None
    if text is None:
        raise GistError(
            "give the prompt's text for the full prompt's answers: --prompt TEXT or --prompt-file FILE"
            + (", since neither a cache file nor a store keeps it" if is_given else "")
        )
    if is_given and num_gist_tokens is not None:
        raise GistError("-k is for a prompt that is compressed here; leave it out with --cache and --store")
    if not is_given and name is not None:
        raise GistError("--name needs --store")
    held = held_prompts(cache, store, [] if name is None else [name]) if is_given else None
    loaded, tokenizer = load_patched(model, template, dtype, device)
    if held is None:
        k, chunk_length = wanted_k(loaded, num_gist_tokens), trained_chunk_length(loaded)
        held = compress(loaded, tokenizer, [text], k, chunk_length=chunk_length)
    elif store is not None and name is not None:
        check_text(tokenizer, text, store, name)
    found = run(loaded, tokenizer, input or [""], prompt=text, cache=held.to(device), max_new_tokens=max_new_tokens)
    if as_json:
        for one in found:
            print_json(one.to_row())
        return
    for one in found:
        _show(one, tokenizer, held.num_gist_tokens[0])
    if len(found) > 1:
        mean = sum(one.agreement for one in found) / len(found)
        out.print(f"Mean agreement over {len(found)} inputs: {100 * mean:.0f} %.", highlight=False)
    out.print(
        "Greedy, one run each. Full prompt and no prompt are read as ordinary text. Kept between requests: the gist's "
        "states, or the full prompt's in a prefix cache.",
        highlight=False,
    )


def given_prompt(prompt: str | None, prompt_file: Path | None) -> str | None:
    """Return the text of the prompt that a command was given, or None."""
    if prompt is not None and prompt_file is not None:
        raise GistError("give either --prompt or --prompt-file, not both")
    return prompt if prompt_file is None else read_text(prompt_file)


def check_text(tokenizer: Any, text: str, store: Path, name: str) -> None:
    """Raise unless the text can be that of the entry with this name."""
    from gisting.measure.compare import check_prompt

    held = open_store(store)
    if name in held:  # not the beginning of a key
        check_prompt(tokenizer, text, held.entry(name).num_prompt_tokens, name)


def _show(found: Any, tokenizer: Any, k: int) -> None:
    from gisting.eval.cost import format_bytes

    # A table without a title, because a title is centred and an input may be long.
    out.print(f"input: {plain(found.input)}", highlight=False)
    table = Table(expand=True)
    table.add_column("", no_wrap=True)
    for header in (f"gist, k = {k}", "full prompt", "no prompt"):
        table.add_column(header, ratio=1, overflow="fold")
    answers = (found.gist, found.prompt, found.no_prompt)
    table.add_row("answer", *("\n".join(map(plain, one.text.splitlines())) for one in answers), end_section=True)
    table.add_row("tokens read", *(f"{one.num_read_tokens:,}" for one in answers))
    table.add_row("bytes kept", *(format_bytes(one.kept_bytes, 1) for one in answers))
    table.add_row("first token", *(f"{one.first_token_ms:,.1f} ms" for one in answers))
    table.add_row("total", *(f"{one.total_ms:,.1f} ms" for one in answers))
    out.print(table)
    out.print(f"gist against full prompt: {_parting(found, tokenizer)}\n", highlight=False)


def _parting(found: Any, tokenizer: Any) -> str:
    ours, theirs, place = found.gist.token_ids, found.prompt.token_ids, found.parts_at
    if place is None:
        return f"the same {len(ours)} tokens"
    first, second = (
        repr(tokenizer.tokenizer.decode(ids[place : place + 1])) if place < len(ids) else "the end"
        for ids in (ours, theirs)
    )
    return (
        f"{found.num_equal_tokens} of {max(len(ours), len(theirs))} tokens equal ({100 * found.agreement:.0f} %); they "
        f"part at token {place + 1}: {first} against {second}"
    )
