"""A tokenizer's chat template as the layout of prompt, gist, input and output.

Place in the flow: **text** -> tokens. Conversations are rendered by the chat template itself, so whatever it does to
messages (trimming, JSON, leaving out earlier thoughts, tools) is followed; what is left of this module is to find where
the prompt ends, where an answer ends, and what of it stays true in a later turn. All of it is found by rendering a few
conversations when the template is read.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from gisting.errors import GistError
from gisting.tokens.template import TEMPLATES, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatTemplate", "Message", "check_messages", "read_chat_template", "resolve_template"]

#: A message of a conversation: ``{"role": "user", "content": text}``, and whatever else the chat template reads.
Message = Mapping[str, Any]

_log = logging.getLogger(__name__)

# Stand for messages while a template is read. Of private characters, without spaces at the ends.
_PROMPT, _ASKED, _SAID, _ASKED_NEXT, _SAID_NEXT, _ASKED_LAST = (f"\ue0f0{number}\ue0f1" for number in range(6))

# Conversations in which a template could write tools elsewhere than in the system message.
_CALL = {"type": "function", "id": "callabcde", "function": {"name": _SAID, "arguments": {_ASKED: 1}}}
_PROBES: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": _ASKED},),
    tuple(
        {"role": role, "content": text}
        for role, text in (("user", _ASKED), ("assistant", _SAID), ("user", _ASKED_NEXT))
    ),
    (
        {"role": "user", "content": _ASKED},
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "name": _SAID, "tool_call_id": "callabcde", "content": _SAID_NEXT},
    ),
)

# A template that writes today's date is read with this one, which Llama's templates write where there is no clock.
_DAY = "26 Jul 2024"
_CLOCK = "{%%- macro strftime_now(format) -%%}%s{%%- endmacro %%}\n"


@dataclass(frozen=True)
class ChatTemplate(Template):
    """The layout of a tokenizer's chat template. Made by :func:`read_chat_template`.

    The fields of :class:`Template` show the layout of the first turn; texts are rendered by the chat template.

    Args:
        name: ``"chat"``.
        prompt: as in :class:`Template`.
        continuation: as in :class:`Template`.
        continuation_without_input: as in :class:`Template`.
        completion: as in :class:`Template`; it ends with ``end``.
        add_special_tokens: False, because chat templates spell the start.
        source: the chat template, in Jinja.
        role: what the prompt is: ``"system"`` for a system message; ``"user"`` for the beginning of the first user
            message, where the template has no system message, or moves it from turn to turn.
        before_end: what the template writes between an answer and ``end``, such as a space.
        end: the special token that ends an answer; "" if the template writes none, so that the tokenizer's own end of
            sequence ends it.
        after_end: what the template writes after ``end`` if nothing follows.
        keeps_answers: whether an earlier answer is written as it was when it was given, so that its states can be kept.
        tokenizer: what renders ``source``.
    """

    source: str = ""
    role: str = "system"
    before_end: str = ""
    end: str = ""
    after_end: str = ""
    keeps_answers: bool = True
    tokenizer: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Do not count placeholders: the fields are for show."""

    # -- texts ---------------------------------------------------------------------------------------------------------

    def prompt_text(self, prompt: str) -> str:
        """Return the text before the gist for ``prompt``.

        Raises:
            GistError: the chat template writes something else after the prompt because of what the prompt says.
        """
        asked = [{"role": "user", "content": _ASKED}]
        whole = self._render(self._with_prompt(prompt, asked), is_asking=True)
        after = self.after_prompt(asked)
        if not whole.endswith(after):
            raise GistError(
                f"prompt {_excerpt(prompt)} changes what the chat template writes after it; use another prompt, or a "
                "Template"
            )
        return whole[: len(whole) - len(after)]

    def continuation_text(self, input: str | Sequence[Message]) -> str:
        """Return the text after the gist, up to where the answer begins.

        Args:
            input: what the user says, or the messages after the prompt.
        """
        return self.after_prompt(_messages(input))

    def completion_text(self, output: str) -> str:
        """Return the text of the answer ``output``, with its end, after a message of the user."""
        before, whole = self.answered(_ASKED, output)
        return whole[len(before) :]

    def answered(self, input: str | Sequence[Message], output: str) -> tuple[str, str]:
        """Return the continuation of ``input`` as :meth:`continuation_text` does, and the same with the answer."""
        asked = _messages(input)
        before = self.after_prompt(asked)
        whole = self.after_prompt([*asked, {"role": "assistant", "content": output}], is_asking=False)
        if not whole.startswith(before) or not whole.endswith(self.end + self.after_end):
            raise GistError(
                f"the chat template writes the answer {_excerpt(output)} in another way than answers of plain text; "
                "leave it out, or use a Template"
            )
        return before, whole[: len(whole) - len(self.after_end)]

    def written_answer(self, input: str | Sequence[Message], message: Message) -> str:
        """Return what a model writes that answers ``input`` with ``message``, without its end.

        A call of a tool, or the thoughts before an answer, become the text that stands for them.

        Args:
            input: what the user says, or the messages after the prompt.
            message: the answer, a message of the assistant.

        Raises:
            GistError: the chat template writes the message in another way than any answer of text.
        """
        asked = _messages(input)
        whole = self.after_prompt([*asked, message], is_asking=False)
        before, answer = self.after_prompt(asked), whole.removesuffix(self.after_end)
        lead, _, tail = self.completion.partition("{output}")
        text = answer[len(before) :].removeprefix(lead).removesuffix(tail)
        if not answer.startswith(before) or self.answered(asked, text) != (before, answer):
            what = "a call of a tool" if message.get("tool_calls") else f"the answer {_excerpt(message['content'])}"
            raise GistError(
                f"the chat template writes {what} in another way than answers of plain text; leave it out, or use a "
                "Template"
            )
        return text

    def prompt_with_tools(self, prompt: str | None, tools: Sequence[Mapping[str, Any]]) -> str:
        """Return the prompt that stands for a system message and a list of tools, as the chat template writes them.

        Given as a prompt, it has the ids that ``apply_chat_template(messages, tools=tools)`` has before the end of the
        system message. What follows is the same as without tools.

        Args:
            prompt: the system message, or None if the conversation has none.
            tools: descriptions of functions, as ``apply_chat_template`` takes them.

        Raises:
            GistError: the chat template writes no tools, or writes them elsewhere than in the system message.
        """
        start: list[Message] = [] if prompt is None else [{"role": "system", "content": prompt}]
        if self.role == "system":
            asked = [*start, *_PROBES[0]]
            if self._render(asked, is_asking=True, tools=tools) == self._render(asked, is_asking=True):
                raise GistError(
                    "the chat template writes no tools; choose one that does (tokenizer.chat_template = ...), or write "
                    "them into the prompt as text"
                )
            head = self.prompt.partition("{prompt}")[0]
            found = {self._head_with_tools(start, tools, messages) for messages in _PROBES}
            whole = found.pop()
            if not found and whole.startswith(head) and self.prompt_text(text := whole[len(head) :]) == whole:
                return text
        raise GistError(
            "the chat template does not write tools into the system message alone, so they cannot be compressed with "
            "it; write them into the prompt as text"
        )

    def _head_with_tools(
        self, start: Sequence[Message], tools: Sequence[Mapping[str, Any]], messages: Sequence[Message]
    ) -> str:
        """Return what comes before the end of the system message, or "" if what follows depends on the tools."""
        try:
            after = self.after_prompt(messages)
        except GistError:  # This template has no calls of tools, so their conversations are refused anyway.
            after = self.after_prompt(messages := messages[:1])
        whole = self._render([*start, *messages], is_asking=True, tools=tools)
        return whole.removesuffix(after) if whole.endswith(after) else ""

    def bare_text(self, input: str | Sequence[Message]) -> str:
        """Return the conversation without the prompt, as the chat template writes it, up to where the answer begins."""
        return self._render(_messages(input), is_asking=True)

    def next_turn_text(self, input: str | Sequence[Message]) -> str:
        """Return what follows an earlier answer, from before its end on, up to where the next answer begins.

        Args:
            input: what the user says, or the messages after the answer.

        Raises:
            GistError: the chat template rewrites earlier answers.
        """
        if not self.keeps_answers:
            raise GistError(
                "this chat template writes an earlier answer differently from how it was given (without its thoughts, "
                "for example), so the states of an answer cannot be kept; start from the gist in every turn, with the "
                "messages so far as the input: generate(model, tokenizer, [messages], cache=cache)"
            )
        said = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}]
        return self.after_prompt([*said, *_messages(input)]).partition(_SAID)[2]

    def after_prompt(self, messages: Sequence[Message], *, is_asking: bool = True) -> str:
        """Return what the chat template writes after the prompt.

        Args:
            messages: the messages that follow the prompt.
            is_asking: whether the text goes on to where the next answer begins.

        Raises:
            GistError: the chat template refuses these messages, or does not write the prompt once, at the beginning.
        """
        before, found, after = self._render(self._with_prompt(_PROMPT, messages), is_asking=is_asking).partition(
            _PROMPT
        )
        for called in (call for message in messages for call in message.get("tool_calls") or ()):
            name = called.get("function", called).get("name")
            if isinstance(name, str) and name not in after:
                raise GistError(
                    f"the chat template does not write the call of {_excerpt(name)}, so the model would not see it; "
                    "use a chat template with tools, or leave the call out"
                )
        if not found or _PROMPT in after:
            raise GistError("the chat template does not write the prompt of this conversation once; use a Template")
        if self.prompt and before != self.prompt.partition("{prompt}")[0]:
            raise GistError(
                "the chat template writes something else before the prompt of this conversation than before that of a "
                "single turn, so a compressed prompt does not fit; use a Template"
            )
        return after

    def _render(
        self, messages: Sequence[Message], *, is_asking: bool, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """Return the text of whole conversations, as the tokenizer's ``apply_chat_template`` does.

        Args:
            messages: all messages, beginning with the prompt if there is one.
            is_asking: whether the text goes on to where the next answer begins.
            tools: descriptions of functions, if the conversation has any.

        Raises:
            GistError: the chat template refuses them.
        """
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=is_asking,
            )
        except (TemplateError, LookupError, TypeError, ValueError, AttributeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise GistError(
                f"the chat template refuses a conversation of {roles}: {' '.join(str(error).split()):.300}"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, as files hold them: all but the tokenizer, which has files of its own."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "tokenizer"}

    def _with_prompt(self, prompt: str, messages: Sequence[Message]) -> list[Message]:
        if self.role == "system":
            return [{"role": "system", "content": prompt}, *messages]
        first = messages[0] if messages else {}
        content = first.get("content")
        if first.get("role") != "user" or not isinstance(content, str):
            raise GistError(
                "messages must begin with a text of the user, because the prompt is the beginning of it in this chat "
                f"template; got {first.get('role')!r:.40}"
            )
        return [{**first, "content": f"{prompt.rstrip()}\n\n{content}"}, *messages[1:]]


def read_chat_template(tokenizer: PreTrainedTokenizerBase, source: str | None = None) -> ChatTemplate:
    """Find out how the tokenizer's chat template lays out prompt, input and output.

    The prompt is the system message. If the template has none, or does not leave it at the beginning, the prompt is the
    beginning of the first user message.

    Args:
        tokenizer: any tokenizer.
        source: a chat template in Jinja, or None for the tokenizer's own.

    Raises:
        GistError: there is no chat template, or conversations in it cannot be continued from a gist.
    """
    if source is None:
        source = _own_source(tokenizer)
    if "strftime_now" in source and not source.startswith(_CLOCK % _DAY):
        source = _with_fixed_day(tokenizer, source)
    refusals = []
    for role in ("system", "user"):
        try:
            return _probe(tokenizer, source, role)
        except GistError as error:
            refusals.append(str(error))
    # A template without system messages says so first, which is no news.
    raise GistError(
        "the tokenizer's chat template cannot be followed: with the prompt as the system message, "
        f"{refusals[0]}; as the beginning of the user's message, {refusals[1]}; use another template: one of the "
        "library, or a Template"
    )


def resolve_template(
    template: str | Template | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    is_encoder_decoder: bool,
    has_own_gist_token: bool = False,
) -> Template:
    """Return the template that a caller asked for.

    Args:
        template: a name of ``TEMPLATES``, ``"chat"``, a template, or None for the default, as :class:`GistTokenizer`
            describes it.
        tokenizer: the tokenizer whose chat template ``"chat"`` means.
        is_encoder_decoder: whether the default is that of T5-like models.
        has_own_gist_token: whether the tokenizer has the gist token in its vocabulary.

    Raises:
        GistError: the name is unknown, or the chat template cannot be used.
    """
    if template is None:
        template = "alpaca-t5" if is_encoder_decoder else "alpaca"
        if tokenizer.chat_template and not is_encoder_decoder and not has_own_gist_token:
            template = "chat"
            _log.warning(
                "no template is given: taking the tokenizer's own chat template, as with template='chat'; earlier "
                "versions took 'alpaca', which can still be given"
            )
    if isinstance(template, Template):
        return template
    if template in TEMPLATES:
        return TEMPLATES[template]
    if template != "chat":
        raise GistError(f"template must be one of {', '.join([*TEMPLATES, 'chat'])} or a Template, got {template!r}")
    if not tokenizer.chat_template:
        raise GistError(
            f"template='chat' needs a tokenizer with a chat template, {type(tokenizer).__name__} has none; use one "
            f"of {', '.join(TEMPLATES)} or a Template"
        )
    return read_chat_template(tokenizer)


def check_messages(name: str, messages: Any, template: Template) -> None:
    """Raise unless ``messages`` are what follows a prompt in a conversation.

    Args:
        name: what an error calls them.
        messages: a list of messages.
        template: the template that lays them out.

    Raises:
        GistError: they are something else, the template is none of a chat, or a system message is among them.
    """
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        hint = "; put the messages of one conversation in a list" if isinstance(messages, Mapping) else ""
        raise GistError(f"{name} must be a text, or a list of messages, got {type(messages).__name__}{hint}")
    if not isinstance(template, ChatTemplate):
        raise GistError(
            f"{name} is a list of messages, which only the template 'chat' lays out, and the tokenizer's template "
            f"is {template.name!r}; give a text, or a checkpoint that was trained with 'chat'"
        )
    if not messages:
        raise GistError(f"{name} has no messages; give at least one of the user")
    for place, message in enumerate(messages):
        if message.get("role") in ("system", "developer"):
            raise GistError(
                f"{name}[{place}] is a {message['role']} message, which the gist replaces; leave it out, or compress it"
            )


def _own_source(tokenizer: PreTrainedTokenizerBase) -> str:
    own: Any = tokenizer.chat_template
    if isinstance(own, Mapping):
        if "default" not in own:
            raise GistError(
                f"the tokenizer has several chat templates ({', '.join(sorted(own))}), none of which is named "
                "'default'; choose one: tokenizer.chat_template = tokenizer.chat_template[NAME]"
            )
        own = own["default"]
    return own


def _with_fixed_day(tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """The template with one day for all. Otherwise a cache would be of another template on the next day."""
    fixed = _CLOCK % _DAY + source
    first, second = (_first_turn(tokenizer, _CLOCK % day + source) for day in ("\ue0f21\ue0f3", "\ue0f22\ue0f3"))
    if first is not None and second is not None and first != second:
        (before, after), (_, after_too) = first, second
        if after != after_too:
            raise GistError(
                "the tokenizer's chat template writes today's date after the prompt, so a model would be trained on "
                "dates that no later request has; set tokenizer.chat_template to one without the date"
            )
        if before:
            _log.warning(
                "the chat template writes today's date before the prompt; every prompt is compressed with %s instead, "
                "so that caches stay valid",
                _DAY,
            )
    return fixed


def _first_turn(tokenizer: PreTrainedTokenizerBase, source: str) -> tuple[str, str] | None:
    layout = _empty(tokenizer, source, "system")
    try:
        text = layout._render(layout._with_prompt(_PROMPT, [{"role": "user", "content": _ASKED}]), is_asking=True)
    except GistError:
        return None
    before, _, after = text.partition(_PROMPT)
    return before, after


def _empty(tokenizer: PreTrainedTokenizerBase, source: str, role: str) -> ChatTemplate:
    return ChatTemplate("chat", "", "", "", "", add_special_tokens=False, source=source, role=role, tokenizer=tokenizer)


def _probe(tokenizer: PreTrainedTokenizerBase, source: str, role: str) -> ChatTemplate:
    """Render conversations of one, two and three turns, and find the layout in them.

    Raises:
        GistError: they cannot be continued from a gist; the message completes a sentence.
    """
    layout = _empty(tokenizer, source, role)
    said = (_ASKED, _SAID, _ASKED_NEXT, _SAID_NEXT, _ASKED_LAST)
    turns = [
        {"role": speaker, "content": text}
        for speaker, text in zip(itertools.cycle(("user", "assistant")), said, strict=False)
    ]

    def render(number: int) -> tuple[str, str]:
        text = layout._render(layout._with_prompt(_PROMPT, turns[:number]), is_asking=number % 2 == 1)
        marks = [_PROMPT, *said[:number]]
        places = [text.find(mark) for mark in marks]
        if places != sorted(places) or any(text.count(mark) != 1 for mark in marks):
            raise GistError("it does not write every message once, unchanged and in order")
        before, _, after = text.partition(_PROMPT)
        return before, after

    (before, asking), (_, answered) = render(1), render(2)
    if not answered.startswith(asking):
        raise GistError("it begins an answer in another way than it asks for one")
    tail = answered.partition(_SAID)[2]
    before_end, end, after_end = _end_of(tokenizer, tail)
    heads, texts = zip(render(3), render(5), strict=True)
    if any(head != before for head in heads):
        raise GistError("it moves the prompt when the conversation goes on")
    two, three = texts
    follows = two.partition(_SAID)[2]
    if not follows.startswith(before_end + end):
        raise GistError("it ends an earlier answer in another way than the last")
    lead = answered.partition(_SAID)[0]
    last = follows.replace(_ASKED_NEXT, _ASKED_LAST)
    return ChatTemplate(
        name="chat",
        prompt=before + "{prompt}",
        continuation=asking.replace(_ASKED, "{input}"),
        continuation_without_input=asking.replace(_ASKED, ""),
        completion=lead.removeprefix(asking) + "{output}" + before_end + end,
        add_special_tokens=False,
        source=source,
        role=role,
        before_end=before_end,
        end=end,
        after_end=after_end,
        keeps_answers=two == lead + _SAID + follows and three == two + lead.removeprefix(asking) + _SAID_NEXT + last,
        tokenizer=tokenizer,
    )


def _end_of(tokenizer: PreTrainedTokenizerBase, tail: str) -> tuple[str, str, str]:
    """What follows an answer: before its end, the special token that ends it ("" if there is none), and after it."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    places = {tail.find(token): token for token in sorted(added | set(tokenizer.all_special_tokens), key=len)}
    places.pop(-1, None)
    if not places:
        return "", "", tail
    place = min(places)
    return tail[:place], places[place], tail[place + len(places[place]) :]


def _messages(input: str | Sequence[Message]) -> list[Message]:
    return [{"role": "user", "content": input}] if isinstance(input, str) else list(input)


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
