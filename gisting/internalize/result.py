"""What an internalisation came to, as a value and as the file beside its checkpoint.

Place in the flow: behind the loop. The file says which template went into the weights, by its hash, so that a caller
with another one can be warned. Knows files; trains nothing and measures nothing.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gisting.errors import GistError
from gisting.storage import write_atomically

__all__ = [
    "RESULT_NAME",
    "Internalized",
    "StageResult",
    "TemplateWarning",
    "check_template",
    "load_internalized",
    "template_hash",
]

#: The file's name in the result directory.
RESULT_NAME = "internalized.json"
#: Goes up when a file of the version before cannot be read as it stands.
FORMAT = 1
_KIND = "gisting internalisation"


class TemplateWarning(UserWarning):
    """A model was trained on another template than the one that it is asked about."""


@dataclass(frozen=True)
class StageResult:
    """One stage.

    Args:
        number: from 1.
        condition: what its requests are: ``"prompt"``, ``"no-prompt"`` or ``"gist"``.
        share: of the template, as the schedule asks.
        realised_share: as the model's tokenizer counts it.
        num_examples: that a prompt may have.
        mean_examples: that prompts have.
        num_gist_tokens: k of a stage behind a gist, else None.
        prompt_tokens: mean over the training requests of what they cost beside the bare query.
        query_tokens: mean of the bare queries.
        num_records: trained on.
        train_loss: as ``Trainer`` gives it; of a stage that was resumed, not that of the whole stage.
        seconds: training and evaluation; of a stage that was resumed, since then.
        metrics: on the evaluation records, for each condition (``"no-prompt"``, and the stage's own) by name; empty
            without such records.
    """

    number: int
    condition: str
    share: float
    realised_share: float
    num_examples: int
    mean_examples: float
    num_gist_tokens: int | None
    prompt_tokens: float
    query_tokens: float
    num_records: int
    train_loss: float
    seconds: float
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def tokens(self) -> float:
        """Tokens of a request, prompt and query."""
        return self.prompt_tokens + self.query_tokens


@dataclass(frozen=True)
class Internalized:
    """A finished internalisation, or control.

    Args:
        stages: in their order.
        condition: under which the model is to be run: ``"no-prompt"``, ``"prompt"`` or ``"gist"``.
        template_sha256: of the template's text, UTF-8, in hex.
        settings: all that decided the run: schedule, compressor, tail, control, records (by hash), tokenizer, ...
        num_trainable_parameters: how many numbers learned.
        num_parameters: of how many.
        seconds: of all stages together.
    """

    stages: tuple[StageResult, ...]
    condition: str
    template_sha256: str
    settings: dict[str, Any]
    num_trainable_parameters: int
    num_parameters: int
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        """Of the finished model under its condition; empty without evaluation records."""
        return self.stages[-1].metrics.get(self.condition, {})

    @property
    def tokens(self) -> float:
        """Mean tokens of a request to the finished model."""
        last = self.stages[-1]
        return last.tokens if self.condition == last.condition else last.query_tokens

    def save(self, directory: str | Path) -> None:
        """Write ``internalized.json`` into ``directory``, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        write_json(Path(directory) / RESULT_NAME, {"kind": _KIND, "format": FORMAT, **asdict(self)})


def load_internalized(directory: str | Path) -> Internalized:
    """What :meth:`Internalized.save` wrote into ``directory``.

    Raises:
        GistError: there is no such file, it is of a later format, or something is missing in it.
    """
    path = Path(directory) / RESULT_NAME
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GistError(f"{directory} has no {RESULT_NAME}, so it is no finished internalisation") from None
    except ValueError as error:
        raise GistError(f"{path} is not JSON ({error})") from error
    if not isinstance(state, dict) or state.pop("kind", None) != _KIND:
        raise GistError(f"{path} is no result of an internalisation")
    found = state.pop("format", None)
    if found != FORMAT:
        raise GistError(
            f"{path} has format {found}, this version reads {FORMAT}; upgrade gisting: pip install -U gist-tokens"
        )
    try:
        stages = tuple(StageResult(**stage) for stage in state.pop("stages"))
        return Internalized(stages, **state)
    except (KeyError, TypeError) as error:
        raise GistError(f"{path} is not complete ({type(error).__name__}: {error})") from error


def template_hash(template: str) -> str:
    """SHA-256 of the text of ``template``, UTF-8, in hex."""
    return hashlib.sha256(template.encode()).hexdigest()


def check_template(directory: str | Path, template: str) -> bool:
    """Warn where a model was trained on another template: what it has internalised stays what it was.

    Args:
        directory: the result of an internalisation.
        template: what the caller would send, or means to have internalised.

    Returns:
        Whether it is the one that was trained.

    Raises:
        GistError: as :func:`load_internalized`.
    """
    found = load_internalized(directory)
    asked = template_hash(template)
    if found.template_sha256 == asked:
        return True
    advice = "compress it anew, and measure" if found.condition == "gist" else "train it anew: gisting internalize"
    warnings.warn(
        f"{directory} was trained on the template {found.template_sha256[:12]}, this one is {asked[:12]}; the model "
        f"answers by the one that it was trained on, {advice}",
        TemplateWarning,
        stacklevel=2,
    )
    return False


def write_json(path: Path, state: Any) -> None:
    """A JSON file for people to read, whole or not at all."""
    write_atomically(path, (json.dumps(state, indent=2, ensure_ascii=False) + "\n").encode())
