"""Measure requests served with stock ``generate``: full prompt, full prompt with a prefix cache, bare query.

Place in the flow: a patched decoder and full prompts -> **requests** -> rows. A prefix cache is the honest baseline of
an internalised prompt, so nothing is reported unless it gives the logits of the full prompt at every step of the
answers. Independent of training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gisting._compat import cache_argument
from gisting.data.plain import plain_sources
from gisting.data.records import Record
from gisting.errors import GistError
from gisting.internalize.comparison import BARE_QUERY, FULL_PROMPT, PREFIX_CACHE, shared_prefix
from gisting.measure.latency import cache_view, check_logits, wait
from gisting.measure.progress import tracked
from gisting.measure.rows import spread
from gisting.models.mode import evaluating
from gisting.models.state import require_patched
from gisting.models.weights import input_weight
from gisting.padding import pad_rows
from gisting.tokens import GistTokenizer

__all__ = ["FULL_PROMPT", "ServingRow", "serving"]


@dataclass(frozen=True)
class ServingRow:
    """Whole requests served one way, with median and quartiles over alternating rounds.

    ``num_new_tokens`` is the mean number of tokens read for a request; every answer has ``num_answer_tokens``.
    """

    mode: str
    batch_size: int
    num_cached_tokens: int
    num_new_tokens: float
    num_answer_tokens: int
    num_parameters: int
    requests_per_s: float
    requests_per_s_low: float
    requests_per_s_high: float
    num_repeats: int


def serving(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    records: Sequence[Record],
    prompt: str,
    *,
    batch_size: int,
    shorter: Mapping[str, Sequence[Record]] | None = None,
    num_answer_tokens: int = 4,
    repeats: int = 30,
    warmup: int = 3,
) -> list[ServingRow]:
    """Serve the same requests in three ways, alternating, with stock ``generate``.

    Each round takes the next ``batch_size`` records and starts over when fewer are left. Passing the cached states to
    the model is part of the time.

    Args:
        model: a patched decoder.
        tokenizer: the tokenizer it was patched for.
        records: full prompts, all of which begin with the prompt, and queries.
        prompt: what the prefix cache holds; examples differ from query to query and are read each time.
        batch_size: number of concurrent requests.
        shorter: more ways to ask the same queries, by name: a record for each of ``records``, with another prompt.
        num_answer_tokens: length of every answer, whatever its text.
        repeats: measured rounds.
        warmup: unmeasured rounds before them.

    Returns:
        A row for ``full prompt``, ``prefix cache`` and ``bare query``, then one for each of ``shorter``.

    Raises:
        GistError: the model is an encoder-decoder, an argument is out of range, the prompts share no token that could
            be cached, or the prefix cache does not give the logits of the full prompt.
    """
    _check(model, tokenizer, records, shorter or {}, batch_size, num_answer_tokens, repeats, warmup)
    device, pad = input_weight(model).device, tokenizer.pad_token_id
    inputs = [record.input for record in records]
    full = plain_sources(tokenizer, [record.instruction for record in records], inputs)
    num_cached = shared_prefix(tokenizer, prompt, full)
    if not num_cached:
        raise GistError("records share no token that could be cached; pass requests that start with the prompt")
    plain = {FULL_PROMPT: full, BARE_QUERY: plain_sources(tokenizer, [""] * len(inputs), inputs)}
    for name, asked in (shorter or {}).items():
        plain[name] = plain_sources(tokenizer, [record.instruction for record in asked], inputs)
    starts = range(0, len(inputs) - batch_size + 1, batch_size)[: warmup + repeats]
    settings: dict[str, Any] = {
        "do_sample": False,
        "num_beams": 1,
        "min_new_tokens": num_answer_tokens,
        "max_new_tokens": num_answer_tokens,
        "pad_token_id": pad,
    }
    generating: Any = model
    with evaluating(model), torch.inference_mode():
        front = torch.tensor([full[0][:num_cached]] * batch_size, device=device)
        kept: Any = model(front[:1], use_cache=True, logits_to_keep=1)[cache_argument()]

        def padded(sources: list[list[int]], start: int) -> tuple[Tensor, Tensor]:
            ids, is_token = pad_rows(sources[start : start + batch_size], pad, left=True)
            return ids.to(device), is_token.long().to(device)

        def run(ids: Tensor, mask: Tensor, **more: Any) -> Any:
            return generating.generate(input_ids=ids, attention_mask=mask, **settings, **more)

        def run_with_prefix(ids: Tensor, mask: Tensor, **more: Any) -> Any:
            # The cached columns come first, so padding goes between them and the rest.
            ids, mask = torch.cat([front, ids], dim=1), torch.cat([torch.ones_like(front), mask], dim=1)
            return run(ids, mask, **{cache_argument(): cache_view(kept, batch_size)}, **more)

        rests = {**plain, PREFIX_CACHE: [row[num_cached:] for row in full]}
        batches = {mode: [padded(sources, start) for start in starts] for mode, sources in rests.items()}
        ways: dict[str, Callable[..., Any]] = {FULL_PROMPT: run, PREFIX_CACHE: run_with_prefix}
        ways |= {mode: run for mode in plain if mode not in ways}
        shown = {"output_logits": True, "return_dict_in_generate": True}
        for number in range(len(starts)):
            expected, found = (ways[mode](*batches[mode][number], **shown) for mode in (FULL_PROMPT, PREFIX_CACHE))
            _check_answers(expected, found, input_weight(model).dtype)
        times: dict[str, list[float]] = {mode: [] for mode in ways}
        for number in tracked(range(warmup + repeats), "serving"):
            for mode, way in ways.items():
                batch = batches[mode][number % len(starts)]
                wait(device)
                start = time.perf_counter()
                way(*batch)
                wait(device)
                if number >= warmup:
                    times[mode].append(batch_size / (time.perf_counter() - start))
    rows = []
    for mode, rates in times.items():
        low, median, high = spread(rates)
        served = [length for start in starts for length in map(len, rests[mode][start : start + batch_size])]
        cached = num_cached if mode == PREFIX_CACHE else 0
        new = round(sum(served) / len(served), 1)
        about = (cached, new, num_answer_tokens, model.num_parameters())
        rows.append(ServingRow(mode, batch_size, *about, median, low, high, len(rates)))
    return rows


def _check(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    records: Sequence[Record],
    shorter: Mapping[str, Sequence[Record]],
    batch_size: int,
    num_answer_tokens: int,
    repeats: int,
    warmup: int,
) -> None:
    if require_patched(model, tokenizer).is_encoder_decoder:
        raise GistError(
            "serving measures decoders only, because an encoder-decoder has no prefix cache to compare with"
        )
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("num_answer_tokens", num_answer_tokens, 1),
        ("repeats", repeats, 1),
        ("warmup", warmup, 0),
    ):
        if value < least:
            raise GistError(f"{name} must be at least {least}, got {value}")
    if len(records) < batch_size:
        raise GistError(f"there must be at least batch_size={batch_size} records, got {len(records)}; lower batch_size")
    for name, asked in shorter.items():
        if [record.input for record in asked] != [record.input for record in records]:
            raise GistError(f"shorter[{name!r}] must have the queries of records, in the same order")


def _check_answers(expected: Any, found: Any, dtype: torch.dtype) -> None:
    """Raise unless both runs have the same logits up to rounding, at every step until a row's answers diverge.

    Where two tokens are equally likely, rounding decides between them and the answers may rightly diverge; what counts
    is that the logits were the same until then.
    """
    length = len(expected.logits)
    theirs, ours = (answer.sequences[:, answer.sequences.shape[1] - length :] for answer in (expected, found))
    is_same = torch.ones(len(theirs), dtype=torch.bool, device=theirs.device)
    for step, (wanted, got) in enumerate(zip(expected.logits, found.logits, strict=True)):
        if not is_same.any():
            return
        # generate returns float32 for every dtype, but rounding is that of the weights.
        check_logits(PREFIX_CACHE, got[is_same].to(dtype), wanted[is_same].to(dtype))
        is_same &= theirs[:, step] == ours[:, step]
