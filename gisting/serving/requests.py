"""Requests that name a gist: from text and messages to the ids that a server reads.

Place in the flow: text -> tokens -> **requests** -> HTTP or an offline engine. Puts the placeholders of the gist tokens
in front, writes the template around an input as :func:`gisting.generate` does, and refuses what does not work with a
gist. The bodies are those of vLLM's OpenAI-compatible routes. Does not depend on vLLM or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gisting.data.messages import read_calls, text_of
from gisting.errors import GistError
from gisting.serving.gists import GistRefusedError, StoredGists, gist_name, with_placeholders
from gisting.store.index import StoreEntry
from gisting.tokens import ChatTemplate, GistTokenizer

__all__ = [
    "ROUTES",
    "GistRequest",
    "chat_ids",
    "chat_with_ids",
    "check_extra",
    "check_without_gist",
    "completion_with_ids",
    "request",
]

# Options that need the prompt itself or another prompt, or that bypass the connector.
_NOT_WITH_A_GIST = {
    "echo": "there is no prompt to repeat",
    "prompt_logprobs": "there is no prompt to score",
    "use_beam_search": "vLLM's beam search does not pass the gist's name on to its beams",
    "truncate_prompt_tokens": "it would cut off the gist",
    "suffix": "nothing can follow the answer",
    "prompt_embeds": "the prompt must be text or ids",
    "tools": "tools are part of a chat",
    "functions": "functions are part of the prompt, which is already compressed",
    "documents": "documents are part of the prompt, which is already compressed",
    "chat_template": "the template must be the one that the gist was made with",
    "chat_template_kwargs": "the template must be the one that the gist was made with",
    "reasoning_effort": "it is part of the prompt, which is already compressed",
    "continue_final_message": "the answer begins after the last message",
}


@dataclass(frozen=True)
class GistRequest:
    """A request with the ids that the engine reads, in the form that each client takes.

    Args:
        gist: name or key of the gist.
        prompt_token_ids: k gist tokens, then the ids after them.
        messages: the messages of a chat, from which the ids were made, otherwise None.
    """

    gist: str
    prompt_token_ids: list[int]
    messages: list[dict[str, Any]] | None = None

    @property
    def prompt(self) -> dict[str, Any]:
        """The prompt for ``vllm.LLM.generate``."""
        return {"prompt_token_ids": self.prompt_token_ids}

    @property
    def extra_args(self) -> dict[str, Any]:
        """The arguments for ``vllm.SamplingParams(extra_args=...)``."""
        return {"kv_transfer_params": {"gist": self.gist}}

    def completion(self) -> dict[str, Any]:
        """Return arguments for the ``openai`` client's ``completions.create``; add the model and settings."""
        return {"prompt": self.prompt_token_ids, "extra_body": self.extra_args}

    def chat(self) -> dict[str, Any]:
        """Return arguments for the ``openai`` client's ``chat.completions.create``; add the model and settings.

        Raises:
            GistError: the request was not made from messages.
        """
        if self.messages is None:
            raise GistError("this request was not made from messages; give messages=, or send completion()")
        params = {"gist": self.gist, "prompt_token_ids": self.prompt_token_ids}
        return {"messages": self.messages, "extra_body": {"kv_transfer_params": params}}


def request(
    gist: str,
    input: str | None = None,
    *,
    tokenizer: GistTokenizer,
    num_gist_tokens: int,
    messages: Sequence[Mapping[str, Any]] | None = None,
    token_ids: Sequence[int] | None = None,
) -> GistRequest:
    """Make a request that continues a gist. Give one of ``input``, ``messages`` and ``token_ids``.

    A server that ``gisting serve`` started does this itself for requests with text. Use this function offline, or to
    see the ids.

    Args:
        gist: name or key of the gist in the server's store.
        input: the text to write the template around; may be empty.
        tokenizer: the tokenizer of the checkpoint that is served.
        num_gist_tokens: k of the gist: ``GistStore(path)[gist].num_gist_tokens[0]``.
        messages: a chat as :func:`chat_ids` takes it.
        token_ids: the ids after the gist, used unchanged.

    Raises:
        GistRefusedError: the messages or ids cannot follow a gist.
        GistError: none or several of the three are given, or k is less than 1.
    """
    given = [
        name
        for name, value in (("input", input), ("messages", messages), ("token_ids", token_ids))
        if value is not None
    ]
    if len(given) != 1:
        raise GistError(f"give one of input, messages and token_ids, got {' and '.join(given) or 'none'}")
    if num_gist_tokens < 1:
        raise GistError(f"num_gist_tokens must be at least 1, got {num_gist_tokens}")
    if messages is not None:
        rest = chat_ids(tokenizer, messages)
    elif input is not None:
        (rest,) = _encode(tokenizer.encode_continuations, [input])
    else:
        rest = list(token_ids or ())
    ids = with_placeholders(rest, num_gist_tokens, tokenizer.gist_token_id)
    return GistRequest(gist, ids, None if messages is None else [dict(message) for message in messages])


def chat_ids(tokenizer: GistTokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the ids after the gist in a chat, the same as in :func:`gisting.converse`.

    Args:
        tokenizer: the tokenizer of the checkpoint, with its template.
        messages: ``{"role": "user" or "assistant", "content": text}`` in alternation, beginning and ending with the
            user. Content may also be a list of ``{"type": "text", "text": ...}``. The gist replaces the system message.
            Under the template ``"chat"`` also ``tool_calls`` of the assistant, and messages of tools.

    Raises:
        GistRefusedError: a message has another role, order or content.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise GistRefusedError("messages must be a list of at least one message")
    is_chat = isinstance(tokenizer.template, ChatTemplate)
    if is_chat and any(
        isinstance(one, Mapping) and (one.get("tool_calls") or one.get("role") == "tool") for one in messages
    ):
        return _encode(tokenizer.encode_continuations, [_with_calls(messages)])[0]
    texts = []
    for place, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role in ("system", "developer"):
            raise GistRefusedError(
                f"messages[{place}] is a {role} message, which the gist replaces; leave it out, or compress it"
            )
        wanted = ("user", "assistant")[place % 2]
        if role != wanted:
            raise GistRefusedError(
                f"messages[{place}] must be from the {wanted}, because roles alternate after a gist; got {role!r:.40}"
            )
        for field in ("tool_calls", "function_call"):
            if message.get(field):
                raise GistRefusedError(
                    f"messages[{place}] holds {field}, but tools are part of the prompt, which is already compressed; "
                    "leave such messages out"
                )
        texts.append(_text(message.get("content"), place))
    if len(texts) % 2 == 0:
        raise GistRefusedError("messages must end with one from the user, which is answered")
    if isinstance(tokenizer.template, ChatTemplate):
        plain = [{"role": message["role"], "content": text} for message, text in zip(messages, texts, strict=True)]
        return _encode(tokenizer.encode_continuations, [plain])[0]
    ids: list[int] = []
    for place in range(0, len(texts) - 1, 2):
        asked, said = [texts[place]], [tokenizer.as_text(texts[place + 1])]  # a client wrote the answer, too
        ids += _encode(tokenizer.encode_continuations, asked)[0] + _encode(tokenizer.encode_completions, asked, said)[0]
    return ids + _encode(tokenizer.encode_continuations, texts[-1:])[0]


def _with_calls(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Return a chat with calls of tools as chat templates read it: arguments as objects, contents as texts."""
    found = []
    for place, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ("user", "assistant", "tool"):
            raise GistRefusedError(
                f"messages[{place}] must be from the user, the assistant or a tool, got {role!r:.40}"
            )
        calls = message.get("tool_calls") or []
        content = message.get("content")
        text = "" if content is None and calls else _text(content, place)
        made = {name: message[name] for name in ("name", "tool_call_id") if isinstance(message.get(name), str)}
        made = {"role": role, "content": text, **made}
        if calls:
            try:
                made["tool_calls"] = read_calls(calls, f"messages[{place}]")
            except GistError as error:
                raise GistRefusedError(str(error)) from error
        found.append(made)
    if found[-1]["role"] == "assistant":
        raise GistRefusedError("messages must end with one from the user or a tool, which is answered")
    return found


def _after_prompt(
    body: Mapping[str, Any], entry: StoreEntry, gists: StoredGists, tokenizer: GistTokenizer
) -> Sequence[Mapping[str, Any]]:
    """Return the messages of a chat that follow its prompt, which with ``tools`` must be what the gist was made of."""
    messages, tools = body.get("messages") or (), body.get("tools")
    if not tools:
        return messages
    first = messages[0] if isinstance(messages, list) and isinstance(messages[0], Mapping) else {}
    has_system = first.get("role") in ("system", "developer")
    try:
        prompt = tokenizer.prompt_with_tools(_text(first.get("content"), 0) if has_system else None, tools)
    except (GistError, UnicodeError) as error:
        raise GistRefusedError(f"tools cannot come with a gist: {error}") from error
    if not gists.is_made_of(entry, prompt):
        functions = [tool.get("function", tool) for tool in tools]
        names = ", ".join(str(one.get("name")) if isinstance(one, Mapping) else "?" for one in functions)
        raise GistRefusedError(
            f"gist {entry.name or entry.key!r:.100} was not made of these tools ({names:.200}) "
            f"{'and this system message' if has_system else 'without a system message'}; send the system message and "
            "the tools that it was made of, or compress these: GistTokenizer.prompt_with_tools"
        )
    return messages[1:] if has_system else messages


def completion_with_ids(body: Mapping[str, Any], gists: StoredGists, tokenizer: GistTokenizer) -> dict[str, Any] | None:
    """Return the body of a completion with its prompts as ids, or None if it names no gist.

    A prompt of text is an input, and the template is written around it. A prompt of ids is unchanged except for the
    placeholders of the gist tokens in front.

    Args:
        body: the parsed JSON body of the request.
        gists: the gists that requests may name.
        tokenizer: the tokenizer of the model that is served.

    Raises:
        GistRefusedError: the gist is refused, or something in the body does not work with one.
    """
    entry = _entry(body, gists, tokenizer)
    if entry is None:
        return None
    prompt: Any = body.get("prompt")
    if isinstance(prompt, str):
        prompts = _encode(tokenizer.encode_continuations, [prompt])
    elif _is_ids(prompt):
        prompts = [prompt]
    elif isinstance(prompt, list) and prompt and all(isinstance(text, str) for text in prompt):
        prompts = _encode(tokenizer.encode_continuations, prompt)
    elif isinstance(prompt, list) and prompt and all(map(_is_ids, prompt)):
        prompts = prompt
    else:
        raise GistRefusedError("prompt must be a text, a list of texts, of ids, or of lists of ids")
    placed = [with_placeholders(ids, entry.num_gist_tokens, tokenizer.gist_token_id) for ids in prompts]
    is_one = isinstance(prompt, str) or _is_ids(prompt)
    return {**body, "prompt": placed[0] if is_one else placed, "kv_transfer_params": _params(body)}


def chat_with_ids(body: Mapping[str, Any], gists: StoredGists, tokenizer: GistTokenizer) -> dict[str, Any] | None:
    """Return the body of a chat completion with the ids of its messages added, or None if it names no gist.

    Args:
        body: the parsed JSON body of the request.
        gists: the gists that requests may name.
        tokenizer: the tokenizer of the model that is served.

    Raises:
        GistRefusedError: the gist is refused, or something in the body does not work with one.
    """
    entry = _entry({name: value for name, value in body.items() if name != "tools"}, gists, tokenizer)
    if entry is None:
        return None
    given = body["kv_transfer_params"].get("prompt_token_ids")
    if given is not None and (not isinstance(given, list) or not _is_ids(given)):
        raise GistRefusedError("kv_transfer_params['prompt_token_ids'] must be a list of ids")
    if body.get("add_generation_prompt") is False:
        raise GistRefusedError(
            "add_generation_prompt does not work with a gist: the answer begins after the last message"
        )
    rest = chat_ids(tokenizer, _after_prompt(body, entry, gists, tokenizer))
    if given is not None:
        rest = given
    ids = with_placeholders(rest, entry.num_gist_tokens, tokenizer.gist_token_id)
    return {**body, "kv_transfer_params": {**_params(body), "prompt_token_ids": ids}}


def check_extra(body: Mapping[str, Any]) -> None:
    """Raise if ``body`` has ``kv_transfer_params`` in a place that vLLM reads and this middleware does not.

    Raises:
        GistRefusedError: ``vllm_xargs`` holds ``kv_transfer_params``.
    """
    others = body.get("vllm_xargs")
    if isinstance(others, Mapping) and "kv_transfer_params" in others:
        raise GistRefusedError(
            "vllm_xargs holds kv_transfer_params; give kv_transfer_params={'gist': name} next to it, not in it"
        )


def check_without_gist(body: Mapping[str, Any], gist_token_id: int) -> None:
    """Raise if ``body``, which names no gist, has gist tokens (``gist_token_id``), which would have no meaning.

    Raises:
        GistRefusedError: its prompt has gist tokens.
    """
    params = body.get("kv_transfer_params")
    given = [body.get("prompt"), params.get("prompt_token_ids") if isinstance(params, Mapping) else None]
    for prompt in given:
        for ids in (prompt, *prompt) if isinstance(prompt, list) else ():
            if isinstance(ids, list) and gist_token_id in ids:
                raise GistRefusedError(
                    f"the prompt has gist tokens ({gist_token_id}) but names no gist; give "
                    "kv_transfer_params={'gist': name}"
                )


#: The function that prepares a body, by the path of its route.
ROUTES: dict[str, Callable[[Mapping[str, Any], StoredGists, GistTokenizer], dict[str, Any] | None]] = {
    "/v1/completions": completion_with_ids,
    "/v1/chat/completions": chat_with_ids,
}


def _entry(body: Mapping[str, Any], gists: StoredGists, tokenizer: GistTokenizer) -> StoreEntry | None:
    name = gist_name(body.get("kv_transfer_params"))
    if name is None:
        return None
    for field, reason in _NOT_WITH_A_GIST.items():
        # prompt_logprobs=0 also scores the prompt.
        if body.get(field) not in (None, False, [], {}, "") or (field == "prompt_logprobs" and body.get(field) == 0):
            raise GistRefusedError(f"{field} does not work with a gist: {reason}")
    allowed = body.get("allowed_token_ids")
    if isinstance(allowed, list) and tokenizer.gist_token_id in allowed:
        raise GistRefusedError("allowed_token_ids holds the gist token, which is never sampled; leave it out")
    return gists.find(name)


def _encode(encode: Callable[..., list[list[int]]], *texts: Sequence[Any]) -> list[list[int]]:
    try:
        return encode(*texts)
    except (GistError, UnicodeError, TypeError) as error:  # TypeError: half of a pair of surrogates
        raise GistRefusedError(f"the text cannot follow a gist: {error}") from error


def _params(body: Mapping[str, Any]) -> dict[str, Any]:
    return {"gist": body["kv_transfer_params"]["gist"]}


def _is_ids(value: Any) -> bool:
    # bool is an int.
    return isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)


def _text(content: Any, place: int) -> str:
    text = text_of(content)
    if text is None:
        raise GistRefusedError(f"messages[{place}] must be text; images and audio cannot follow a gist")
    return text
