"""The demo: the guide of a museum, on a real chat model, with the adapter of this package.

Place in the flow: ``base_model`` and the texts of this folder -> **museum** -> ``trial``. The prompt, the questions
about it and the inputs to distil on are files beside this module; no question is among the inputs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gisting.demo.base_model import HUB_NAME, fetch, is_base_model
from gisting.demo.trial import TrialResult, read_questions, run_trial
from gisting.models.load import load
from gisting.tokens.text import read_text

__all__ = ["MuseumResult", "run_museum", "shipped_adapter"]

_FOLDER = Path(__file__).parent
_ADAPTER = _FOLDER.parent / "adapters" / "smollm2-135m-instruct"
_CACHE = "museum.gist.safetensors"


@dataclass(frozen=True)
class MuseumResult:
    """The results of the demo.

    Args:
        model: the directory of the model.
        adapter: whether the adapter of the package compressed the prompt first.
        trial: what the trial found.
        seconds: seconds of each part, by name, fetching and loading included.
        total_s: seconds from the beginning to the end.
        printed: the text that was printed; empty if the console does not record.
    """

    model: str
    adapter: bool
    trial: TrialResult
    seconds: dict[str, float]
    total_s: float
    printed: str

    def to_row(self) -> dict[str, object]:
        """Return the row for a results file."""
        row = {"command": "gisting demo", "model": HUB_NAME, "adapter": self.adapter, **self.trial.to_row()}
        return {**row, "seconds": self.seconds, "total_s": self.total_s, "printed": self.printed}


def shipped_adapter(name_or_path: str | Path) -> Path | None:
    """Return the directory of the package's adapter for a model, or None if it has none.

    Args:
        name_or_path: a repository on the hub, or a directory.
    """
    is_there = (_ADAPTER / "gist_adapter.json").is_file()
    return _ADAPTER if is_there and is_base_model(name_or_path) else None


def run_museum(
    output_dir: str | Path = "runs/museum",
    *,
    model: str | Path | None = None,
    seed: int = 0,
    console: Console | None = None,
    **settings: Any,
) -> MuseumResult:
    """Fetch the model if necessary, try the museum's prompt on it, and print what comes out.

    Args:
        output_dir: where the distilled gist is saved.
        model: a directory or a repository on the hub; None for SmolLM2-135M-Instruct, which is fetched.
        seed: seed of everything that is drawn.
        console: where to print; by default standard output.
        **settings: for :func:`~gisting.demo.trial.run_trial`: ``steps``, ``num_gist_tokens`` and the like.

    Returns:
        The printed numbers.

    Raises:
        GistError: the model can be fetched from nowhere, or is damaged.
        ImportError: a package that reads the model or the adapter is not installed.
    """
    console = Console(record=True) if console is None else console
    begin = time.perf_counter()

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    where = Path(model) if model is not None else fetch(line)
    fetched = time.perf_counter()
    adapter = shipped_adapter(HUB_NAME if model is None else model)
    loaded, tokenizer = load(where, "chat", dtype="auto")
    seconds = {"fetch": round(fetched - begin, 2), "load": round(time.perf_counter() - fetched, 2)}
    number = sum(parameter.numel() for parameter in loaded.parameters())
    name = HUB_NAME if model is None else str(model)
    line(
        f"{name}: {number / 1e6:.0f} million parameters, unchanged, {str(loaded.dtype).removeprefix('torch.')} on "
        f"{loaded.device}, loaded in {seconds['load']:.1f} s. A model this small often errs, with the full prompt too."
    )
    if adapter is None:
        line("There is no adapter for it here, so the prompt is distilled at once.")
    output_dir = Path(output_dir)
    trial = run_trial(
        loaded,
        tokenizer,
        read_text(_FOLDER / "museum.txt"),
        read_questions(_FOLDER / "museum_questions.jsonl"),
        inputs=read_text(_FOLDER / "museum_inputs.txt").splitlines(),
        adapter=adapter,
        seed=seed,
        console=console,
        **settings,
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    trial.cache.save(output_dir / _CACHE)
    size = (output_dir / _CACHE).stat().st_size
    line(f"\nSaved: {output_dir / _CACHE} ({size:,} bytes). Next, a conversation, and a prompt of your own:")
    console.print(
        f"  gisting chat {_short(where, output_dir)} --cache {output_dir / _CACHE}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"  gisting try {HUB_NAME} --prompt-file my-prompt.txt --input 'my question'",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    seconds |= trial.seconds
    total_s = round(time.perf_counter() - begin, 1)
    parts = ", ".join(f"{name} {part:.0f}" for name, part in seconds.items())
    line(f"\n{total_s:.0f} s in total ({parts}).")
    printed = console.export_text() if console.record else ""
    return MuseumResult(str(where), adapter is not None, trial, seconds, total_s, printed)


def _short(model: Path, output_dir: Path) -> Path:
    """Return a link to the model beside the gist, which is shorter to type than a path in a cache."""
    link = output_dir / "model"
    if not model.is_dir():  # a repository on the hub
        return model
    try:
        if link.is_symlink():
            link.unlink()
        link.symlink_to(model.resolve(), target_is_directory=True)
    except OSError:  # a file system without links, or something else of this name
        return model
    return link
