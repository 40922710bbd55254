"""What several commands share: how their help looks, consoles, JSON, options, a checkpoint by name."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console

from gisting.errors import GistError

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
    "device_errors",
    "err",
    "json_option",
    "load_patched",
    "out",
    "plain",
    "print_json",
    "read_dtype",
    "read_text",
    "streams_put_back",
    "wanted_k",
]

# Without markup: what is printed holds texts of users and of files, where [/INST] is no mistake.
out = Console(markup=False)
err = Console(stderr=True, markup=False)


class Commands(typer.Typer):
    """Commands whose help ends with their examples, each on a line of its own, ready to be copied.

    A docstring gives both: its paragraphs that begin with ``Example: `` are the examples, the others the description.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(no_args_is_help=True, rich_markup_mode=None, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """As ``typer.Typer.command``, with help and epilog from the docstring."""

        def add(function: Any) -> Any:
            text, examples = [], []
            for paragraph in (inspect.getdoc(function) or "").split("\n\n"):
                is_example = paragraph.startswith(_EXAMPLE)
                (examples if is_example else text).append(paragraph.removeprefix(_EXAMPLE))
            lines = ["  " + " ".join(example.split()) for example in examples]
            # \b: lines as they are.
            ending = {"epilog": "\n".join(["\b", "Examples:", *lines])} if lines else {}
            return super(Commands, self).command(name, help="\n\n".join(text), **ending, **settings)(function)

        return add


_EXAMPLE = "Example: "
_DTYPES = ("float32", "bfloat16", "float16")
# Where JSON goes while everything else that is printed goes to standard error.
_json_file: TextIO | None = None


def _leave_stdout_to_json(context: typer.Context, wanted: bool) -> bool:
    global _json_file
    if wanted and not context.resilient_parsing:
        _json_file, sys.stdout = sys.stdout, sys.stderr
    return wanted


def json_option(what: str) -> Any:
    """``--json``: standard output then holds JSON alone, an object a line; whatever else is printed, by a library too,
    goes to standard error.

    Args:
        what: an object stands for, and what is in it where that is not plain.
    """
    return typer.Option(
        "--json", callback=_leave_stdout_to_json, is_eager=True, help=f"JSON alone on standard output: {what}."
    )


def print_json(value: Any) -> None:
    """One line of JSON on standard output; NaN and infinity, for which JSON has no word, are null."""
    print(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False), file=_json_file or sys.stdout)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def streams_put_back() -> Iterator[None]:
    """Standard output is afterwards what it was before, whatever ``--json`` did."""
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
    typer.Option(
        help="Prompt layout: alpaca, alpaca-t5, plain or chat. By default what the checkpoint was trained with."
    ),
]
KOption = Annotated[
    int | None,
    typer.Option(
        "--num-gist-tokens", "-k", help="Gist tokens for each prompt. By default what the checkpoint was trained with."
    ),
]
DtypeOption = Annotated[str, typer.Option(help="Floating point type of the weights: auto, float32, bfloat16, float16.")]
DeviceOption = Annotated[str, typer.Option(help="Device to run on, such as cpu or cuda.")]


def load_patched(
    model: str, template: str | None, dtype: str, device: str = "cpu", *, is_to_be_trained: bool = False
) -> tuple[Any, GistTokenizer]:
    """Model and tokenizer as a command asks for them, with a word where the model has not been trained to gist."""
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
    """What torch raises within the block, because of a device, is a :class:`GistError` that names it."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        raise GistError(f"device {device!r} cannot be used ({str(error).splitlines()[0]}); try --device cpu") from error


def read_dtype(dtype: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        GistError: there is none of that name here.
    """
    import torch

    if dtype not in _DTYPES:
        raise GistError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return getattr(torch, dtype)


def wanted_k(model: Any, wanted: int | None) -> int:
    """The k that was asked for, or the largest that the checkpoint was trained with."""
    from gisting.models.load import trained_num_gist_tokens

    trained = trained_num_gist_tokens(model)
    return wanted if wanted is not None else (1 if trained is None else trained[1])


def plain(text: str) -> str:
    """A text of somebody else for the terminal: control characters are shown, not obeyed."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        GistError: it is not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise GistError(f"{path} is not UTF-8 text ({error})") from error
