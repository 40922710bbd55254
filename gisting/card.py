"""Make cards: the README.md of a checkpoint or a store on the Hugging Face hub.

Place in the flow: below the modules that upload. Writes Markdown with a YAML front matter from the arguments, and marks
everything else as not stated. Independent of models and stores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gisting.errors import GistError
from gisting.markdown import markdown_table

__all__ = ["card", "is_repository_id"]

_ABOUT = {
    "checkpoint": (
        "A language model that compresses prompts into a few cached gist tokens "
        "([Gisting](https://arxiv.org/abs/2304.08467)). Its architecture is unmodified, with at most one more "
        "embedding row, so stock transformers loads it as well."
    ),
    "store": (
        "Prompts compressed into the keys and values of a few gist tokens "
        "([Gisting](https://arxiv.org/abs/2304.08467)), for the model, tokenizer and template named here; any other "
        "model, tokenizer or template is refused."
    ),
}
_ABOUT_ROW = ("condition", "num_gist_tokens", "num_records")  # of a row of an evaluation; the others are metrics
_USE = {
    "checkpoint": """import gisting

model, tokenizer = gisting.load({source})
cache = gisting.compress(model, tokenizer, ["Answer in one sentence."], {num_gist_tokens})
print(gisting.generate(model, tokenizer, ["What is a gist?"], cache=cache))
""",
    "store": """from gisting.store import GistStore

store = GistStore.from_pretrained({source})
print(store.list())
""",
}


def card(
    kind: str,
    *,
    title: str,
    num_gist_tokens: int | Sequence[int] | None,
    template: str,
    model: str,
    data: str | None = None,
    metrics: Mapping[str, float] | None = None,
    license: str | None = None,
    base_model: str | None = None,
    facts: Mapping[str, str] | None = None,
    settings: Mapping[str, object] | None = None,
    evaluations: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    extra: str = "",
) -> str:
    """Make the card of an upload.

    Arguments may hold any text: each becomes one line and cannot break the YAML or a table.

    Args:
        kind: ``"checkpoint"`` or ``"store"``.
        title: the repository, ``"owner/name"``, from which the example in the card loads; or any other name.
        num_gist_tokens: k, or every k that the checkpoint was trained with or the store holds; None if unknown.
        template: the name of the template.
        model: a description of the model: a fingerprint, or a name and a size.
        data: what it was trained or compressed on.
        metrics: measured values by name. They are also in the front matter if ``data`` says what they were measured on.
        license: the identifier of the licence on the hub, such as ``"apache-2.0"``.
        base_model: the repository of the model that this one was made from, ``"owner/name"``.
        facts: more lines of the first table, by name, such as the method of a training.
        settings: the settings that it was trained with, by name; None for no table of them.
        evaluations: for each data set that was evaluated, by name, a row for each k and condition: ``num_gist_tokens``,
            ``condition``, ``num_records`` and metrics, as :meth:`gisting.eval.conditions.ConditionResult.summary`
            returns them. Metrics that are None are left out. Those of the condition gist are also in the front matter.
        extra: Markdown to append unchanged.

    Returns:
        The text of a README.md.

    Raises:
        GistError: ``kind`` is unknown, ``base_model`` is not a repository, or a metric is not a finite number.
    """
    from huggingface_hub import EvalResult, ModelCardData

    if kind not in _ABOUT:
        raise GistError(f"kind must be one of {', '.join(_ABOUT)}, got {kind!r}")
    if base_model is not None and not is_repository_id(base_model):
        raise GistError(f"base_model must be a repository on the hub, 'owner/name', got {base_model!r}")
    for name, value in (metrics or {}).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise GistError(
                f"metrics[{name!r}] must be a finite number, got {value!r}; leave out what was not measured"
            )
    counts = sorted({num_gist_tokens} if isinstance(num_gist_tokens, int) else set(num_gist_tokens or ()))
    title = _line(title) or kind
    data = _line(data or "")
    measured = {_line(name): float(value) for name, value in (metrics or {}).items()}
    # The hub's index of results requires the data that a value was measured on.
    results = [
        EvalResult(
            task_type="text-generation", dataset_type=data, dataset_name=data, metric_type=name, metric_value=value
        )
        for name, value in (measured if data else {}).items()
    ]
    evaluated = {_line(name): rows for name, rows in (evaluations or {}).items()}
    results += [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type=metric,
            metric_name=f"{metric} (k = {row['num_gist_tokens']})",
            metric_value=float(row[metric]),
        )
        for name, rows in evaluated.items()
        for row in rows
        for metric in row
        if row["condition"] == "gist" and metric not in _ABOUT_ROW and row[metric] is not None
    ]
    front = ModelCardData(
        library_name="gisting",
        tags=["gisting", "gist-tokens", "prompt-compression"],
        license=None if license is None else _line(license),
        base_model=base_model,
        model_name=title if results else None,
        eval_results=results or None,
    )
    facts = {
        "gist tokens for a prompt (k)": _ranges(counts) or "not stated",
        "template": _line(template),
        "model": _line(model) + (f", made from {base_model}" if base_model else ""),
        "data": data or "not stated",
        **{_line(name): _line(value) for name, value in (facts or {}).items()},
    }
    source = repr(title if is_repository_id(title) else "path/to/this/directory").replace("'", '"')
    use = _USE[kind].format(source=source, num_gist_tokens=counts[0] if counts else 1)
    numbers = {name: f"{value:.6g}" for name, value in measured.items()}
    if not numbers and not evaluated:
        measured_parts = ["Nothing was measured."]
    else:
        measured_parts = [_table("metric", "value", numbers)] if numbers else []
        for name, rows in evaluated.items():
            measured_parts += [f"On {_escaped(name)}:", _evaluation(rows)]
    if settings is not None:
        used = {_line(name): _line(str(value)) for name, value in settings.items()}
        extra = "\n\n".join(filter(None, ["## Settings", _table("setting", "value", used), extra.strip()]))
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {_escaped(title)}",
        _ABOUT[kind],
        _table("", "", facts),
        "## Measured",
        *measured_parts,
        "## Use",
        f"```python\n{use}```",
        extra.strip(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def is_repository_id(name: str) -> bool:
    """Return whether a text has the form of a repository on the hub, ``owner/name``.

    Args:
        name: any text.
    """
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, flags=re.ASCII) is not None


def _line(text: str) -> str:
    """Make one printable line: line breaks, control characters and lone surrogates become spaces."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def _escaped(line: str) -> str:
    """Escape a line for Markdown, including the cells of tables."""
    return re.sub(r"([\\`*_\[\]<>|~#&$!])", r"\\\1", line)


def _table(left: str, right: str, rows: Mapping[str, str]) -> str:
    return "\n".join(markdown_table([left, right], [(_escaped(name), _escaped(value)) for name, value in rows.items()]))


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> str:
    metrics = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in _ABOUT_ROW]
    lines = [
        [row["num_gist_tokens"], _escaped(row["condition"]), row["num_records"]]
        + ["-" if row.get(name) is None else f"{row[name]:.6g}" for name in metrics]
        for row in rows
    ]
    return "\n".join(markdown_table(["k", "condition", "records", *map(_escaped, metrics)], lines))


def _ranges(counts: Sequence[int]) -> str:
    """Format ``[1, 2, 3, 5, 6]`` as "1 to 3, 5, 6"."""
    runs: list[list[int]] = []
    for count in counts:
        if runs and count == runs[-1][-1] + 1:
            runs[-1].append(count)
        else:
            runs.append([count])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
