"""Records from prompts and inputs alone: the model answers with the whole prompt in view, once.

Place in the flow: prompts, inputs -> **self_distil** -> records -> ``finetune`` with distillation (arXiv 2112.00861,
section 2.3, which also samples from the model with its prompt). The answers are kept as JSONL that people and
:func:`gisting.load_records` read; what is in the file is not sampled again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from gisting.data.records import Record, load_records
from gisting.data.sources import LINES
from gisting.errors import GistError
from gisting.generation.sampling import sample_answers
from gisting.models.fingerprint import base_fingerprint
from gisting.tokens import GistTokenizer

__all__ = ["SETTINGS_SUFFIX", "pair_up", "self_distil"]

_log = logging.getLogger(__name__)

#: Added to the name of a file of answers: the file that says what they were sampled from and how.
SETTINGS_SUFFIX = ".settings.json"

# Batches of answers between two writes.
_BATCHES = 4


def pair_up(
    prompts: Sequence[str], inputs: Sequence[str], *, inputs_per_prompt: int | None = None, seed: int = 0
) -> list[tuple[str, str]]:
    """Pair every prompt with inputs.

    Args:
        prompts: the prompts; a repeated one counts once.
        inputs: the inputs; a repeated one counts once.
        inputs_per_prompt: how many inputs each prompt gets, drawn from all; None for all inputs.
        seed: seed of the draw.

    Returns:
        A prompt and an input each, the pairs of a prompt together.

    Raises:
        GistError: there are no prompts or inputs, a prompt is empty, or there are fewer inputs than wanted.
    """
    prompts, inputs = list(dict.fromkeys(prompts)), list(dict.fromkeys(inputs))
    for name, texts in (("prompts", prompts), ("inputs", inputs)):
        if not texts:
            raise GistError(f"{name} is empty; give at least one text")
    if empty := [place for place, prompt in enumerate(prompts) if not prompt.strip()]:
        raise GistError(f"prompts[{empty[0]}] is empty; give the text that should be compressed")
    number = len(inputs) if inputs_per_prompt is None else inputs_per_prompt
    if not 1 <= number <= len(inputs):
        raise GistError(
            f"inputs_per_prompt must be between 1 and the number of different inputs, {len(inputs)}, got {number}"
        )
    drawn = random.Random(seed)
    return [
        (prompt, text)
        for prompt in prompts
        for text in (inputs if number == len(inputs) else drawn.sample(inputs, number))
    ]


def self_distil(
    model: PreTrainedModel,
    tokenizer: GistTokenizer,
    pairs: Iterable[tuple[str, str]],
    path: str | Path,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    source: str = "self-distilled",
    progress: Callable[[int], Any] | None = None,
) -> list[Record]:
    """Answer each pair with the whole prompt in view, and keep the answers in a file.

    A run that was interrupted goes on where it stopped; a complete file is only read. ``path`` with ``.settings.json``
    added says what the answers were sampled from and how.

    Args:
        model: a patched model.
        tokenizer: the tokenizer it was patched for.
        pairs: a prompt and an input each; a repeated pair counts once.
        path: the file, which is JSONL.
        max_new_tokens: as for :func:`gisting.generation.sampling.sample_answers`; likewise ``temperature``, ``seed``
            and ``batch_size``, which does not count as another way of sampling.
        temperature: see above.
        seed: see above.
        batch_size: see above.
        source: what the records name as their source.
        progress: called with the number of answers that are done since the last call, those of the file first.

    Returns:
        A record for each pair, in their order: prompt, input and answer.

    Raises:
        GistError: the file is not JSONL by its name, or has answers of another model, other pairs or other settings;
            or as ``sample_answers``.
        OSError: the file cannot be read or written.
    """
    path, pairs = Path(path), list(dict.fromkeys(pairs))
    if path.suffix.lower() not in LINES:
        raise GistError(f"the file of answers must end in one of {', '.join(LINES)}, got {path}; rename it")
    own = {
        "model": base_fingerprint(model),
        "tokenizer": tokenizer.fingerprint,
        "pairs": hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16],
        "num_pairs": len(pairs),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    done = _started(path, own)
    if progress is not None and done:
        progress(done)
    num_cut = 0
    with path.open("a", encoding="utf-8") as file:
        for start in range(done, len(pairs), _BATCHES * batch_size):
            found = sample_answers(
                model,
                tokenizer,
                pairs[start : start + _BATCHES * batch_size],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
            )
            num_cut += sum(len(one.token_ids) >= max_new_tokens for one in found)
            records = [Record(one.prompt, one.input, one.output, source) for one in found]
            file.writelines(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
            file.flush()
    if num_cut:
        _log.warning(
            "%d of %d answers were cut at %d tokens; a language model's loss on them teaches answers that end there: "
            "raise the limit, or train with distillation alone",
            num_cut,
            len(pairs) - done,
            max_new_tokens,
        )
    return load_records(path) if pairs else []


def _started(path: Path, own: dict[str, Any]) -> int:
    """Return how many answers the file has, after a check that they belong to this run; start the file if it is new."""
    described = path.with_name(path.name + SETTINGS_SUFFIX)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        described.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
        return 0
    if not described.exists():
        raise GistError(
            f"{path} exists and was not written by self_distil ({described.name} is missing); give another file, or "
            "train on it as it is: --data"
        )
    theirs = json.loads(described.read_text(encoding="utf-8"))
    if differing := [name for name in own if theirs.get(name) != own[name]]:
        values = ", ".join(f"{name} {theirs.get(name)!r} instead of {own[name]!r}" for name in differing)
        raise GistError(
            f"{path} has answers of another run ({values}); remove it and {described.name}, or give another file"
        )
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):  # The last line was being written when the run was killed.
        with path.open("r+b") as file:
            file.truncate(whole)
    return text.count(b"\n")
