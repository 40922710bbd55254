"""What several commands share: consoles, options, a checkpoint by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gisting.errors import GistError
from gisting.tokens import GistTokenizer

__all__ = [
    "DeviceOption",
    "DtypeOption",
    "KOption",
    "ModelArgument",
    "TemplateOption",
    "err",
    "load_patched",
    "out",
    "plain",
    "read_text",
    "wanted_k",
]

# Without markup: what is printed holds texts of users and of files, where [/INST] is no mistake.
out = Console(markup=False)
err = Console(stderr=True, markup=False)

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
    import torch

    from gisting.models.load import load, trained_num_gist_tokens

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise GistError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    loaded, tokenizer = load(model, template, dtype=dtype)
    if trained_num_gist_tokens(loaded) is None and not is_to_be_trained:
        err.print(f"note: {model} has not been trained to gist", highlight=False, soft_wrap=True)
    try:
        return loaded.to(torch.device(device)), tokenizer  # pyright: ignore[reportArgumentType]
    except (RuntimeError, AssertionError) as error:
        raise GistError(f"device {device!r} cannot be used ({str(error).splitlines()[0]}); try --device cpu") from error


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
