"""What few bits cost: bytes of a file, and the loss in logits and in task accuracy, beside the states as they are.

A trained decoder reads the same prompts from files of every storage. Logits are compared at each place of the reference
answers, with the answer up to there as input, so that one wrong token does not spoil the rest. Nothing is reported
unless states that were kept as they are give back the very same logits.

    python -m benchmarks.storage runs/demo --output docs/results/storage.jsonl
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from gisting import storage
from gisting._compat import cache_argument
from gisting.cache import GistCache
from gisting.data.records import Record
from gisting.data.tasks import LetterTask
from gisting.errors import GistError
from gisting.eval.metrics import exact_match
from gisting.generation import compress, generate
from gisting.measure.progress import tracked
from gisting.measure.rows import append_row, markdown_table
from gisting.models.load import load
from gisting.models.mode import evaluating
from gisting.models.patch import require_patched
from gisting.models.weights import input_weight
from gisting.padding import pad_rows
from gisting.tokens import GistTokenizer

__all__ = ["StorageRow", "measure", "storage_table"]

BATCH_SIZE = 64
HEADER = ("storage", "file bytes", "of them states", "logit error, mean", "max", "KL, nats", "exact match")


@dataclass(frozen=True)
class StorageRow:
    """One storage. Bytes are means over the prompts, one prompt in a file; errors are absolute, against the states as
    they are; ``kl`` is KL(as they are || as stored) in nats, averaged over the places; ``exact_match`` is in 0..1.
    """

    storage: str
    dtype: str  # of the states and the model
    file_bytes: float
    tensor_bytes: float
    logit_error_mean: float
    logit_error_max: float
    kl: float
    exact_match: float
    logit_mean: float  # of the absolute logits as they are, to judge the errors by
    num_gist_tokens: int
    num_prompts: int
    num_records: int
    num_places: int
    model: str


def measure(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    records: Sequence[Record],
    num_gist_tokens: int = 2,
    *,
    progress: Callable[[str], Any] | None = None,
) -> list[StorageRow]:
    """Every storage over the same records.

    Args:
        model: a patched decoder that was trained to gist.
        tokenizer: the tokenizer it was patched for.
        records: what is answered; the instruction is the prompt, the output is the reference.
        num_gist_tokens: k.
        progress: called with the name of each storage before it is measured.

    Returns:
        A row for each of ``gisting.storage.STORAGES``.

    Raises:
        GistError: there is no record, the model is an encoder-decoder or its dtype is no storage, or the states kept as
            they are do not give the logits that they gave before.
    """
    if not records:
        raise GistError("records is empty; give at least one")
    if require_patched(model, tokenizer).is_encoder_decoder:
        raise GistError("measure compares logits behind a decoder's cache, which an encoder-decoder does not have")
    own = str(input_weight(model).dtype).removeprefix("torch.")
    if own not in storage.STORAGES:
        raise GistError(f"the model must be of a dtype that is also a storage, got {own}; load it with dtype='float32'")
    prompts = list(dict.fromkeys(record.instruction for record in records))
    cache = compress(model, tokenizer, prompts, num_gist_tokens, batch_size=BATCH_SIZE)
    place = {prompt: row for row, prompt in enumerate(prompts)}
    rows = [place[record.instruction] for record in records]
    device = input_weight(model).device
    expected = _logits(model, tokenizer, cache.select(rows), records)
    found = []
    for name in tracked(storage.STORAGES, "measuring"):
        if progress is not None:
            progress(name)
        stored, file_bytes, tensor_bytes = _through_files(cache, name)
        stored = stored.to(device).select(rows)
        logits = _logits(model, tokenizer, stored, records)
        error = (logits - expected).abs()
        if name == own and not torch.equal(logits, expected):
            raise GistError(
                f"storage {name!r}, which keeps every bit, changes a logit by {error.max():.2e}; nothing is reported"
            )
        wanted, given = expected.log_softmax(-1), logits.log_softmax(-1)
        found.append(
            StorageRow(
                storage=name,
                dtype=own,
                file_bytes=file_bytes / len(prompts),
                tensor_bytes=tensor_bytes / len(prompts),
                logit_error_mean=error.mean().item(),
                logit_error_max=error.max().item(),
                kl=(wanted.exp() * (wanted - given)).sum(-1).mean().item(),
                exact_match=exact_match(
                    _answers(model, tokenizer, stored, records), [record.output for record in records]
                ),
                logit_mean=expected.abs().mean().item(),
                num_gist_tokens=num_gist_tokens,
                num_prompts=len(prompts),
                num_records=len(records),
                num_places=len(expected),
                model=cache.origin.model,
            )
        )
    return found


def storage_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of the JSONL file as Markdown."""
    lines = markdown_table(HEADER, [_cells(row) for row in rows])
    first = rows[0]
    lines += [
        "",
        f"{first['num_prompts']} prompts, one in a file, k = {first['num_gist_tokens']}; {first['num_records']:,} "
        f"records of instructions that training never used, {first['num_places']:,} places of their answers, where "
        f"logits are {first['logit_mean']:.1f} in the mean (absolute). Model and states in {first['dtype']}, which is "
        f"the baseline ({first['device']}, torch {first['torch']}, transformers {first['transformers']}).",
    ]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    def small(number: float) -> str:
        return "0" if number == 0 else f"{number:.1e}"

    return [
        row["storage"],
        f"{row['file_bytes']:,.0f}",
        f"{row['tensor_bytes']:,.0f}",
        small(row["logit_error_mean"]),
        small(row["logit_error_max"]),
        small(row["kl"]),
        f"{100 * row['exact_match']:.1f} %",
    ]


def _through_files(cache: GistCache, name: str) -> tuple[GistCache, int, int]:
    """The cache as it comes back from a file for each prompt, and the bytes of all files and of their tensors."""
    parts, file_bytes, tensor_bytes = [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for row in range(len(cache)):
            path = Path(folder) / f"{row}.safetensors"
            cache[row].save(path, name)
            told = storage.inspect(path)
            file_bytes += told["file_bytes"]
            tensor_bytes += told["tensor_bytes"]
            parts.append(GistCache.load(path))
        return GistCache.cat(parts), file_bytes, tensor_bytes


def _batches(cache: GistCache, records: Sequence[Record]) -> Iterator[tuple[GistCache, Sequence[Record]]]:
    for start in range(0, len(records), BATCH_SIZE):
        part = records[start : start + BATCH_SIZE]
        yield cache.select(range(start, start + len(part))), part


def _logits(model: PreTrainedModel, tokenizer: GistTokenizer, cache: GistCache, records: Sequence[Record]) -> Tensor:
    """float32 ``(places, vocabulary)``: where each token of each reference answer is predicted."""
    device = input_weight(model).device
    found = []
    with evaluating(model), torch.inference_mode():
        for states, part in _batches(cache, records):
            inputs = [record.input for record in part]
            before = tokenizer.encode_continuations(inputs)
            answers = tokenizer.encode_completions(inputs, [record.output for record in part])
            ids, is_token = pad_rows(
                [[*head, *tail] for head, tail in zip(before, answers, strict=True)], tokenizer.pad_token_id, left=False
            )
            mask = torch.cat([states.attention_mask, is_token.long().to(device)], dim=1)
            logits = model(
                input_ids=ids.to(device),
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, states.num_slots :],
                **{cache_argument(): states.as_past_key_values()},
            ).logits
            # A token is predicted one column before it stands.
            found += [
                row[len(head) - 1 : len(head) - 1 + len(tail)].float().cpu()
                for row, head, tail in zip(logits, before, answers, strict=True)
            ]
    return torch.cat(found)


def _answers(
    model: PreTrainedModel, tokenizer: GistTokenizer, cache: GistCache, records: Sequence[Record]
) -> list[str]:
    """Greedy, and no longer than the longest reference."""
    lengths = tokenizer.encode_completions([record.input for record in records], [record.output for record in records])
    return [
        text
        for states, part in _batches(cache, records)
        for text in generate(
            model,
            tokenizer,
            [record.input for record in part],
            cache=states,
            max_new_tokens=max(map(len, lengths)),
            do_sample=False,
            num_beams=1,
        )
    ]


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.storage", description="What each storage costs a checkpoint of `gisting demo`."
    )
    parser.add_argument("model", help="directory that `gisting demo` wrote")
    parser.add_argument("--output", type=Path, help="JSONL file to which the rows are added")
    parser.add_argument("--records", type=int, default=256, help="records of instructions that training never used")
    parser.add_argument("--num-gist-tokens", type=int, default=2, help="k")
    parser.add_argument("--seed", type=int, default=0, help="the demo's, which says what training never used")
    options = parser.parse_args(arguments)
    console = Console()
    model, tokenizer = load(options.model)
    records = LetterTask(seed=options.seed).records("unseen", options.records, options.seed + 1)
    rows = measure(
        model, tokenizer, records, options.num_gist_tokens, progress=lambda name: console.print(f"measuring {name}")
    )
    table = Table(*HEADER)
    table.columns[0].no_wrap = True
    for row in rows:
        if options.output is not None:
            append_row(options.output, {"command": "python -m benchmarks.storage", **asdict(row)})
        table.add_row(*_cells(asdict(row)))
    console.print(table)


if __name__ == "__main__":
    _main()
