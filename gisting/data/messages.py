"""Conversations as records: the system message is what is gisted, the question its input, the answer its output.

Place in the flow: sources -> **messages** -> records. Reads the layouts in which data sets of conversations come. Does
not render a conversation; the tokenizer's template does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gisting.errors import RecordError

__all__ = ["as_instruction"]

# What data sets call the speakers.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
_LAYOUTS = ("messages", "conversations", "completion")


def as_instruction(item: Mapping[str, Any], where: str, *, needs_instruction: bool = True) -> Mapping[str, Any]:
    """Give a conversation the keys ``instruction``, ``input`` and ``output``.

    ============================================================= ===========================
    ``{"messages": [{"role": ..., "content": ...}, ...]}``        OpenAI, TRL
    ``{"conversations": [{"from": ..., "value": ...}, ...]}``     ShareGPT
    ``{"prompt": ..., "completion": ...}``                        TRL, texts or lists of messages
    ============================================================= ===========================

    Args:
        item: a conversation; an item that has ``output``, or is not a conversation, is returned unchanged.
        where: how errors refer to it.
        needs_instruction: whether there must be a system message. Without, a prompt that is a text is the input.

    Raises:
        RecordError: a message is not of one of these layouts, there is no system message, tools, or more than one
            question and its answer.
    """
    layout = next((name for name in _LAYOUTS if name in item), None)
    if layout is None or "output" in item:
        return item
    rest = {name: value for name, value in item.items() if name not in (*_LAYOUTS, "prompt", "tools")}
    if item.get("tools"):
        raise RecordError(f"{where} has tools, which are not trained on yet; write them into the system message")
    if layout != "completion":
        messages = item[layout]
    else:
        prompt, completion = item.get("prompt"), item["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return {**rest, "instruction" if needs_instruction else "input": prompt, "output": completion}
        messages = [*prompt, *completion] if isinstance(prompt, list) and isinstance(completion, list) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RecordError(
            f"{where}: {layout!r} must be a list of messages with role and content (or, with 'prompt', a text as that "
            "is)"
        )
    turns = [_turn(message, f"{where}, message {number}") for number, message in enumerate(messages)]
    found = {} if not turns or turns[0][0] != "system" else {"instruction": turns.pop(0)[1]}
    if needs_instruction and not found:
        raise RecordError(f"{where} has no system message, which is what is gisted; give it one as its first message")
    roles = [role for role, _ in turns]
    if roles not in (["user", "assistant"], ["assistant"]):
        raise RecordError(
            f"{where} must be a system message, a question and its answer, got {', '.join(roles) or 'none'} after the "
            "system message; conversations of several turns are not trained on yet: leave out the others"
        )
    return {**rest, **found, "input": turns[0][1] if len(turns) > 1 else "", "output": turns[-1][1]}


def _turn(message: Any, where: str) -> tuple[str, str]:
    """Return who speaks and what."""
    if not isinstance(message, Mapping):
        raise RecordError(f"{where} must be an object with role and content, got {type(message).__name__}")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if message.get("tool_calls") or role not in _ROLES:
        raise RecordError(
            f"{where} is a call or an answer of a tool, or of an unknown role ({role!r}); known are {', '.join(_ROLES)}"
        )
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RecordError(f"{where}: its content must be a text, got {type(content).__name__}")
    return _ROLES[role], content
