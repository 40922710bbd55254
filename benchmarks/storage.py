"""Measure what low-bit storage costs: bytes of a file, and the loss in logits and in task accuracy.

A trained decoder reads the same prompts from files of every storage. Logits are compared at each position of the
reference answers, with the answer up to there as input, so that one wrong token does not spoil the rest. Nothing is
reported unless states stored without loss give back exactly the same logits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.command import OutputOption, Rows, where
from gisting import storage
from gisting._compat import cache_argument
from gisting.cache import GistCache
from gisting.data.records import Record
from gisting.data.tasks import LetterTask
from gisting.errors import GistError
from gisting.eval.metrics import exact_match
from gisting.generation import compress, generate
from gisting.markdown import markdown_table
from gisting.measure.progress import tracked
from gisting.models.load import load
from gisting.models.mode import evaluating
from gisting.models.state import require_patched
from gisting.models.weights import input_weight
from gisting.padding import pad_rows
from gisting.tokens import GistTokenizer

__all__ = ["StorageRow", "main", "measure", "storage_table"]

BATCH_SIZE = 64
HEADER = ("storage", "file bytes", "of which states", "logit error, mean", "max", "KL, nats", "exact match")


@dataclass(frozen=True)
class StorageRow:
    """What one storage costs and how much it loses.

    Bytes are means over the prompts, with one prompt in a file. Errors are absolute, relative to the lossless states;
    ``kl`` is KL(lossless || as stored) in nats, averaged over the positions; ``exact_match`` is in 0..1.
    """

    storage: str
    dtype: str  # of the states and the model
    file_bytes: float
    tensor_bytes: float
    logit_error_mean: float
    logit_error_max: float
    kl: float
    exact_match: float
    logit_mean: float  # of the absolute logits without loss, to judge the errors by
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
) -> list[StorageRow]:
    """Measure every storage over the same records, with a progress bar.

    Args:
        model: a patched decoder that was trained to gist.
        tokenizer: the tokenizer it was patched for.
        records: to answer; the instruction is the prompt, the output is the reference.
        num_gist_tokens: k.

    Returns:
        A row for each of ``gisting.storage.STORAGES``.

    Raises:
        GistError: there is no record, the model is an encoder-decoder, its dtype is not one of the storages, or the
            states stored without loss change a logit.
    """
    if not records:
        raise GistError("records is empty; pass at least one")
    if require_patched(model, tokenizer).is_encoder_decoder:
        raise GistError("measure compares logits after a decoder's cache, which an encoder-decoder does not have")
    own = str(input_weight(model).dtype).removeprefix("torch.")
    if own not in storage.STORAGES:
        raise GistError(f"the model's dtype must be one of the storages, got {own}; load it with dtype='float32'")
    prompts = list(dict.fromkeys(record.instruction for record in records))
    cache = compress(model, tokenizer, prompts, num_gist_tokens, batch_size=BATCH_SIZE)
    place = {prompt: row for row, prompt in enumerate(prompts)}
    rows = [place[record.instruction] for record in records]
    device = input_weight(model).device
    expected = _logits(model, tokenizer, cache.select(rows), records)
    found = []
    for name in tracked(storage.STORAGES, "measuring"):
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
    """Format rows of the JSONL file as Markdown."""
    lines = markdown_table(HEADER, [_cells(row) for row in rows])
    first = rows[0]
    lines += [
        "",
        f"{first['num_prompts']} prompts, one in a file, k = {first['num_gist_tokens']}; {first['num_records']:,} "
        f"records of instructions that training never used, {first['num_places']:,} positions of their answers, where "
        f"the mean absolute logit is {first['logit_mean']:.1f}. Model and states in {first['dtype']}, which is "
        f"the baseline ({where(first, 'torch', 'transformers')}).",
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
    """Save and load the cache, one file for each prompt; return it with the bytes of all files and of their tensors."""
    parts, file_bytes, tensor_bytes = [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for row in range(len(cache)):
            path = Path(folder) / f"{row}.safetensors"
            cache[row].save(path, name)
            found = storage.inspect(path)
            file_bytes += found["file_bytes"]
            tensor_bytes += found["tensor_bytes"]
            parts.append(GistCache.load(path))
        return GistCache.cat(parts), file_bytes, tensor_bytes


def _batches(cache: GistCache, records: Sequence[Record]) -> Iterator[tuple[GistCache, Sequence[Record]]]:
    for start in range(0, len(records), BATCH_SIZE):
        part = records[start : start + BATCH_SIZE]
        yield cache.select(range(start, start + len(part))), part


def _logits(model: PreTrainedModel, tokenizer: GistTokenizer, cache: GistCache, records: Sequence[Record]) -> Tensor:
    """The float32 logits ``(positions, vocabulary)`` that predict each token of each reference answer."""
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
            # A token is predicted one column before its own.
            found += [
                row[len(head) - 1 : len(head) - 1 + len(tail)].float().cpu()
                for row, head, tail in zip(logits, before, answers, strict=True)
            ]
    return torch.cat(found)


def _answers(
    model: PreTrainedModel, tokenizer: GistTokenizer, cache: GistCache, records: Sequence[Record]
) -> list[str]:
    """Answer greedily, with at most as many tokens as the longest reference."""
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


def main(
    model: Annotated[str, typer.Argument(help="Directory that `gisting demo --from-scratch` wrote.")],
    output: OutputOption = None,
    records: Annotated[int, typer.Option(min=1, help="Records of instructions that training never used.")] = 256,
    num_gist_tokens: Annotated[int, typer.Option("--num-gist-tokens", "-k", min=1, help="Gist tokens.")] = 2,
    seed: Annotated[int, typer.Option(help="The demo's seed, which decides what training never used.")] = 0,
) -> None:
    """Caches in few bits: bytes and accuracy of each storage, with a checkpoint of `gisting demo --from-scratch`.

    Example: python -m benchmarks storage runs/demo --output docs/results/storage.jsonl
    """
    rows = Rows("storage", output)
    rows.add(measure(*load(model), LetterTask(seed=seed).records("unseen", records, seed + 1), num_gist_tokens))
    rows.show(storage_table)
