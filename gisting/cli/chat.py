"""``gisting chat``: a conversation in the terminal that starts from a gist."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gisting.cli.caches import held_prompts
from gisting.cli.compare import CacheOption, PromptFileOption, StoreOption, check_text, given_prompt
from gisting.cli.shared import (
    DeviceOption,
    DtypeOption,
    ModelArgument,
    TemplateOption,
    err,
    json_option,
    load_patched,
    out,
    plain,
    print_json,
)
from gisting.errors import GistError

if TYPE_CHECKING:
    from gisting.cache import GistCache
    from gisting.tokens import GistTokenizer

__all__ = ["chat"]

_COMMANDS = "/compare (the full prompt's answer to the same inputs), /quit"


def chat(
    model: ModelArgument,
    gist: Annotated[str | None, typer.Option(help="With --store: name of the prompt.")] = None,
    store: StoreOption = None,
    cache: CacheOption = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="The prompt's text, for /compare; neither a cache file nor a store keeps it."),
    ] = None,
    prompt_file: PromptFileOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 256,
    template: TemplateOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    as_json: Annotated[bool, json_option("an object for each answer, with input, output and condition")] = False,
) -> None:
    """Hold a conversation that starts from a compressed prompt: one input a line, from the terminal or from a pipe.

    Each turn reads only its own input. /compare shows what the model, with the full prompt as ordinary text, answers to
    the same inputs in a conversation of its own; it needs the prompt's text. /quit, or the end of the input, ends the
    conversation. Decoding is greedy.

    Example: gisting chat runs/demo --store gists --gist capitals --prompt 'write capitals'

    Example: gisting chat runs/demo --cache my.gist.safetensors
    """
    from gisting.generation.checks import check_origin

    text = given_prompt(prompt, prompt_file)
    if cache is not None and gist is not None:
        raise GistError("--gist needs --store; a cache file has no names")
    if store is not None and cache is None and gist is None:
        raise GistError("--store needs --gist NAME; `gisting store list DIR` shows the names")
    held = held_prompts(cache, store, [] if gist is None else [gist])
    if len(held) != 1:
        raise GistError(f"{cache} holds {len(held)} prompts; a conversation starts from one: compress it alone")
    loaded, tokenizer = load_patched(model, template, dtype, device)
    held = held.to(device)
    check_origin(loaded, tokenizer, held)
    if text is not None and store is not None and gist is not None:
        check_text(tokenizer, text, store, gist)
    sides = {"gist": _Side(loaded, tokenizer, held, max_new_tokens)}
    if sys.stdin.isatty():
        err.print(f"One input a line; {_COMMANDS}.", highlight=False)
    inputs: list[str] = []
    for line in _lines():
        if line == "/quit":
            return
        if line == "/compare":
            if text is None:
                err.print(
                    "/compare needs the prompt's text; start with --prompt TEXT or --prompt-file FILE", highlight=False
                )
                continue
            if not inputs:
                err.print("/compare needs an answer to compare with; write an input first", highlight=False)
                continue
            condition = "prompt"
            err.print("the full prompt's answer:", highlight=False)
            if condition not in sides:
                from gisting.generation.compression import full_prompt_cache

                sides[condition] = _Side(
                    loaded, tokenizer, full_prompt_cache(loaded, tokenizer, text, held.origin), max_new_tokens
                )
        elif line.startswith("/") and line[1:].isalpha():
            err.print(f"there is no {line}; there are {_COMMANDS}", highlight=False, soft_wrap=True)
            continue
        else:
            inputs.append(line)
            condition = "gist"
        answer = sides[condition].answer(inputs, is_shown=not as_json)
        if as_json:
            print_json({"input": inputs[-1], "output": answer, "condition": condition})


class _Side:
    """One conversation, and how far it has come."""

    def __init__(self, model: Any, tokenizer: GistTokenizer, cache: GistCache, max_new_tokens: int) -> None:
        self.model, self.tokenizer, self.cache, self.max_new_tokens = model, tokenizer, cache, max_new_tokens
        self.answers: list[str] = []

    def answer(self, inputs: list[str], *, is_shown: bool) -> str:
        """Return the answer to the last of ``inputs``, after answering those before it that were not answered yet."""
        from gisting.generation import converse

        if len(self.answers) == len(inputs) and is_shown:
            _Printed(self.tokenizer).show(self.answers[-1], is_whole=True)
        for number in range(len(self.answers), len(inputs)):
            streamer = _Printed(self.tokenizer) if is_shown and number == len(inputs) - 1 else None
            turn = converse(
                self.model,
                self.tokenizer,
                [inputs[number]],
                cache=self.cache,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                **({} if streamer is None else {"streamer": streamer}),
            )
            self.cache = turn.cache
            self.answers += turn.texts
        return self.answers[-1]


class _Printed:
    """A streamer that prints an answer while it grows. Control characters are shown, not obeyed."""

    def __init__(self, tokenizer: GistTokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = ""
        self.is_before_answer = True

    def put(self, value: Any) -> None:
        if not self.is_before_answer:
            self.ids += value.flatten().tolist()
            self.show(self.tokenizer.decode(self.ids).strip())
        self.is_before_answer = False

    def end(self) -> None:
        self.show(self.tokenizer.decode(self.ids).strip(), is_whole=True)

    def show(self, text: str, *, is_whole: bool = False) -> None:
        # A character of several tokens is not whole before the last of them.
        if text.startswith(self.shown) and (is_whole or not text.endswith("\N{REPLACEMENT CHARACTER}")):
            new = text[len(self.shown) :]
            out.out("".join(one if one == "\n" else plain(one) for one in new), end="", highlight=False)
            self.shown = text
        if is_whole:
            out.out()
        out.file.flush()


def _lines() -> Iterator[str]:
    """Yield the lines of standard input that are not empty; in a terminal, show when it is the user's turn."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() a history and editing
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise GistError(f"the standard input is not UTF-8 text ({error}); give UTF-8") from error
        if line:
            yield line
