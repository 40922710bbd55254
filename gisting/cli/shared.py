"""What several commands share: the layout of their help, consoles, JSON output, options and loading a checkpoint."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

from gisting.errors import GistError
from gisting.tokens.text import plain

if TYPE_CHECKING:
    import torch

    from gisting.tokens import GistTokenizer

__all__ = [
    "Commands",
    "DeviceOption",
    "DtypeOption",
    "KOption",
    "ModelArgument",
    "TemplateOption",
    "check_new",
    "device_errors",
    "err",
    "json_option",
    "load_patched",
    "out",
    "plain",
    "print_json",
    "read_dtype",
    "streams_put_back",
    "wanted_k",
]


class _PlainConsole(Console):
    """A console on which texts, also those in cells of tables, are shown and never act: names come from anyone."""

    def render_str(self, text: str, **settings: Any) -> Text:
        parts = re.split(r"([\n\t])", text.replace("\r\n", "\n"))
        return super().render_str("".join(part if part in "\n\t" else plain(part) for part in parts), **settings)


# Without markup, because texts of users and of files may hold [/INST] and the like.
out = _PlainConsole(markup=False)
err = _PlainConsole(stderr=True, markup=False)


class Commands(typer.Typer):
    """A group of commands whose help ends with examples, each on one line, ready to be copied.

    The docstring of a command holds both: paragraphs that begin with ``Example: `` are the examples, the others the
    description.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(no_args_is_help=True, rich_markup_mode=None, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """As ``typer.Typer.command``, with help and epilog taken from the docstring."""

        def add(function: Any) -> Any:
            text, examples = [], []
            for paragraph in (inspect.getdoc(function) or "").split("\n\n"):
                is_example = paragraph.startswith(_EXAMPLE)
                (examples if is_example else text).append(paragraph.removeprefix(_EXAMPLE))
            lines = ["  " + " ".join(example.split()) for example in examples]
            # \b keeps the lines as they are.
            ending = {"epilog": "\n".join(["\b", "Examples:", *lines])} if lines else {}
            settings.setdefault("cls", _Command)
            return super(Commands, self).command(name, help="\n\n".join(text), **ending, **settings)(function)

        return add


class _Command(TyperCommand):
    """A command that names the nearest options when it is given one that does not exist."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # click's, or typer's copy of it, depending on typer's version
            wrong = getattr(error, "option_name", None)
            if hasattr(error, "possibilities") and isinstance(wrong, str):
                own = [flag for one in self.params for flag in one.opts if flag.startswith("--")]
                error.possibilities = nearest(wrong, own)  # pyright: ignore[reportAttributeAccessIssue]
            raise


def nearest(wrong: str, names: Sequence[str]) -> list[str]:
    """Return up to three of ``names`` that could be meant by a wrong one: spelled alike, its initials, or a part of it.

    Args:
        wrong: what was written, such as ``--lr``.
        names: what exists, such as ``--learning-rate``.
    """
    words = {name: name.strip("-").replace("_", "-").split("-") for name in names}
    meant = wrong.strip("-").replace("_", "-").split("-")
    initials = [name for name in names if "".join(word[0] for word in words[name] if word) == "".join(meant)]
    alike = difflib.get_close_matches("-".join(meant), ["-".join(words[name]) for name in names], cutoff=0.75)
    spelled = [name for part in alike for name in names if "-".join(words[name]) == part]
    parts = [name for name in names if len("".join(meant)) > 2 and set(meant) & set(words[name])]
    parts.sort(key=lambda name: -len(set(meant) & set(words[name])))
    return list(dict.fromkeys([*spelled, *initials, *parts]))[:3]


_EXAMPLE = "Example: "
_DTYPES = ("float32", "bfloat16", "float16")
# Where JSON goes when everything else is printed to standard error.
_json_file: TextIO | None = None


def _leave_stdout_to_json(context: typer.Context, wanted: bool) -> bool:
    global _json_file
    if wanted and not context.resilient_parsing:
        _json_file, sys.stdout = sys.stdout, sys.stderr
    return wanted


def json_option(what: str) -> Any:
    """Return the option ``--json``, with which standard output holds only JSON, one object per line.

    Everything else that is printed, also by libraries, then goes to standard error.

    Args:
        what: what an object is and holds, for the help.
    """
    return typer.Option(
        "--json", callback=_leave_stdout_to_json, is_eager=True, help=f"Print only JSON on standard output: {what}."
    )


def print_json(value: Any) -> None:
    """Print one line of JSON on standard output; NaN and infinity, which JSON does not have, become null."""
    print(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False), file=_json_file or sys.stdout)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def streams_put_back() -> Iterator[None]:
    """Restore standard output after this block, in case ``--json`` has replaced it."""
    global _json_file
    before = sys.stdout
    try:
        yield
    finally:
        sys.stdout, _json_file = before, None


ModelArgument = Annotated[
    str, typer.Argument(help="Directory of a checkpoint, or a repository on the Hugging Face hub.")
]
TemplateOption = Annotated[
    str | None,
    typer.Option(help="Template of a conversation: alpaca, alpaca-t5, plain or chat. By default the checkpoint's own."),
]
KOption = Annotated[
    int | None,
    typer.Option(
        "--num-gist-tokens",
        "-k",
        help="Gist tokens for each prompt. By default as many as in training.",
    ),
]
DtypeOption = Annotated[str, typer.Option(help="Floating point type of the weights: auto, float32, bfloat16, float16.")]
DeviceOption = Annotated[str, typer.Option(help="Device to run on, such as cpu or cuda.")]


def load_patched(
    model: str, template: str | None, dtype: str, device: str = "cpu", *, is_to_be_trained: bool = False
) -> tuple[Any, GistTokenizer]:
    """Load the model and tokenizer that a command names; print a note if the model has not been trained to gist."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from gisting.models.load import load, trained_num_gist_tokens

    if not sys.stderr.isatty():
        disable_progress_bar()
    if dtype not in ("auto", *_DTYPES):
        raise GistError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    loaded, tokenizer = load(model, template, dtype=dtype)
    if trained_num_gist_tokens(loaded) is None and not is_to_be_trained:
        err.print(f"note: {model} has not been trained to gist", highlight=False, soft_wrap=True)
    with device_errors(device):
        return loaded.to(torch.device(device)), tokenizer  # pyright: ignore[reportArgumentType]


@contextmanager
def device_errors(device: str) -> Iterator[None]:
    """Turn errors that torch raises in this block, because of a device, into a :class:`GistError` that names it."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise GistError(f"device {device!r} cannot be used ({str(error).splitlines()[0]}); try --device cpu") from error


def read_dtype(dtype: str) -> torch.dtype:
    """Return the dtype with this name.

    Raises:
        GistError: the name is unknown.
    """
    import torch

    if dtype not in _DTYPES:
        raise GistError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return getattr(torch, dtype)


def check_new(output: Path) -> None:
    """Raise unless a new file can be written to ``output``, before the work that makes it.

    Raises:
        GistError: it exists, its directory does not, or it is among the weights of a checkpoint.
    """
    from gisting.storage import check_place

    if output.exists():
        raise GistError(f"{output} exists already; remove it, or name another output")
    if not output.parent.is_dir():
        raise GistError(f"{output.parent} is not a directory; make it first")
    check_place(output)


def wanted_k(model: Any, wanted: int | None) -> int:
    """Return the requested k, or else the largest that the checkpoint was trained with."""
    from gisting.models.load import trained_num_gist_tokens

    trained = trained_num_gist_tokens(model)
    return wanted if wanted is not None else (1 if trained is None else trained[1])
