"""The result of an internalisation, as a value and as a file next to its checkpoint.

Place in the flow: after the loop over the stages. The file records which prompt went into the weights, by its hash, so
that a caller with another prompt can be warned. Reads and writes files; trains nothing and measures nothing.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gisting._deprecated import renamed_arguments
from gisting.errors import GistError
from gisting.storage import write_atomically

__all__ = [
    "RESULT_NAME",
    "Internalized",
    "PromptWarning",
    "StageResult",
    "check_prompt",
    "load_internalized",
    "prompt_hash",
]

#: The file's name in the output directory.
RESULT_NAME = "internalized.json"
#: Increased when older files need a conversion to be read. In format 1 the settings had other names.
FORMAT = 2
_KIND = "gisting internalisation"
_NAMES_OF_FORMAT_1 = {"template_sha256": "prompt_sha256", "compressor": "shortener", "layout": "prompt_format"}


class PromptWarning(UserWarning):
    """A model is used with a prompt other than the one it was trained on."""


@dataclass(frozen=True)
class StageResult:
    """The result of one stage.

    Args:
        number: from 1.
        condition: the condition of its requests: ``"prompt"``, ``"no-prompt"`` or ``"gist"``.
        share: share of the prompt that the schedule asks for.
        realised_share: share of the prompt that was kept, as the model's tokenizer counts it.
        num_examples: maximum number of examples in a prompt.
        mean_examples: mean number of examples in the prompts.
        num_gist_tokens: k of a stage that reads a gist, otherwise None.
        prompt_tokens: mean tokens that a training request costs in addition to the bare query.
        query_tokens: mean tokens of the bare queries.
        num_records: number of training records.
        train_loss: the loss that ``Trainer`` returns; for a resumed stage, not the loss of the whole stage.
        seconds: time of training and evaluation; for a resumed stage, since it was resumed.
        metrics: scores on the evaluation records, for each condition (``"no-prompt"``, and the stage's own) by name;
            empty without evaluation records.
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
        """Mean tokens of a request: prompt and query."""
        return self.prompt_tokens + self.query_tokens


@dataclass(frozen=True)
class Internalized:
    """The result of a finished internalisation or control.

    Args:
        stages: in order.
        condition: the condition under which to run the model: ``"no-prompt"``, ``"prompt"`` or ``"gist"``.
        prompt_sha256: SHA-256 of the prompt's text, UTF-8, in hex.
        settings: everything that determined the run: schedule, shortener, tail, control, records (by hash), ...
        num_trainable_parameters: number of trained parameters.
        num_parameters: number of all parameters.
        seconds: time of all stages together.
    """

    stages: tuple[StageResult, ...]
    condition: str
    prompt_sha256: str
    settings: dict[str, Any]
    num_trainable_parameters: int
    num_parameters: int
    seconds: float

    @property
    def template_sha256(self) -> str:
        """The old name of ``prompt_sha256``; deprecated."""
        warnings.warn(
            "Internalized.template_sha256 will be removed in the next release; use prompt_sha256",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.prompt_sha256

    @property
    def metrics(self) -> dict[str, float]:
        """Scores of the finished model under its condition; empty without evaluation records."""
        return self.stages[-1].metrics.get(self.condition, {})

    @property
    def tokens(self) -> float:
        """Mean tokens of a request to the finished model."""
        last = self.stages[-1]
        return last.tokens if self.condition == last.condition else last.query_tokens

    def save(self, directory: str | Path) -> None:
        """Write ``internalized.json`` into ``directory`` atomically.

        Raises:
            OSError: the file cannot be written.
        """
        write_json(Path(directory) / RESULT_NAME, {"kind": _KIND, "format": FORMAT, **asdict(self)})


def load_internalized(directory: str | Path) -> Internalized:
    """Read what :meth:`Internalized.save` wrote into ``directory``.

    Raises:
        GistError: the file is missing, has a later format, or is incomplete.
    """
    path = Path(directory) / RESULT_NAME
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GistError(f"{directory} has no {RESULT_NAME}, so it is not a finished internalisation") from None
    except ValueError as error:
        raise GistError(f"{path} is not JSON ({error})") from error
    if not isinstance(state, dict) or state.pop("kind", None) != _KIND:
        raise GistError(f"{path} is not the result of an internalisation")
    found = state.pop("format", None)
    if found not in (1, FORMAT):
        raise GistError(
            f"{path} has format {found}, this version reads {FORMAT}; upgrade gisting: pip install -U gist-tokens"
        )
    try:
        stages = tuple(StageResult(**stage) for stage in state.pop("stages"))
        state = with_current_names(state)
        return Internalized(stages, **{**state, "settings": with_current_names(state["settings"])})
    except (AttributeError, KeyError, TypeError) as error:
        raise GistError(f"{path} is incomplete ({type(error).__name__}: {error})") from error


def with_current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the ``settings`` that a run of format 1 wrote; others are unchanged."""
    renamed = {_NAMES_OF_FORMAT_1.get(name, name): value for name, value in settings.items()}
    if isinstance(renamed.get("method"), dict):  # what is trained; there was no way to teach but stages
        renamed = {**renamed, "weights": renamed["method"], "method": "stages"}
    return {**renamed, "control": "shortened"} if renamed.get("control") == "compressed" else renamed


@renamed_arguments(template="prompt")
def prompt_hash(prompt: str) -> str:
    """Compute the SHA-256 of the text of ``prompt``, UTF-8, in hex."""
    return hashlib.sha256(prompt.encode()).hexdigest()


@renamed_arguments(template="prompt")
def check_prompt(directory: str | Path, prompt: str) -> bool:
    """Warn if a model was trained on another prompt, because what it has internalised cannot change any more.

    Args:
        directory: the output directory of an internalisation.
        prompt: what the caller would send, or believes to be internalised.

    Returns:
        Whether it is the prompt that the model was trained on.

    Raises:
        GistError: as :func:`load_internalized`.
    """
    found = load_internalized(directory)
    given = prompt_hash(prompt)
    if found.prompt_sha256 == given:
        return True
    if found.condition == "gist":
        advice = "compress this prompt again and measure the answers"
    else:
        advice = "train it again: gisting internalize"
    warnings.warn(
        f"{directory} was trained on the prompt {found.prompt_sha256[:12]}, this prompt is {given[:12]}; the model "
        f"answers according to the one that it was trained on; {advice}",
        PromptWarning,
        stacklevel=2,
    )
    return False


def write_json(path: Path, state: Any) -> None:
    """Write a readable JSON file atomically."""
    write_atomically(path, (json.dumps(state, indent=2, ensure_ascii=False) + "\n").encode())
