"""Measure how much of a prompt the adapter's gist carries, beside three controls, on prompts that it has never seen.

Place in the flow: a trained adapter and held-out prompts -> **evaluation** -> rows and answers side by side. Controls
are no prompt, the first k tokens of the prompt as they are, and the gist of another prompt (``swapped``), which shows
how much of a gist is this prompt and how much only the style of the answers.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gisting.cache import GistCache
from gisting.data.records import Record, load_records
from gisting.eval.conditions import evaluate
from gisting.eval.divergence import Divergence, FirstTokens, Source, Teacher, ask_teacher, measure_divergence
from gisting.eval.metrics import rouge
from gisting.generation import compress, generate
from gisting.generation.sampling import SampledAnswer, sample_answers
from gisting.tokens import GistTokenizer

__all__ = ["HELD_OUT", "HeldOut", "instructions", "measure", "side_by_side", "system_prompts"]

#: System prompts that training has not seen, with inputs: some written by hand, some composed of values kept for them.
HELD_OUT = Path(__file__).parent / "held_out.jsonl"


class HeldOut(NamedTuple):
    """A held-out prompt and its inputs."""

    prompt: str
    inputs: list[str]


def system_prompts(number: int | None = None) -> list[HeldOut]:
    """Read the held-out system prompts, the first ``number`` of them."""
    lines = HELD_OUT.read_text(encoding="utf-8").splitlines()[:number]
    return [HeldOut(row["prompt"], row["inputs"]) for row in map(json.loads, lines)]


def instructions(path: Path, number: int) -> list[HeldOut]:
    """Read ``number`` different instructions of a file of records, evenly from the whole file."""
    found = {record.instruction: str(record.input) for record in load_records(path)}
    step = max(len(found) // number, 1)
    return [HeldOut(prompt, [text]) for prompt, text in [*found.items()][::step][:number]]


def measure(
    model: Any,
    tokenizer: GistTokenizer,
    name: str,
    held_out: Sequence[HeldOut],
    ks: Sequence[int],
    *,
    max_new_tokens: int = 32,
    seed: int = 1,
    answer_with: int | None = None,
    say: Callable[[str], Any] = lambda what: None,
) -> Iterator[dict[str, Any]]:
    """Measure the gist of every prompt for each k.

    Answers are sampled with the whole prompt in view, and all sources are compared at their tokens. Greedy answers are
    compared with those of the whole prompt by ROUGE-L.

    Args:
        model: the model with the adapter.
        tokenizer: its tokenizer.
        name: what the prompts are, for the rows.
        held_out: the prompts.
        ks: numbers of gist tokens.
        max_new_tokens: longest answer in tokens.
        seed: seed of the samples.
        answer_with: the k for which greedy answers are generated too, which takes most of the time; None for none.
        say: called with a line for each row.

    Yields:
        A row for each k.
    """
    prompts = [one.prompt for one in held_out]
    pairs = [(one.prompt, text) for one in held_out for text in one.inputs]
    sampled = sample_answers(model, tokenizer, pairs, max_new_tokens=max_new_tokens, seed=seed)
    said = _by_prompt(sampled)
    teachers = {prompt: ask_teacher(model, tokenizer, said[prompt]) for prompt in prompts}
    nothing = [measure_divergence(model, tokenizer, teachers[prompt], None) for prompt in prompts]
    expected: list[str] = []
    texts: dict[str, list[str]] = {}
    if answer_with is not None:
        greedy = sample_answers(model, tokenizer, pairs, max_new_tokens=max_new_tokens, temperature=0)
        expected = [one.output for one in greedy]
        records = [Record(*pair, output) for pair, output in zip(pairs, expected, strict=True)]
        (found,) = evaluate(
            model, tokenizer, records, conditions=["no-prompt"], max_new_tokens=max_new_tokens, with_rouge=False
        )
        texts["none"] = found.predictions
    for k in ks:
        start = time.perf_counter()
        cache = compress(model, tokenizer, prompts, k)
        seconds = time.perf_counter() - start
        order = [*range(1, len(prompts)), 0]
        caches = {"gist": cache, "swapped": cache.select(order)}
        found = {"none": nothing}
        for source, held in caches.items():
            found[source] = _divergences(model, tokenizer, prompts, teachers, held)
            if k == answer_with:
                texts[source] = _answers(model, tokenizer, pairs, prompts, held, max_new_tokens)
        if name == "system prompts":
            first = [FirstTokens(k)] * len(prompts)
            found["first"] = _divergences(model, tokenizer, prompts, teachers, first)
        row = {
            "set": name,
            "num_gist_tokens": k,
            "num_prompts": len(prompts),
            "num_answers": len(pairs),
            "compress_s": round(seconds, 2),
            **_figures(found),
        }
        if k == answer_with:
            row["rouge_l"] = {
                source: statistics.fmean(rouge(answers, expected)["rouge_l"]) for source, answers in texts.items()
            }
            row["same_answer"] = {
                source: statistics.fmean(a == b for a, b in zip(answers, expected, strict=True))
                for source, answers in texts.items()
            }
        say(
            f"{name}, k = {k}: kept {100 * row['kept']['none']:.1f} % of the gap to no prompt, "
            f"{100 * row['kept']['swapped']:.1f} % of that to another prompt's gist"
        )
        yield row


def side_by_side(
    model: Any,
    tokenizer: GistTokenizer,
    held_out: Sequence[HeldOut],
    k: int,
    *,
    number: int = 20,
    max_new_tokens: int = 64,
) -> list[dict[str, str]]:
    """Answer ``number`` inputs, one of each prompt in turn, from the full prompt, from its gist and without a prompt.

    Greedy decoding; nothing is chosen.
    """
    pairs = [
        (one.prompt, one.inputs[turn])
        for turn in range(max(len(one.inputs) for one in held_out))
        for one in held_out
        if turn < len(one.inputs)
    ][:number]
    full = sample_answers(model, tokenizer, pairs, max_new_tokens=max_new_tokens, temperature=0)
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    cache = compress(model, tokenizer, prompts, k)
    gist = _answers(model, tokenizer, pairs, prompts, cache, max_new_tokens)
    records = [Record(*pair, "") for pair in pairs]
    (none,) = evaluate(
        model, tokenizer, records, conditions=["no-prompt"], max_new_tokens=max_new_tokens, with_rouge=False
    )
    columns = zip(pairs, full, gist, none.predictions, strict=True)
    return [
        {"prompt": prompt, "input": text, "full": one.output, "gist": two, "none": three}
        for (prompt, text), one, two, three in columns
    ]


def _by_prompt(answers: Sequence[SampledAnswer]) -> dict[str, list[SampledAnswer]]:
    found: dict[str, list[SampledAnswer]] = {}
    for one in answers:
        found.setdefault(one.prompt, []).append(one)
    return found


def _divergences(
    model: Any, tokenizer: GistTokenizer, prompts: Sequence[str], teachers: dict[str, Teacher], sources: Any
) -> list[Divergence]:
    found = []
    for place, prompt in enumerate(prompts):
        source: Source = sources[place]
        found.append(measure_divergence(model, tokenizer, teachers[prompt], source))
    return found


def _answers(
    model: Any,
    tokenizer: GistTokenizer,
    pairs: Sequence[tuple[str, str]],
    prompts: Sequence[str],
    cache: GistCache,
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    place = {prompt: number for number, prompt in enumerate(prompts)}
    found: list[str] = []
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        held = cache.select([place[prompt] for prompt, _ in part])
        settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
        found += generate(model, tokenizer, [text for _, text in part], cache=held, **settings)
    return found


def _figures(found: dict[str, list[Divergence]]) -> dict[str, Any]:
    """Figures over all answers of all prompts, by source."""
    kl = {source: [value for one in each for value in one.kl] for source, each in found.items()}
    agreement = {source: [value for one in each for value in one.agreement] for source, each in found.items()}
    mean = {source: statistics.fmean(values) for source, values in kl.items()}
    median = {source: statistics.median(values) for source, values in kl.items()}
    controls = [source for source in found if source != "gist"]
    return {
        "kl": mean,
        "kl_median": median,
        "kept": {source: 1 - mean["gist"] / mean[source] for source in controls},
        "kept_median": {source: 1 - median["gist"] / median[source] for source in controls},
        "agreement": {source: statistics.fmean(values) for source, values in agreement.items()},
    }
