"""Conversations as records: the system message is what is gisted; each answer is an output, what came before its input.

Place in the flow: sources -> **messages** -> records. Reads the layouts in which data sets of conversations come. Does
not render a conversation; the tokenizer's template does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gisting.errors import GistError, RecordError
from gisting.tokens import ChatTemplate, GistTokenizer, Message

__all__ = [
    "LAYOUTS",
    "Messages",
    "TokenizerSource",
    "as_instructions",
    "is_messages",
    "prompt_of",
    "read_calls",
    "text_of",
]

#: A tokenizer, or a function that loads it when it is needed.
TokenizerSource = GistTokenizer | Callable[[], GistTokenizer]

# What data sets call the speakers.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}
#: The keys by which a conversation is known.
LAYOUTS = ("messages", "conversations", "completion")


class Messages(tuple[Message, ...]):
    """The messages of a conversation between its prompt and an answer: an input that can be looked up and printed."""

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(json.dumps(self, sort_keys=True))

    def __str__(self) -> str:
        """Return a line for each message, for people."""
        return "\n".join(
            f"{message.get('role')}: {message.get('content') or json.dumps(message.get('tool_calls'))}"
            for message in self
        )


def is_messages(value: Any) -> bool:
    """Return whether ``value`` is a list of messages."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, Mapping) for one in value)


def as_instructions(
    item: Mapping[str, Any],
    where: str,
    *,
    needs_instruction: bool = True,
    tokenizer: TokenizerSource | None = None,
) -> list[Mapping[str, Any]]:
    """Give a conversation the keys ``instruction``, ``input`` and ``output``, once for each answer in it.

    ============================================================= ===========================
    ``{"messages": [{"role": ..., "content": ...}, ...]}``        OpenAI, TRL
    ``{"conversations": [{"from": ..., "value": ...}, ...]}``     ShareGPT
    ``{"prompt": ..., "completion": ...}``                        TRL, texts or lists of messages
    ============================================================= ===========================

    The instruction is the system message, or what stands for it and a list of ``tools``
    (:meth:`GistTokenizer.prompt_with_tools`). The input is the question, or, if more came before the answer, a
    :class:`Messages`. The output is what the model writes, which for a call of a tool is the template's text. Of
    ``prompt`` and ``completion``, only the answers in the completion count. Messages after the last answer are left
    out, and so are keys whose value is None, with which data sets fill their columns. Arguments of calls may be JSON.
    Other items may have ``tools``, too, which then are a part of their instruction.

    Args:
        item: a conversation; an item that has ``output``, or is not a conversation, is returned as it is, except for
            tools.
        where: how errors refer to it.
        needs_instruction: whether there must be a system message or tools. Without, a prompt that is a text is the
            input.
        tokenizer: lays out tools and calls of tools.

    Raises:
        RecordError: a message is not of one of these layouts, there is no answer or no system message, or tools cannot
            be laid out.
    """
    layout = _layout(item)
    if layout is None or item.get("output") is not None:
        if not _tools(item.get("tools"), where):
            return [item]
        prompt = _prompt(item.get("instruction") or None, item["tools"], where, tokenizer)
        return [{**{name: value for name, value in item.items() if name != "tools"}, "instruction": prompt}]
    rest = {name: value for name, value in item.items() if name not in (*LAYOUTS, "prompt", "tools")}
    num_given = 0
    if layout != "completion":
        messages = item[layout]
    else:
        prompt, completion = item.get("prompt"), item["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            row = (
                {**rest, "output": completion} if needs_instruction else {**rest, "input": prompt, "output": completion}
            )
            laid_out = _prompt(prompt if needs_instruction else None, item.get("tools"), where, tokenizer)
            return [row if laid_out is None else {**row, "instruction": laid_out}]
        is_chat = isinstance(prompt, list) and isinstance(completion, list)
        messages, num_given = ([*item["prompt"], *completion], len(item["prompt"])) if is_chat else (None, 0)
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RecordError(
            f"{where}: {layout!r} must be a list of messages with role and content (or, with 'prompt', a text as that "
            "is)"
        )
    turns = [_message(message, f"{where}, message {number}") for number, message in enumerate(messages)]
    system = turns[0]["content"] if turns and turns[0]["role"] == "system" else None
    start = 0 if system is None else 1
    for number, turn in enumerate(turns[start:], start=start):
        if turn["role"] == "system":
            raise RecordError(f"{where}, message {number} is another system message; there can be one, at the start")
    prompt = _prompt(system, item.get("tools"), where, tokenizer)
    found = {} if prompt is None else {"instruction": prompt}
    if needs_instruction and not found:
        raise RecordError(f"{where} has no system message, which is what is gisted; give it one as its first message")
    answers = [place for place in range(max(start, num_given), len(turns)) if turns[place]["role"] == "assistant"]
    if not answers:
        roles = ", ".join(turn["role"] for turn in turns[start:]) or "none"
        raise RecordError(f"{where} has no answer of the assistant, got {roles} after the system message; give one")
    rows = []
    for place in answers:
        asked = Messages(turns[start:place])
        is_text = len(asked) == 1 and _is_plain(asked[0]) and asked[0]["role"] == "user"
        input = asked[0]["content"] if is_text else asked or ""
        rows.append({**rest, **found, "input": input, "output": _written(turns[place], input, tokenizer, where)})
    return rows


def prompt_of(item: Mapping[str, Any], where: str, tokenizer: TokenizerSource | None = None) -> str:
    """Return the prompt of a conversation, or of a text ``prompt`` with ``tools``.

    Args:
        item: has ``messages`` or ``conversations``, of which the system message counts, or ``prompt``; and perhaps
            ``tools``.
        where: how errors refer to it.
        tokenizer: lays out tools.

    Raises:
        RecordError: there is neither a system message nor tools, or as :func:`as_instructions`.
    """
    layout = _layout(item)
    messages = () if layout is None else item[layout]
    system = item.get("prompt")
    if isinstance(messages, list | tuple) and messages and system is None:
        first = _message(messages[0], f"{where}, message 0")
        system = first["content"] if first["role"] == "system" else None
    prompt = _prompt(system, item.get("tools"), where, tokenizer)
    if prompt is None:
        raise RecordError(
            f"{where} has no system message, which is what is compressed; give it one as its first message"
        )
    return prompt


def _layout(item: Mapping[str, Any]) -> str | None:
    """Return the key of a conversation's messages, None if there is none. Data sets fill their columns with None."""
    return next((name for name in LAYOUTS if item.get(name) is not None), None)


def _is_plain(message: Message) -> bool:
    """Whether a message is its content alone. Numbers, such as a weight for the loss, are not a part of a text."""
    return all(name in ("role", "content") or isinstance(value, int | float) for name, value in message.items())


def text_of(content: Any) -> str | None:
    """Return a content that is a text, or a list of parts that are texts, as vLLM reads them; None for any other."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) and content else [content]
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    return "\n".join(str(text) for text in texts) if all(isinstance(text, str) for text in texts) else None


def _prompt(system: str | None, given: Any, where: str, tokenizer: TokenizerSource | None) -> str | None:
    """Return what stands for a system message and tools, None if there are neither."""
    tools = _tools(given, where)
    return _laid_out(tokenizer, where, lambda chat: chat.prompt_with_tools(system, tools)) if tools else system


def _written(message: Message, input: str | Messages, tokenizer: TokenizerSource | None, where: str) -> str:
    if _is_plain(message):
        return message["content"]

    def write(chat: GistTokenizer) -> str:
        if not isinstance(chat.template, ChatTemplate):
            if message.get("tool_calls"):
                raise GistError(
                    f"calls of tools are laid out by the template 'chat' only, and the tokenizer's template is "
                    f"{chat.template.name!r}; leave them out"
                )
            return message["content"]
        return chat.template.written_answer(input, message)

    return _laid_out(tokenizer, where, write)


def _laid_out(tokenizer: TokenizerSource | None, where: str, write: Callable[[GistTokenizer], str]) -> str:
    if tokenizer is None:
        raise RecordError(
            f"{where} has tools or other parts of messages that a chat template lays out; give the tokenizer: "
            "load_records(..., tokenizer=tokenizer)"
        )
    try:
        return write(tokenizer if isinstance(tokenizer, GistTokenizer) else tokenizer())
    except GistError as error:
        raise RecordError(f"{where}: {error}") from error


def _tools(tools: Any, where: str) -> list[Any]:
    """Return the list of tools of a conversation, which some data sets hold as JSON, because tools have many types."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RecordError(f"{where}: 'tools' is a text, but not JSON ({error}); give a list of tools") from error
    return _without_none(tools) or []


def _message(message: Any, where: str) -> dict[str, Any]:
    """Return a message with its role as chat templates call it and its content as a text."""
    if not isinstance(message, Mapping):
        raise RecordError(f"{where} must be an object with role and content, got {type(message).__name__}")
    message = _without_none(message)
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if role not in _ROLES:
        raise RecordError(f"{where} is of an unknown role, {role!r}; known are {', '.join(_ROLES)}")
    text = text_of(content)
    content = "" if content == [] else content if text is None else text
    others = {name: value for name, value in message.items() if name not in ("role", "from", "content", "value")}
    calls = others.pop("tool_calls", None)
    if calls:
        others["tool_calls"] = read_calls(calls, where)
        content = "" if content is None else content
    if not isinstance(content, str):
        raise RecordError(f"{where}: its content must be a text, got {type(content).__name__}")
    return {"role": _ROLES[role], "content": content, **others}


def read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return calls of tools as chat templates read them: with arguments as an object, which the OpenAI API has as JSON.

    Args:
        calls: ``{"type": "function", "function": {"name": ..., "arguments": ...}}``, one or more.
        where: how errors refer to their message.

    Raises:
        RecordError: they are something else.
    """
    found = []
    for call in calls if isinstance(calls, list | tuple) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        try:
            read = json.loads(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
        except (ValueError, RecursionError):
            read = None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not isinstance(read, dict):
            raise RecordError(
                f"{where}: tool_calls must be a list of functions with a name, and arguments that are an object or its "
                f"JSON, got {call!r:.80}"
            )
        made = {**function, "arguments": read}
        found.append({**call, "function": made} if "function" in call else made)
    return found


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_none(one) for name, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list | tuple) else value
