"""The files of a run in progress: what was asked, the answers for people to read, and what the teacher said.

Place in the flow: below :mod:`gisting.distillation.distill`. Everything is written completely or not at all, so the
files of a killed process can be trusted. Independent of models.

```
settings.json         what the answers depend on; another prompt, model or setting is refused
questions.jsonl       the inputs that the model wrote, if none were given
answers.jsonl         the sampled answers, one to a line
teacher.safetensors   what the model says at their tokens with the whole prompt in view
k-16-matched/         for each k and start:
    settings.json     what the slots depend on besides
    start.safetensors the slots before training
    state.pt          the slots and the optimiser in the middle of training
```
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from gisting.errors import GistError
from gisting.eval.divergence import Teacher
from gisting.generation.sampling import SampledAnswer
from gisting.storage import write_atomically

__all__ = ["Directory", "text_hash"]

_SETTINGS, _QUESTIONS, _ANSWERS, _TEACHER = "settings.json", "questions.jsonl", "answers.jsonl", "teacher.safetensors"


def text_hash(*texts: str) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of some texts."""
    return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Directory:
    """Where a run keeps its files, or nowhere.

    Args:
        path: the directory, which is made if it does not exist; None keeps nothing.
    """

    path: Path | None

    def claim(self, settings: Mapping[str, Any], part: str = "") -> Path | None:
        """Write the settings, or raise unless those that are there are the same.

        Args:
            settings: what the files depend on; JSON.
            part: a subdirectory with settings of its own.

        Returns:
            The directory of the part, or None.

        Raises:
            GistError: the directory belongs to other settings.
        """
        if self.path is None:
            return None
        folder = self.path / part
        path = folder / _SETTINGS
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
            return folder
        with _reading(path):
            found = json.loads(path.read_text(encoding="utf-8"))
        differences = [
            f"{name} was {found.get(name)}, is {settings.get(name)}"
            for name in dict.fromkeys([*settings, *found])
            if found.get(name) != settings.get(name)
        ]
        if differences:
            raise GistError(
                f"{folder} was made with other settings ({'; '.join(differences)}); use those settings, take another "
                "directory, or delete this one to start again"
            )
        return folder

    def read_questions(self) -> list[str] | None:
        """Return the inputs that the model wrote, or None."""
        lines = self._read(_QUESTIONS)
        if lines is None:
            return None
        with _reading(self._at(_QUESTIONS)):
            return [line["input"] for line in lines]

    def write_questions(self, inputs: Sequence[str]) -> None:
        """Keep ``inputs`` that the model wrote."""
        self._write(_QUESTIONS, [{"input": input} for input in inputs])

    def read_answers(self, pairs: Sequence[tuple[str, str]]) -> list[SampledAnswer] | None:
        """Return the sampled answers to ``pairs`` of the prompt and an input, or None."""
        lines = self._read(_ANSWERS)
        if lines is None:
            return None
        with _reading(self._at(_ANSWERS)):
            if [line["input"] for line in lines] != [input for _, input in pairs]:
                raise GistError(
                    f"{self._at(_ANSWERS)} holds answers to other inputs; remove its directory to start again"
                )
            return [
                SampledAnswer(*pair, line["output"], line["token_ids"]) for pair, line in zip(pairs, lines, strict=True)
            ]

    def write_answers(self, answers: Sequence[SampledAnswer], num_held_out: int) -> None:
        """Keep ``answers``, of which the first ``num_held_out`` are to measure with."""
        lines = [
            {
                "use": "held-out" if row < num_held_out else "training",
                "input": answer.input,
                "output": answer.output,
                "token_ids": list(answer.token_ids),
            }
            for row, answer in enumerate(answers)
        ]
        self._write(_ANSWERS, lines)

    def read_teacher(self, answers: Sequence[SampledAnswer]) -> Teacher | None:
        """Return what the teacher said at the tokens of ``answers``, or None."""
        if self.path is None or not self._at(_TEACHER).exists():
            return None
        return Teacher.load(self._at(_TEACHER), answers)

    def write_teacher(self, teacher: Teacher) -> Teacher:
        """Keep what the ``teacher`` said; return it as read from the file, which does not stay in memory."""
        if self.path is None:
            return teacher
        teacher.save(self._at(_TEACHER))
        return Teacher.load(self._at(_TEACHER), teacher.answers)

    def _at(self, name: str) -> Path:
        return cast("Path", self.path) / name

    def _read(self, name: str) -> list[Any] | None:
        if self.path is None or not self._at(name).exists():
            return None
        with _reading(self._at(name)):
            # str.splitlines would also split at U+2028, which a text may contain.
            return [json.loads(line) for line in self._at(name).read_text(encoding="utf-8").split("\n") if line]

    def _write(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        if self.path is not None:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_atomically(self._at(name), text.encode())


class _reading:
    """Name the file in errors of reading it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, OSError | ValueError | KeyError | TypeError) and not isinstance(error, GistError):
            raise GistError(
                f"{self.path} cannot be read ({type(error).__name__}: {error}); remove its directory to start again"
            ) from error
