"""``gisting check``: is the gist of a prompt good enough?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from gisting.cli.caches import held_entry, held_prompts, open_store, template_for
from gisting.cli.compare import CacheOption, PromptFileOption, StoreOption, check_text, given_prompt
from gisting.cli.shared import (
    DeviceOption,
    DtypeOption,
    ModelArgument,
    TemplateOption,
    err,
    json_option,
    load_patched,
    out,
    plain,
    print_json,
)
from gisting.errors import GistError
from gisting.measure.progress import progress_bar
from gisting.tokens.text import read_text

if TYPE_CHECKING:
    from gisting.eval.check import GistCheck
    from gisting.store import StoreEntry

__all__ = ["check", "print_check"]

_NUM_SHOWN = 8  # lost spans


def check(
    model: ModelArgument,
    cache: CacheOption = None,
    store: StoreOption = None,
    name: Annotated[str | None, typer.Option(help="With --store: name of the prompt.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The prompt's text, which neither a cache file nor a store keeps.")
    ] = None,
    prompt_file: PromptFileOption = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            help="A file of what users ask, as for `gisting distill`: text with one input per line, or data with "
            "`input`. By default built-in requests and questions about the prompt."
        ),
    ] = None,
    swapped_cache: Annotated[
        Path | None,
        typer.Option(help="A cache file with the gist of another prompt, for the swapped control."),
    ] = None,
    swapped_name: Annotated[
        str | None, typer.Option(help="With --store: name of another prompt, for the swapped control.")
    ] = None,
    swapped_prompt_file: Annotated[
        Path | None,
        typer.Option(
            help="A text file that is another prompt, which the model compresses for the swapped control. By default a "
            "built-in one."
        ),
    ] = None,
    at_least: Annotated[
        float | None, typer.Option(help="Exit with code 1 unless the gist keeps at least this share, such as 0.9.")
    ] = None,
    save: Annotated[bool, typer.Option(help="Write the figures into the file or the store.")] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers per batch.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the sampled answers.")] = 0,
    template: TemplateOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: Annotated[bool, json_option("one object, with every figure, span and answer")] = False,
) -> None:
    """Measure how much of a prompt's effect its gist keeps, and which exact words it lost.

    The model answers with the whole prompt in view; the answers from the gist are compared with these token by token,
    beside three controls: no prompt, the first tokens of the prompt, and the gist of another prompt. Names, numbers and
    addresses of the prompt are asked for. The figures are kept with the gist, for `inspect` and `store list`.

    Example: gisting check runs/demo --store gists --name capitals --prompt 'write capitals' --max-new-tokens 8

    Example: gisting check ./model --cache system.gist.safetensors --prompt-file system.txt --inputs questions.txt
    --at-least 0.9
    """
    from gisting.data.prompts import load_inputs
    from gisting.eval.check import GistChecker, check_at_least, check_caches

    check_at_least(at_least)
    text = given_prompt(prompt, prompt_file)
    if text is None:
        raise GistError(
            "give the prompt's text, which neither a cache file nor a store keeps: --prompt TEXT or --prompt-file FILE"
        )
    if sum(given is not None for given in (swapped_cache, swapped_name, swapped_prompt_file)) > 1:
        raise GistError("give one of --swapped-cache, --swapped-name and --swapped-prompt-file")
    if swapped_name is not None and store is None:
        raise GistError("--swapped-name needs --store; a cache file has no names")
    # Before it is read: what replaces it meanwhile is not what the figures are about.
    entry = held_entry(store, name) if store is not None and name is not None and cache is None else None
    held = held_prompts(cache, store, [] if name is None else [name])
    swapped = None if swapped_prompt_file is None else read_text(swapped_prompt_file)
    if swapped_cache is not None or swapped_name is not None:
        names = [] if swapped_name is None else [swapped_name]
        swapped = held_prompts(swapped_cache, store if swapped_name else None, names).to(device)
    loaded, tokenizer = load_patched(model, template or template_for(model, held), dtype, device, is_to_be_trained=True)
    if store is not None and name is not None:
        check_text(tokenizer, text, store, name)
    held = held.to(device)
    check_caches(loaded, tokenizer, held, swapped)
    asked = None if inputs is None else load_inputs(inputs)
    with progress_bar("checking", GistChecker.num_steps(text, asked, num_checks=1)) as advance:
        checker = GistChecker(
            loaded,
            tokenizer,
            text,
            asked,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            progress=advance,
        )
        found = checker.check(held, swapped)
    where = None
    try:
        where = _save(found, cache, store, entry) if save else None
    finally:  # a file that cannot be written does not take the figures with it
        if as_json:
            print_json({**found.to_row(), "saved_in": where})
        else:
            print_check(found, has_inputs=asked is not None, is_swapped_given=swapped is not None)
    if where is not None and not as_json:
        err.print(f"saved in {where}", highlight=False, soft_wrap=True)
    if at_least is not None and (found.kept is None or found.kept < at_least):
        if found.kept is None:
            raise GistError(f"{_kept_in_words(found)}; give inputs whose answers depend on the prompt")
        raise GistError(f"{_kept_in_words(found)}, less than {at_least:g}; take more gist tokens or the whole prompt")


def _save(found: GistCheck, cache: Path | None, store: Path | None, entry: StoreEntry | None) -> str:
    """Write the figures into the file or the store, and return which."""
    from gisting import storage
    from gisting.cache import GistCache

    quality = found.quality()
    if cache is not None:
        kept_as = storage.inspect(cache)["storage"]
        GistCache.load(cache).with_about(quality=quality).save(cache, kept_as)
        return str(cache)
    if entry is not None:
        held = open_store(store, is_read_only=False)
        held.note(entry.name or entry.key, expected_sha256=entry.sha256, quality=quality)
    return str(store)


def print_check(found: GistCheck, *, has_inputs: bool, is_swapped_given: bool) -> None:
    """Print what was found out about a gist.

    Args:
        found: the check.
        has_inputs: whether the inputs were the user's.
        is_swapped_given: whether the gist of the other prompt was.
    """
    settings = found.settings
    out.print(
        f"A prompt of {found.num_prompt_tokens} tokens in {found.num_gist_tokens} slots; "
        f"{len(found.gist.kl)} {'inputs' if has_inputs else 'built-in inputs'}, answers of up to "
        f"{settings['max_new_tokens']} tokens sampled with the whole prompt in view (seed {settings['seed']}).\n",
        highlight=False,
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False)
    for header in (
        "",
        "KL a token,\nmedian",
        "lower and upper\nquartile",
        "mean",
        "greedy\nagreement",
        "kept\nagainst it",
    ):
        table.add_column(header, justify="left" if not header else "right", no_wrap=not header)
    labels = {"first tokens": f"first {found.num_gist_tokens} tokens"}
    for label, one in (("gist", found.gist), *found.controls.items()):
        kept = found.kept_against(label)
        table.add_row(
            labels.get(label, label),
            f"{one.median:.4f}",
            "{:.4f}  {:.4f}".format(*one.quartiles),
            f"{one.mean:.4f}",
            f"{100 * one.mean_agreement:.0f} %",
            "" if kept is None else f"{100 * kept:.0f} %",
        )
    out.print(table)
    out.print()
    for line in _notes(found, is_swapped_given=is_swapped_given):
        out.print(line, highlight=False)


def _notes(found: GistCheck, *, is_swapped_given: bool) -> list[str]:
    number, greedy = len(found.greedy.kl), found.greedy
    equal = round(number * greedy.share_identical)
    line = f"Greedy answers: {equal} of {number} are identical to those of the whole prompt"
    lines = [line + ("." if found.parts_at is None else f"; the others part at token {found.parts_at + 1:g} (median).")]
    if loops := sum(found.gist.is_loop):
        lines.append(
            f"{loops} of the sampled answers end in a loop; without them the mean is "
            f"{found.gist.mean_without_loops or 0.0:.4f}."
        )
    if found.spans:
        known, lost = found.known, found.lost
        line = f"Exact spans: {len(found.spans)} asked for, {len(known)} known with the whole prompt"
        line += f", {len(known) - len(lost)} of these from the gist." if known else "."
        shown = ", ".join(plain(span.text) for span in lost[:_NUM_SHOWN])
        if lost:
            line += f" Lost: {shown}{' and more' if len(lost) > _NUM_SHOWN else ''}."
        lines.append(line)
    if not is_swapped_given:
        lines.append(
            "Swapped is the gist of a built-in prompt, compressed by this model (that whole prompt, if the model was "
            "not trained to gist); give one that was made as this one was with --swapped-cache or --swapped-name."
        )
    if found.kept is not None and found.kept <= 0:
        lines.append(
            "It does no better than no prompt, or another prompt's gist. Is this the text that it was made from?"
        )
    lines.append(f"{_kept_in_words(found).capitalize()} (against no prompt or swapped, whichever is less).")
    return lines


def _kept_in_words(found: GistCheck) -> str:
    if found.kept is None:
        return "these inputs show no effect of the prompt, so nothing can be kept of it"
    return f"the gist keeps {found.kept:.2f} of what the prompt does"
