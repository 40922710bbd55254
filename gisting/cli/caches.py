"""``gisting compress``, ``generate``, ``inspect`` and ``store``: making, using and storing compressed prompts."""

# Over 600 lines because every option of a command is declared with its help.

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from gisting.cli.shared import (
    Commands,
    DeviceOption,
    DtypeOption,
    KOption,
    ModelArgument,
    TemplateOption,
    err,
    json_option,
    load_patched,
    out,
    plain,
    print_json,
    wanted_k,
)
from gisting.errors import GistError, StoreError
from gisting.tokens.text import read_text

if TYPE_CHECKING:
    from gisting.cache import GistCache
    from gisting.data.prompts import PromptRecord
    from gisting.eval.check import GistCheck
    from gisting.store import GistStore, StoreEntry
    from gisting.tokens import GistTokenizer
from gisting.measure.progress import progress_bar

__all__ = [
    "compress",
    "generate",
    "held_entry",
    "held_prompts",
    "inspect",
    "open_store",
    "read_lines",
    "shares_told",
    "store_app",
    "template_for",
]

_BATCH_SIZE = 32  # prompts between two steps of the progress bar

StorageOption = Annotated[
    str | None,
    typer.Option(
        help="How to store numbers: float32, bfloat16, float16, float8_e4m3 or int8. By default without loss."
    ),
]
StoreArgument = Annotated[Path, typer.Argument(help="Directory of the store.")]


def _names_in_store(context: typer.Context) -> list[str]:
    """Return the names in the store given on the command line, for the shell's completion. Typer selects from them."""
    from gisting.store.index import INDEX, Index

    folder = context.params.get("store") or context.params.get("folder")
    if folder is None or not (Path(folder) / INDEX).is_file():
        return []
    try:
        with contextlib.closing(Index(Path(folder), is_read_only=True)) as index:
            return [entry.name for entry in index.all() if entry.name is not None]
    except GistError:
        return []


def compress(
    model: ModelArgument,
    output: Annotated[
        Path | None, typer.Option(help="File for all prompts together, such as prompt.gist.safetensors.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Directory of a store, instead of a file; made if it does not exist.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated.")] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option(help="A text file that is one prompt; may be repeated.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A file of prompts: .txt with one per line; or JSON, JSON lines, CSV or Parquet with prompt and "
            "optionally name, num_gist_tokens and tools, or with messages, whose system message is the prompt."
        ),
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="With --store: a name for each --prompt and --prompt-file, in order.")
    ] = None,
    num_gist_tokens: KOption = None,
    chunk_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cut longer prompts into chunks of at most this many tokens, each with k gist tokens. By default "
            "as the checkpoint was trained.",
        ),
    ] = None,
    storage: StorageOption = None,
    at_least: Annotated[
        float | None,
        typer.Option(
            help="Instead of -k: take the smallest of 4, 8, 16 and 32 gist tokens with which a gist keeps this share "
            "of what the prompt does, such as 0.9, as `gisting check` measures it; exit with code 1 if none does."
        ),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(help="With --at-least: a file of what users ask, as for `check`, with the same default."),
    ] = None,
    template: TemplateOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: Annotated[bool, json_option("an object for each prompt")] = False,
) -> None:
    """Compress prompts into one cache file or into a store.

    Example: gisting compress runs/demo --prompt 'please reverse the letters , answer plainly' --output
    my.gist.safetensors

    Example: gisting compress runs/demo --prompts prompts.jsonl --store gists --storage bfloat16
    """
    from gisting.data.prompts import load_inputs, load_prompts
    from gisting.eval.check import check_at_least
    from gisting.models.load import load_tokenizer, trained_chunk_length
    from gisting.storage import STORAGES, check_place

    records = _named([*(prompt or []), *(read_text(path) for path in prompt_file or [])], name or [])
    chat = functools.cache(functools.partial(load_tokenizer, model, template))
    records += [] if prompts is None else load_prompts(prompts, chat)
    if not records:
        raise GistError("give a prompt: --prompt TEXT, --prompt-file FILE or --prompts FILE")
    if (output is None) == (store is None):
        raise GistError("give either --output FILE or --store DIR")
    if storage is not None and storage not in STORAGES:
        raise GistError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
    if store is None and any(record.name for record in records):
        raise GistError("names are for a store; give --store DIR instead of --output")
    check_at_least(at_least)
    if at_least is None and inputs is not None:
        raise GistError("--inputs is for --at-least")
    if at_least is not None and (num_gist_tokens is not None or any(record.num_gist_tokens for record in records)):
        raise GistError("--at-least finds the number of gist tokens; give no other (-k, num_gist_tokens of a prompt)")
    if at_least is not None and store is not None and not all(record.name for record in records):
        raise GistError("with --at-least, each prompt in a store needs a name")
    if output is not None:
        check_place(output)
    asked = None if inputs is None else load_inputs(inputs)
    loaded, tokenizer = load_patched(model, template, dtype, device)
    chunk_length = chunk_length or trained_chunk_length(loaded)
    texts = [record.prompt for record in records]
    _say_other_prompts(model, texts)
    if at_least is None:
        found = None
        counts = [record.num_gist_tokens or wanted_k(loaded, num_gist_tokens) for record in records]
    else:
        found = _smallest(loaded, tokenizer, texts, asked, at_least, chunk_length)
        counts = [k for k, _ in found]
    if output is not None:
        from gisting.cache import GistCache
        from gisting.generation import compress as run

        if found is None:
            cache = run(loaded, tokenizer, texts, counts, chunk_length=chunk_length)
        else:
            cache = GistCache.cat([cache for _, cache in found])
        cache.to("cpu").save(output, storage)
        _print_compressed(records, cache, tokenizer, output, as_json=as_json)
        out.print(f"saved in {output} ({output.stat().st_size} bytes)", highlight=False)
    elif store is not None:
        _compress_into(store, storage, loaded, tokenizer, records, counts, chunk_length, as_json=as_json)
        for record, (_, cache) in zip(records, found or [], strict=False):
            open_store(store, is_read_only=False).note(str(record.name), **(cache.about[0] or {}))


def _smallest(
    model: Any,
    tokenizer: GistTokenizer,
    prompts: list[str],
    inputs: list[str] | None,
    at_least: float,
    chunk_length: int | None,
) -> list[tuple[int, GistCache]]:
    """Return the smallest gist of each prompt that keeps enough, with its k.

    Raises:
        GistError: a prompt has none; the message says how much each k keeps.
    """
    from gisting.data.plain import excerpt
    from gisting.eval.check import GistChecker, counts_to_try, smallest_gist
    from gisting.generation import compress as run

    found: list[tuple[int, GistCache]] = []
    for prompt, encoding in zip(prompts, tokenizer.encode_prompts(prompts, 1), strict=True):
        counts = counts_to_try(model, encoding.num_prompt_tokens)
        with progress_bar("checking", GistChecker.num_steps(prompt, inputs, len(counts))) as advance:
            checker = GistChecker(model, tokenizer, prompt, inputs, progress=advance)
            cache, checks = smallest_gist(
                lambda k, prompt=prompt: run(model, tokenizer, [prompt], k, chunk_length=chunk_length),
                checker.check,
                at_least,
                counts,
            )
        told = shares_told(counts, checks) or "it has no more tokens than the smallest gist"
        if cache is None:
            raise GistError(
                f"keep the whole prompt: no gist of {excerpt(prompt)} keeps {at_least:g} of what it does ({told}); "
                "nothing was written"
            )
        out.print(f"{excerpt(prompt)} keeps {told}", highlight=False, markup=False, soft_wrap=True)
        found.append((counts[len(checks) - 1], cache))
    return found


def shares_told(counts: Sequence[int], checks: Sequence[GistCheck]) -> str:
    """Return in words how much the gists of one prompt keep: ``0.52 with k = 4, 0.91 with k = 8``.

    Args:
        counts: the k of each.
        checks: what was found out, of some of them or of all.
    """
    shares = ["nothing to measure" if one.kept is None else f"{one.kept:.2f}" for one in checks]
    return ", ".join(f"{share} with k = {k}" for k, share in zip(counts, shares, strict=False))


def _say_other_prompts(model: str, texts: list[str]) -> None:
    """Warn about texts other than the prompt that was internalised, which the model may not be able to read."""
    from gisting.data.plain import excerpt
    from gisting.internalize.result import RESULT_NAME, load_internalized, prompt_hash

    if not (Path(model) / RESULT_NAME).is_file():
        return
    trained = load_internalized(model).prompt_sha256
    for text in texts:
        if prompt_hash(text) != trained:
            err.print(
                f"warning: {excerpt(text)} is not the prompt that {model} was trained on, so the model may be unable "
                "to read it; compare answers before using its gist",
                highlight=False,
                soft_wrap=True,
            )


def _named(texts: list[str], names: list[str]) -> list[PromptRecord]:
    from gisting.data.prompts import PromptRecord

    if names and len(names) != len(texts):
        raise GistError(
            f"--name must be given once for each --prompt and --prompt-file, {len(texts)} times, got {len(names)}"
        )
    return [PromptRecord(text, names[row] if names else None) for row, text in enumerate(texts)]


def _compress_into(
    folder: Path,
    storage: str | None,
    model: Any,
    tokenizer: GistTokenizer,
    records: list[PromptRecord],
    counts: list[int],
    chunk_length: int | None,
    *,
    as_json: bool,
) -> None:
    from gisting.store import GistStore

    store = GistStore(folder, storage=storage)
    before = len(store)
    with progress_bar("compressing", len(records)) as advance:
        for start in range(0, len(records), _BATCH_SIZE):
            rows = slice(start, start + _BATCH_SIZE)
            cache = store.get_or_compress(
                model,
                tokenizer,
                [record.prompt for record in records[rows]],
                counts[rows],
                names=[record.name for record in records[rows]],
                chunk_length=chunk_length,
            )
            if as_json or len(records) <= _BATCH_SIZE:
                _print_compressed(records[rows], cache, tokenizer, folder, as_json=as_json)
            advance(len(records[rows]))
    out.print(
        f"{len(records)} prompts in {folder}, {len(store) - before} of them new; {len(store)} entries in total",
        highlight=False,
    )


def _print_compressed(
    records: list[PromptRecord], cache: GistCache, tokenizer: GistTokenizer, place: Path, *, as_json: bool
) -> None:
    table = Table("prompt", "tokens", "gist tokens", "bytes")
    texts = [record.prompt for record in records]
    one = cache.num_bytes // (len(cache) * cache.num_slots)
    for record, encoding, k in zip(records, tokenizer.encode_prompts(texts, 1), cache.num_gist_tokens, strict=True):
        text, num_tokens = record.prompt, encoding.num_prompt_tokens
        if as_json:
            found = {"prompt": text, "name": record.name, "num_prompt_tokens": num_tokens, "num_gist_tokens": k}
            print_json({**found, "num_bytes": one * k, "saved_in": str(place)})
            continue
        shown = text if len(text) <= 60 else text[:57] + "..."
        table.add_row(plain(shown), str(num_tokens), str(k), str(one * k))
    if not as_json:
        out.print(table)


def generate(
    model: ModelArgument,
    cache: Annotated[
        Path | None, typer.Option(help="Cache file with one prompt for all inputs, or one for each.")
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Directory of a store, instead of a file.")] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="With --store: name of the prompt for all inputs, or repeated, one for each.",
            autocompletion=_names_in_store,
        ),
    ] = None,
    input: Annotated[
        list[str] | None, typer.Option(help="An input; may be repeated. By default an empty input for each prompt.")
    ] = None,
    input_file: Annotated[Path | None, typer.Option(help="A text file with one input per line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 128,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of choosing the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="With --sample.")] = 1.0,
    num_beams: Annotated[int, typer.Option(min=1, help="Number of beams; 1 for no beam search.")] = 1,
    seed: Annotated[int | None, typer.Option(help="With --sample: the same seed gives the same answer.")] = None,
    template: TemplateOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: Annotated[bool, json_option("an object for each answer, with input and output")] = False,
) -> None:
    """Answer inputs from a compressed prompt.

    Example: gisting generate runs/demo --cache my.gist.safetensors --input 'a b c d e'

    Example: gisting generate runs/demo --store gists --name capitals --input 'a b c d e'
    """
    from transformers import set_seed

    from gisting.generation import generate as run

    inputs = list(input or [])
    if input_file is not None:
        inputs += read_lines(input_file)
    held = held_prompts(cache, store, name or [])
    # A gist need not come from a model that was trained to gist: an adapter may have made it for this one.
    loaded, tokenizer = load_patched(model, template or template_for(model, held), dtype, device, is_to_be_trained=True)
    held = held.to(device)
    if seed is not None:
        set_seed(seed)
    settings: dict[str, Any] = {"do_sample": True, "temperature": temperature} if sample else {"do_sample": False}
    inputs = inputs or [""] * len(held)
    answers = run(loaded, tokenizer, inputs, cache=held, max_new_tokens=max_new_tokens, num_beams=num_beams, **settings)
    for text, answer in zip(inputs, answers, strict=True):
        if as_json:
            print_json({"input": text, "output": answer})
        else:
            out.print(answer, highlight=False, markup=False, soft_wrap=True)


def template_for(model: str, cache: GistCache) -> str | None:
    """Return the template of the cache for a model that was saved without one, as a base model of adapters is."""
    from gisting.source import find_file
    from gisting.tokens import TEMPLATES

    is_named = cache.origin.template in (*TEMPLATES, "chat")
    return cache.origin.template if is_named and find_file(model, "gist.json") is None else None


def read_lines(path: Path) -> list[str]:
    """Return the inputs in a text file that has one per line."""
    from gisting.data.sources import SUFFIXES

    if path.suffix.lower() in SUFFIXES:
        raise GistError(f"{path} has the name of a data file, not of a text with one input per line; rename it to .txt")
    text = read_text(path)
    return text.split("\n") if text else []


def held_prompts(cache: Path | None, store: Path | None, names: list[str]) -> GistCache:
    """Load the compressed prompts of a file, or of names in a store."""
    from gisting.cache import GistCache

    if (cache is None) == (store is None):
        raise GistError("give either --cache FILE or --store DIR with --name NAME")
    if cache is not None:
        if names:
            raise GistError("--name needs --store; a cache file has no names")
        return GistCache.load(cache)
    if not names:
        raise GistError("--store needs --name NAME; `gisting store list DIR` shows the names")
    held = open_store(store)
    return held.get([_whole(held, name) for name in names])


def held_entry(store: Path, name: str) -> StoreEntry:
    """Return what a store says about a name, or about a key, of which the beginning is enough."""
    held = open_store(store)
    return held.entry(_whole(held, name))


def inspect(
    file: Annotated[Path, typer.Argument(help="A cache file.")],
    as_json: Annotated[bool, json_option("one object, with the whole manifest and every tensor's shape")] = False,
) -> None:
    """Show what a cache file holds and check that it is intact.

    Example: gisting inspect my.gist.safetensors
    """
    from gisting import storage
    from gisting.cache import GistCache

    found = storage.inspect(file)
    GistCache.load(file)
    if as_json:
        print_json(found)
        return
    manifest = found["manifest"]
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for label, value in (
        ("made by", str(manifest.get("checkpoint", ""))),
        ("for model", manifest["origin"]["model"]),
        ("tokenizer", manifest["origin"]["tokenizer"]),
        ("template", manifest["origin"]["template"]),
        ("condition", manifest["origin"]["condition"]),
        ("prompts", str(len(manifest["lengths"]))),
        ("gist tokens", _short(manifest["lengths"])),
        ("layers", str(manifest["num_layers"])),
        ("storage", str(found["storage"])),
        ("bytes", f"{found['file_bytes']:,}"),
        ("format", str(manifest["format"])),
        ("sha256", found["sha256"]),
        *_about_rows(manifest.get("about") or []),
    ):
        table.add_row(label, plain(value))
    out.print(table)
    out.print("intact: sizes, checksum and states are correct", highlight=False)


def _about_rows(about: list[dict[str, Any] | None]) -> Iterator[tuple[str, str]]:
    """How each gist was made and how good it is, in rows: what it is, and its values by name."""
    for number, one in enumerate(about, 1):
        for name, facts in (one or {}).items():
            label = name if len(about) == 1 else f"{name}, {number}"
            if not isinstance(facts, dict):
                facts = {"": facts}
            yield label, ", ".join(f"{key.replace('_', ' ')} {_value(value)}".strip() for key, value in facts.items())


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _short(counts: list[int]) -> str:
    """Write a few numbers in full, many as their range."""
    return ", ".join(map(str, counts)) if len(counts) <= 8 else f"{min(counts)} to {max(counts)}"


# -- a store -----------------------------------------------------------------------------------------------------------

store_app = Commands(name="store", help="List, check and clean a directory of compressed prompts.")


def open_store(folder: Path | None, *, is_read_only: bool = True) -> GistStore:
    """Open an existing store, without creating one."""
    from gisting.store import GistStore
    from gisting.store.index import INDEX

    if folder is None or not (folder / INDEX).is_file():
        raise StoreError(
            f"there is no store in {folder}; make one: gisting compress MODEL --prompt TEXT --store {folder}"
        )
    return GistStore(folder, is_read_only=is_read_only)


def _whole(held: GistStore, name: str) -> str:
    """Return the key that starts with ``name`` if there is only one and ``name`` is not a name; else ``name``."""
    if name in held or not re.fullmatch("[0-9a-f]{6,63}", name):
        return name
    keys = {entry.key for entry in held.list() if entry.key.startswith(name)}
    return keys.pop() if len(keys) == 1 else name


@store_app.command("add")
def store_add(
    folder: StoreArgument,
    cache: Annotated[Path, typer.Argument(help="Cache file, as compress and distill make it.")],
    name: Annotated[list[str] | None, typer.Option(help="Name for each prompt of the file, in order.")] = None,
    storage: StorageOption = None,
    as_json: Annotated[bool, json_option("one object, with the names")] = False,
) -> None:
    """Put the prompts of a cache file into a store, which is made if it does not exist.

    A name that the store has already is given to the new gist. Numbers are stored as in the file, unless --storage says
    otherwise.

    Example: gisting store add gists support.gist.safetensors --name support
    """
    from gisting import storage as files
    from gisting.cache import GistCache
    from gisting.store import GistStore

    held, names = GistCache.load(cache), name or []
    if len(names) != len(held) or len(set(names)) != len(names):
        raise GistError(
            f"give a different --name for each prompt of {cache}, which holds {len(held)}, got "
            f"{', '.join(names) or 'none'}"
        )
    store = GistStore(folder, storage=storage or files.inspect(cache)["storage"])
    store.put_many({one: held[row] for row, one in enumerate(names)})
    if as_json:
        print_json({"added": names})
    else:
        out.print(f"added {', '.join(names)} to {folder}", highlight=False, markup=False, soft_wrap=True)


@store_app.command("list")
def store_list(
    folder: StoreArgument,
    as_json: Annotated[bool, json_option("an object for each entry")] = False,
) -> None:
    """List the entries of a store: the name, or the first digits of the key if there is none; all fields with --json.

    Example: gisting store list gists
    """
    from gisting.cache import kept_share

    held = open_store(folder)
    entries = held.list()
    about = {entry.key: held.about(entry.key) for entry in entries}
    if as_json:
        for entry in entries:
            print_json({**asdict(entry), "about": about[entry.key]})
        return
    kept = {key: kept_share(one) for key, one in about.items()}
    is_measured = any(share is not None for share in kept.values())
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)  # at 80 columns, nothing is broken up
    for title in ("name, or key", "made", "by, for model", "gist\ntokens", "prompt\ntokens", "bytes", "storage"):
        table.add_column(title, overflow="fold", min_width=10 if title == "made" else None)
    if is_measured:
        table.add_column("kept", no_wrap=True)
    for entry in entries:
        share = kept[entry.key]
        table.add_row(
            entry.key[:12] if entry.name is None else plain(entry.name),
            entry.created[:10],
            plain(f"{entry.checkpoint} {entry.model}".strip()),
            str(entry.num_gist_tokens),
            str(entry.num_prompt_tokens or _distilled_tokens(about[entry.key]) or ""),
            f"{entry.num_bytes:,}",
            plain(entry.storage),
            *(["" if share is None else f"{100 * share:.0f} %"] if is_measured else []),
        )
    out.print(table)


def _distilled_tokens(about: dict[str, Any] | None) -> int | None:
    """The number of the prompt's tokens of a gist that was distilled, which the index does not have."""
    return ((about or {}).get("distilled") or {}).get("num_prompt_tokens")


@store_app.command("verify")
def store_verify(
    folder: StoreArgument, as_json: Annotated[bool, json_option("an object for each fault")] = False
) -> None:
    """Check every entry and report what is wrong; exit code 1 if a file or the index is damaged.

    Example: gisting store verify gists
    """
    held = open_store(folder)
    faults = held.verify()
    for fault in faults:
        if as_json:
            print_json({**asdict(fault), "is_harmless": fault.is_harmless})
        else:
            out.print(str(fault), highlight=False, soft_wrap=True, markup=False)
    harmful = sum(not fault.is_harmless for fault in faults)
    if harmful:
        raise StoreError(f"{folder} has {harmful} faults; compress the damaged prompts again to repair them")
    out.print(f"{len(held)} entries, all intact", highlight=False)


@store_app.command("rebuild")
def store_rebuild(
    folder: StoreArgument, as_json: Annotated[bool, json_option("one object, with the entries and the faults")] = False
) -> None:
    """Make the index of a store again from its files and its list of names, if it is damaged or gone.

    Example: gisting store rebuild gists
    """
    from gisting.store import GistStore

    if not folder.is_dir():
        raise StoreError(f"there is no store in {folder}; give the directory of a store")
    faults = GistStore.rebuild(folder)
    entries = len(GistStore(folder, is_read_only=True))
    if as_json:
        print_json({"entries": entries, "faults": [str(fault) for fault in faults]})
        return
    for fault in faults:
        out.print(plain(str(fault)), highlight=False, soft_wrap=True)
    out.print(f"{entries} entries; {len(faults)} files could not be read", highlight=False)


@store_app.command("remove")
def store_remove(
    folder: StoreArgument,
    names: Annotated[
        list[str],
        typer.Argument(help="Names, keys, or the first digits of keys.", autocompletion=_names_in_store),
    ],
    as_json: Annotated[bool, json_option("one object, with the names")] = False,
) -> None:
    """Remove names. A key removes the entry with all its names; a file is deleted with its last name.

    Example: gisting store remove gists capitals
    """
    held = open_store(folder, is_read_only=False)
    held.remove([_whole(held, name) for name in names])
    if as_json:
        print_json({"removed": names})
    else:
        out.print(f"removed {', '.join(names)}", highlight=False, markup=False)


@store_app.command("gc")
def store_gc(
    folder: StoreArgument,
    keep_model: Annotated[
        list[str] | None,
        typer.Option(help="Fingerprint from `list`; entries of other models are deleted. May be repeated."),
    ] = None,
    drop_unnamed: Annotated[
        bool, typer.Option("--drop-unnamed", help="Also delete entries that can only be found by their text.")
    ] = False,
    as_json: Annotated[bool, json_option("one object, with the freed bytes")] = False,
) -> None:
    """Delete files that no entry refers to and what killed writers left.

    Example: gisting store gc gists
    """
    freed = open_store(folder, is_read_only=False).gc(keep_models=keep_model, keep_unnamed=not drop_unnamed)
    if as_json:
        print_json({"freed_bytes": freed})
    else:
        out.print(f"freed {freed:,} bytes", highlight=False)
