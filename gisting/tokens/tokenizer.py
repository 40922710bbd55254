"""The gist tokenizer: a stock tokenizer with a gist token and a prompt template.

Place in the flow: **text -> tokens** -> visibility. The gist token is never put into the wrapped tokenizer. Its id is
one that the tokenizer does not have, so no text, not even the literal ``<GIST>`` in a user's message, can become a gist
token, here or in any other program that reads the saved tokenizer.
"""

# Over 600 lines because every public method says what its arguments are and what it raises.

from __future__ import annotations

import copy
import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gisting.errors import GistError, GistTokenError
from gisting.source import SOURCE_ARGUMENTS, find_file, local, missing
from gisting.tokens.chat import ChatTemplate, Message, check_messages, read_chat_template, resolve_template
from gisting.tokens.encoding import GistEncoding, cut_into_chunks, located
from gisting.tokens.special import SpecialTokens, Written
from gisting.tokens.template import Template
from gisting.tokens.text import text_fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["GistTokenizer", "read_tokenizer"]

_FILE = "gist.json"
_FORMAT = 1
# What reading a damaged file raises.
_DAMAGE = (AttributeError, LookupError, OSError, TypeError, ValueError)


class GistTokenizer:
    """A Hugging Face tokenizer with a gist token and a prompt template.

    Args:
        tokenizer: any tokenizer of transformers: fast or slow, BPE, SentencePiece, byte level. It is not changed.
        template: a name of ``TEMPLATES``, ``"chat"`` for the tokenizer's own chat template (prompt as system message),
            a :class:`Template`, or None: ``"chat"`` if the tokenizer has a chat template (a warning says so), else
            ``"alpaca"``; always ``"alpaca-t5"`` for an encoder-decoder, and ``"alpaca"`` for a tokenizer that has the
            gist token in its vocabulary.
        is_encoder_decoder: whether sequences are for a T5-like model.
        gist_token: how the gist token is written when it is shown.
        gist_token_id: its id, or None: the tokenizer's own id if its vocabulary has ``gist_token`` (checkpoints of the
            published code do), else the first free one.
        reads_special_tokens: whether special tokens that a prompt, an input or a message spells, such as ``</s>`` or
            ``<|im_start|>``, are read as these tokens, as stock transformers does. By default they are text, so that
            nobody can write a role or a turn into a conversation. Outputs may hold them, because they are what a model
            is to write. An attribute of the same name can be set later.

    Raises:
        GistError: the template is unknown or cannot be used, or the id belongs to another token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | Template | None = None,
        *,
        is_encoder_decoder: bool = False,
        gist_token: str = "<GIST>",
        gist_token_id: int | None = None,
        reads_special_tokens: bool = False,
    ) -> None:
        if isinstance(tokenizer, GistTokenizer):
            raise GistError("tokenizer is a GistTokenizer already; pass the tokenizer it wraps, .tokenizer")
        self.tokenizer = tokenizer
        self.is_encoder_decoder = is_encoder_decoder
        self.gist_token = gist_token
        self.reads_special_tokens = reads_special_tokens
        vocabulary = tokenizer.get_vocab()
        own = vocabulary.get(gist_token)
        first_free = max(len(tokenizer), max(vocabulary.values(), default=-1) + 1)
        if gist_token_id is None:
            gist_token_id = first_free if own is None else own
        elif gist_token_id != own and gist_token_id < first_free:
            raise GistError(
                f"gist_token_id {gist_token_id} is already a token of the tokenizer, which has {first_free} tokens: "
                "some were added after the gist token; use the tokenizer without them"
            )
        self.gist_token_id: int = gist_token_id
        self.has_own_gist_token = gist_token_id == own
        self._num_wrapped = len(tokenizer)
        # Represents the gist in a private copy of the tokenizer. Random, so that no text can spell it.
        self._sentinel = f"\ue0f8{secrets.token_hex(8)}\ue0f9"
        self.template: Template = resolve_template(
            template, tokenizer, is_encoder_decoder=is_encoder_decoder, has_own_gist_token=self.has_own_gist_token
        )

    # -- ids -----------------------------------------------------------------------------------------------------------

    @property
    def eos_token_id(self) -> int:
        """The id that ends a completion: the chat template's end of an answer, or else the tokenizer's own.

        Raises:
            GistError: the tokenizer has none.
        """
        if isinstance(self.template, ChatTemplate) and self.template.end:
            end: Any = self.tokenizer.convert_tokens_to_ids(self.template.end)
            return end
        eos: Any = self.tokenizer.eos_token_id
        if eos is None:
            raise GistError("the tokenizer has no eos_token; set tokenizer.eos_token to the token that ends an answer")
        return eos

    @property
    def pad_token_id(self) -> int:
        """The id that fills short rows: the tokenizer's own, or else the end of a completion. Masks hide it anyway."""
        pad: Any = self.tokenizer.pad_token_id
        return self.eos_token_id if pad is None else pad

    @property
    def start_ids(self) -> list[int]:
        """What the tokenizer puts before a text, such as ``<s>``, found by encoding one.

        Prompts begin with it unless the template spells it (``Template.add_special_tokens``).
        """
        return list(self._put_before)

    def __len__(self) -> int:
        """Return the number of ids including the gist token: the rows that a model's embedding needs at least."""
        return max(len(self.tokenizer), self.gist_token_id + 1)

    @property
    def model_input_names(self) -> list[str]:
        """What a model reads, in order; stock ``Trainer`` asks its ``processing_class``, which this class can be."""
        return ["input_ids", "attention_mask"]

    # -- encoding ------------------------------------------------------------------------------------------------------

    def encode_prompts(
        self, prompts: Sequence[str], num_gist_tokens: int | Sequence[int], chunk_length: int | None = None
    ) -> list[GistEncoding]:
        """Encode each prompt with its gist, as it is run to be compressed.

        Args:
            prompts: B texts, none empty.
            num_gist_tokens: k, one for all or one each.
            chunk_length: a prompt of more ids than this, including its template and start ids, is cut by
                :func:`cut_into_chunks`, and k gist tokens follow each chunk; None cuts none. Decoders only.

        Returns:
            B encodings that end with the (last) gist.

        Raises:
            GistError: a prompt is empty, the numbers of rows differ, or as :meth:`check_chunk_length`.
            GistTokenError: a k is less than 1.
        """
        _check_texts("prompts", prompts)
        self.check_chunk_length(chunk_length)
        counts = _check_counts(num_gist_tokens, len(prompts))
        for row, prompt in enumerate(prompts):
            if not prompt.strip():
                raise GistError(f"prompt {row} is empty; there is nothing to compress, give its text")
        texts = [self.template.prompt_text(self.as_text(prompt)) + self._sentinel for prompt in prompts]
        start = self.start_ids if self.template.add_special_tokens else []
        encodings = []
        for ids, count in zip(self.encode_texts(texts), counts, strict=True):
            whole: list[int] = []
            spans = []
            for chunk in cut_into_chunks([*start, *ids[:-1]], chunk_length):
                whole += chunk + [self.gist_token_id] * count
                spans.append((len(whole) - count, len(whole)))
            encodings.append(GistEncoding(whole, spans[0][0], len(whole), len(whole), tuple(spans)))
        return encodings

    def check_chunk_length(self, chunk_length: int | None) -> None:
        """Raise unless prompts for this tokenizer's model can be cut into chunks of this length.

        Args:
            chunk_length: the largest number of ids in a chunk, or None to cut nothing.

        Raises:
            GistError: it is not a whole number of at least 1; or the tokenizer is for an encoder-decoder, whose
                relative distances count columns: what follows a cached gist would see it at another distance than in
                training, where the chunks are in between.
        """
        if chunk_length is None:
            return
        if isinstance(chunk_length, bool) or not isinstance(chunk_length, int):
            raise GistError(f"chunk_length must be a whole number or None, got {chunk_length!r}")
        if chunk_length < 1:
            raise GistError(f"chunk_length must be at least 1, got {chunk_length}; give None for a single gist")
        if self.is_encoder_decoder:
            raise GistError(
                f"chunk_length is {chunk_length}, but prompts of an encoder-decoder cannot be cut into chunks: its "
                "relative distances count columns, so a cached gist would be at other distances than in training; "
                "pass None"
            )

    def as_text(self, content: Any) -> Any:
        """Return a content in which special tokens are written so that this tokenizer encodes them as text.

        The methods that take prompts, inputs and messages do this themselves; texts for :meth:`encode_texts` and
        outputs are read as they are.

        Args:
            content: a text, or messages.

        Returns:
            The same, if no special token is in it, or if ``reads_special_tokens`` is set. The private characters that
            stand for one mean something to this tokenizer alone.

        Raises:
            GistError: several parts of a message spell a special token together.
        """
        if self.reads_special_tokens or getattr(self.tokenizer, "split_special_tokens", False):
            return content
        return self._special.hide(content)

    def spells_special_tokens(self, text: str) -> bool:
        """Whether ``text`` spells special tokens that are encoded as text."""
        is_read = self.reads_special_tokens or getattr(self.tokenizer, "split_special_tokens", False)
        return not is_read and self._special.is_spelled(text)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts unchanged: without template, gist tokens, or what the tokenizer puts around a text.

        Args:
            texts: B texts.

        Returns:
            B lists of ids.

        Raises:
            GistError: something is not a text, a text contains a gist token that the tokenizer can only read as such,
                or tokens were added to the tokenizer since it was wrapped.
        """
        _check_texts("texts", texts)
        if len(self.tokenizer) != self._num_wrapped:
            raise GistError(
                f"the tokenizer had {self._num_wrapped} tokens when it was wrapped, now it has "
                f"{len(self.tokenizer)}; wrap it again: GistTokenizer(tokenizer)"
            )
        if len(texts) == 0:
            return []
        is_hidden = [self._special.is_in(text) for text in texts]
        plain = [text for text, hidden in zip(texts, is_hidden, strict=True) if not hidden]
        encoded: Any = self._joint(plain, add_special_tokens=False, verbose=False)["input_ids"] if plain else []
        rest = iter(encoded)
        found = [
            self._special.encode(text) if hidden else [*next(rest)]
            for text, hidden in zip(texts, is_hidden, strict=True)
        ]
        marker: Any = self._joint.convert_tokens_to_ids(self._sentinel)
        for row, ids in enumerate(found):
            if self.gist_token_id in ids and self.gist_token_id != marker:
                raise GistError(
                    f"text {row} contains {self.gist_token!r}, which this tokenizer can only read as the gist token; "
                    "remove it from the text"
                )
        return found

    def encode_continuations(self, inputs: Sequence[str | Sequence[Message]]) -> list[list[int]]:
        """Encode what follows the gist for each of ``inputs``, up to where the answer begins.

        Args:
            inputs: B inputs. Each is a text ("" uses ``Template.continuation_without_input``), or, with the template
                ``"chat"``, the messages that follow the prompt: ``{"role": "user", "content": text}``, answers of the
                assistant, and whatever else the chat template takes. The ids are those of the tokenizer's
                ``apply_chat_template``, with the gist in place of the system message.

        Returns:
            B lists of ids.

        Raises:
            GistError: an input is neither, messages contain a system message, or the chat template refuses them.
        """
        self._check_inputs(inputs)
        contents = [self.as_text(input) for input in cast("Sequence[str]", inputs)]
        return self._after_gist([self.template.continuation_text(content) for content in contents])

    def encode_next_turns(self, inputs: Sequence[str | Sequence[Message]]) -> list[list[int]]:
        """Encode what follows an earlier answer, up to where the next answer begins.

        With the template ``"chat"`` this begins with what ends the earlier answer, so the states before it must be
        those of the answer without its end. With other templates it is the same as after a gist, and the answer keeps
        its end.

        Args:
            inputs: B inputs, as for :meth:`encode_continuations`; messages are those after the answer.

        Returns:
            B lists of ids.

        Raises:
            GistError: as :meth:`encode_continuations`, or the chat template rewrites earlier answers.
        """
        template = self.template
        if not isinstance(template, ChatTemplate):
            return self.encode_continuations(inputs)
        self._check_inputs(inputs)
        return self._after_gist([template.next_turn_text(self.as_text(input)) for input in inputs])

    def apply_chat_template(
        self,
        conversation: Sequence[Message],
        *,
        num_gist_tokens: int = 1,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_tensors: str | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Lay out a conversation as the tokenizer's ``apply_chat_template`` does, with gist tokens as its prompt.

        This is what stock ``model.generate`` reads with a cache, of an unpatched model too::

            given = tokenizer.apply_chat_template(
                messages, num_gist_tokens=k, add_generation_prompt=True, return_tensors="pt"
            )
            model.generate(**given, past_key_values=cache.as_past_key_values())

        Args:
            conversation: the messages of one conversation. A system message at the beginning is left out, because the
                gist tokens stand for it.
            num_gist_tokens: k of the cache.
            add_generation_prompt: whether the text goes on to where the answer begins.
            tokenize: False for the text, in which gist tokens are written as ``gist_token``.
            return_tensors: None for lists of ids, ``"pt"`` for tensors ``(1, N)``.
            return_dict: False for the ids alone.
            **others: whatever else the stock method takes, which is refused.

        Returns:
            ``input_ids`` and ``attention_mask``, the ids alone, or the text.

        Raises:
            GistError: the template is not ``"chat"``, there is no message after the system message, several
                conversations are given, or an argument has no meaning with a compressed prompt.
            GistTokenError: k is less than 1.
        """
        (count,) = _check_counts(num_gist_tokens, 1)
        refused = sorted(name for name, value in others.items() if value not in (None, False))
        if refused:
            raise GistError(
                f"{', '.join(refused)} cannot be given with gist tokens, which stand for a prompt that is compressed "
                "already; leave out"
            )
        if return_tensors not in (None, "pt"):
            raise GistError(f"return_tensors must be 'pt' or None, got {return_tensors!r}")
        messages: Any = conversation
        if isinstance(messages, list | tuple) and messages and isinstance(messages[0], Mapping):
            messages = messages[messages[0].get("role") == "system" :]
        check_messages("conversation", messages, self.template)
        template = cast("ChatTemplate", self.template)
        text = template.after_prompt(self.as_text(messages), is_asking=add_generation_prompt)
        if not tokenize:
            return self.gist_token * count + self._special.show(text)
        ids: Any = [self.gist_token_id] * count + self._after_gist([text])[0]
        mask: Any = [1] * len(ids)
        if return_tensors == "pt":
            import torch

            ids, mask = torch.tensor([ids]), torch.tensor([mask])
        return {"input_ids": ids, "attention_mask": mask} if return_dict else ids

    def prompt_with_tools(self, prompt: str | None, tools: Sequence[Mapping[str, Any]]) -> str:
        """Return the prompt that stands for a system message and a list of tools.

        It is the text that the chat template writes of both, and a prompt like any other: it can be compressed, kept in
        a store, and be the instruction of a record. What follows its gist has the ids that it has in the tokenizer's
        ``apply_chat_template(messages, tools=tools)``::

            prompt = tokenizer.prompt_with_tools("Be brief.", [get_weather])
            cache = gisting.compress(model, tokenizer, [prompt])

        Args:
            prompt: the system message, or None for a conversation without one.
            tools: descriptions of functions: ``{"type": "function", "function": {"name": ..., ...}}``.

        Returns:
            The prompt, a ``str`` of a kind whose special tokens are read as such, because the template wrote them. A
            copy of the text in a file of records or prompts is an ordinary text again, in which they are text: keep
            the system message and the tools, and lay them out again.

        Raises:
            GistError: the template is not ``"chat"``, there are no tools, the system message or the tools spell a
                special token, or the chat template writes tools elsewhere than in the system message, or not at all.
        """
        if not isinstance(tools, list | tuple) or not tools or not all(isinstance(tool, Mapping) for tool in tools):
            raise GistError(
                f"tools must be a list of at least one description of a function, got {tools!r:.60}; give "
                '[{"type": "function", "function": {"name": ..., "parameters": ...}}]'
            )
        if not isinstance(self.template, ChatTemplate):
            raise GistError(
                f"tools are laid out by the template 'chat' only, and the tokenizer's template is "
                f"{self.template.name!r}; write them into the prompt as text"
            )
        if prompt is not None:
            _check_texts("prompts", [prompt])
        if not self.reads_special_tokens:
            written = json.dumps(tools, ensure_ascii=False, default=str)
            for name, text in (("the system message", prompt or ""), ("a tool", written)):
                if self._special.is_spelled(text):
                    raise GistError(f"{name} spells a special token, which would be read as one; remove it")
        return Written(self.template.prompt_with_tools(prompt, tools))

    def encode_bare(self, inputs: Sequence[str | Sequence[Message]]) -> list[list[int]]:
        """Encode each of ``inputs`` as if there were no prompt, up to where the answer begins.

        With the template ``"chat"`` this is the conversation without a system message as the chat template writes it,
        with the system message that some put in its place. With other templates it is what the tokenizer puts before a
        text, and the continuation.

        Args:
            inputs: B inputs, as for :meth:`encode_continuations`.

        Returns:
            B lists of ids.

        Raises:
            GistError: as :meth:`encode_continuations`.
        """
        template = self.template
        if not isinstance(template, ChatTemplate):
            return [self.start_ids + ids for ids in self.encode_continuations(inputs)]
        self._check_inputs(inputs)
        return self.encode_texts([template.bare_text(self.as_text(input)) for input in inputs])

    def without_end(self, answer: Sequence[int]) -> list[int]:
        """Return the ids of an answer without what a chat template writes to end it, as the next turn needs them.

        Args:
            answer: the ids of a finished answer, with the id that ended it.

        Returns:
            The ids before the end. With templates other than ``"chat"``, all ids.
        """
        ids = list(answer)
        if not isinstance(self.template, ChatTemplate):
            return ids
        ids = ids[:-1]
        before = self._after_gist([self.template.before_end])[0]
        return ids[: len(ids) - len(before)] if before and ids[-len(before) :] == before else ids

    def encode_completions(self, inputs: Sequence[str | Sequence[Message]], outputs: Sequence[str]) -> list[list[int]]:
        """Encode the answers, each with its end of sequence.

        For a decoder they are tokenised as part of the text, after their continuation. If a token would then cross the
        boundary, they are tokenised separately, because the continuation must have the ids that it has when the model
        answers. For an encoder-decoder they are separate texts.

        Args:
            inputs: B inputs, as for :meth:`encode_continuations`.
            outputs: B texts.

        Returns:
            B lists of ids, none empty.

        Raises:
            GistError: the numbers differ, or something is not a text.
        """
        return [completion for _, completion in self.encode_answers(inputs, outputs)]

    def encode_answers(
        self, inputs: Sequence[str | Sequence[Message]], outputs: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """Encode the continuation and the completion of each example.

        The result is that of :meth:`encode_continuations` and :meth:`encode_completions`, but the inputs are encoded
        only once.

        Args:
            inputs: B inputs, as for :meth:`encode_continuations`.
            outputs: B texts.

        Returns:
            B pairs of ids. They do not depend on the prompt or on k.

        Raises:
            GistError: as :meth:`encode_completions`.
        """
        continuations = self.encode_continuations(inputs)
        return list(zip(continuations, self._complete(inputs, outputs, continuations), strict=True))

    def encode(
        self,
        prompt: str,
        input: str | Sequence[Message] = "",
        output: str | None = None,
        *,
        num_gist_tokens: int = 1,
        chunk_length: int | None = None,
    ) -> GistEncoding:
        """Encode the whole sequence of one example.

        Args:
            prompt: the text to compress.
            input: the text that the prompt is applied to, or "", or messages as for :meth:`encode_continuations`.
            output: the answer, or None for a sequence that the model continues.
            num_gist_tokens: k.
            chunk_length: as for :meth:`encode_prompts`.

        Raises:
            GistError: the prompt is empty, or as :meth:`check_chunk_length`.
            GistTokenError: k is less than 1.
        """
        outputs = None if output is None else [output]
        return self.encode_batch(
            [prompt], [input], outputs, num_gist_tokens=num_gist_tokens, chunk_length=chunk_length
        )[0]

    def encode_batch(
        self,
        prompts: Sequence[str],
        inputs: Sequence[str | Sequence[Message]],
        outputs: Sequence[str] | None = None,
        *,
        num_gist_tokens: int | Sequence[int] = 1,
        chunk_length: int | None = None,
    ) -> list[GistEncoding]:
        """Encode B examples as :meth:`encode` does, in a few calls of the tokenizer.

        Args:
            prompts: B texts to compress.
            inputs: B inputs, as for :meth:`encode_continuations`; "" where there is no input.
            outputs: B answers, or None for sequences that the model continues.
            num_gist_tokens: k, one for all or one each.
            chunk_length: as for :meth:`encode_prompts`.

        Raises:
            GistError: the numbers differ, or as :meth:`encode`.
            GistTokenError: as :meth:`encode`.
        """
        if len(inputs) != len(prompts) or (outputs is not None and len(outputs) != len(prompts)):
            raise GistError(
                f"there must be as many inputs and outputs as prompts, {len(prompts)}, got {len(inputs)} and "
                f"{'none' if outputs is None else len(outputs)}"
            )
        heads = self.encode_prompts(prompts, num_gist_tokens, chunk_length)
        middles = self.encode_continuations(inputs)
        tails = [[] for _ in prompts] if outputs is None else self._complete(inputs, outputs, middles)
        return [
            replace(
                head, input_ids=head.input_ids + middle + tail, completion_start=head.completion_start + len(middle)
            )
            for head, middle, tail in zip(heads, middles, tails, strict=True)
        ]

    def locate(self, input_ids: Sequence[int], *, is_chunked: bool = False) -> GistEncoding:
        """Find the gist in ids from another source, such as another program or a data set of ids.

        Args:
            input_ids: prompt, gist and what follows, all of which counts as continuation.
            is_chunked: whether the prompt may be in chunks, each with its gist. Otherwise gist tokens that are apart
                are refused, because they are usually a mistake.

        Raises:
            GistTokenError: there is no gist token, gist tokens are apart, or chunks have different numbers of them.
        """
        return located([int(token) for token in input_ids], self.gist_token_id, is_chunked=is_chunked)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode ``ids`` to text.

        Gist tokens are shown as ``gist_token``; with ``skip_special_tokens`` they are left out like the other special
        tokens.
        """
        parts: list[list[int]] = [[]]
        for token in ids:
            if int(token) == self.gist_token_id:
                parts.append([])
            else:
                parts[-1].append(int(token))
        between = "" if skip_special_tokens else self.gist_token
        return between.join(
            str(self.tokenizer.decode(part, skip_special_tokens=skip_special_tokens)) if part else "" for part in parts
        )

    # -- files ---------------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the wrapped tokenizer, unchanged, and ``gist.json`` into ``directory``."""
        self.tokenizer.save_pretrained(str(directory))
        state = {
            "format": _FORMAT,
            "gist_token": self.gist_token,
            "gist_token_id": self.gist_token_id,
            "is_encoder_decoder": self.is_encoder_decoder,
            "template": self.template.to_dict(),
            **({"reads_special_tokens": True} if self.reads_special_tokens else {}),
        }
        (Path(directory) / _FILE).write_text(json.dumps(state, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **kwargs: Any) -> GistTokenizer:
        """Read what :meth:`save_pretrained` wrote.

        Args:
            name_or_path: a directory, or a repository on the Hugging Face hub.
            **kwargs: arguments for ``AutoTokenizer.from_pretrained``.

        Returns:
            The tokenizer, with the template and the gist token that it was saved with.

        Raises:
            GistError: there is no such directory or no ``gist.json``, it is of a later format, or one of the files is
                damaged.
        """
        source = {name: value for name, value in kwargs.items() if name in SOURCE_ARGUMENTS}
        fault = missing(name_or_path)
        if fault is not None:
            raise GistError(f"{name_or_path} is not a checkpoint: {fault}")
        found = find_file(name_or_path, _FILE, **source)
        if found is None:
            raise GistError(
                f"{name_or_path} has no {_FILE}, so it is not a saved GistTokenizer; wrap the tokenizer instead: "
                "GistTokenizer(AutoTokenizer.from_pretrained(...))"
            )
        try:
            state = json.loads(Path(found).read_text(encoding="utf-8"))
            made_as = state.get("format")
            if made_as == _FORMAT:
                fields = state["template"]
                is_chat = "source" in fields
                template = None if is_chat else Template(**fields)
                settings = {key: state[key] for key in ("is_encoder_decoder", "gist_token", "gist_token_id")}
                settings["reads_special_tokens"] = state.get("reads_special_tokens", False) is True
        except _DAMAGE as error:
            raise GistError(f"{found} is damaged ({_reason(error)}); download the checkpoint again") from error
        if made_as != _FORMAT:
            raise GistError(
                f"{found} has format {made_as}, this version reads {_FORMAT}; upgrade gisting: pip install "
                "-U gist-tokens"
            )
        wrapped = read_tokenizer(name_or_path, **kwargs)
        return cls(wrapped, template or read_chat_template(wrapped, fields["source"]), **settings)

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of a SHA-256 of vocabulary, tokenization rules, gist token and template."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            rules = json.loads(backend.to_str())
            # The last call of the tokenizer sets both; they do not change what a text means.
            rules.pop("padding", None)
            rules.pop("truncation", None)
        else:
            rules = [type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())]
        if getattr(self.tokenizer, "split_special_tokens", False):
            rules = [rules, "split_special_tokens"]
        state = [rules, self.gist_token_id, self.is_encoder_decoder, self.template.to_dict()]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:12]

    def __repr__(self) -> str:
        return (
            f"GistTokenizer({type(self.tokenizer).__name__}, template={self.template.name!r}, "
            f"gist_token={self.gist_token!r}, gist_token_id={self.gist_token_id})"
        )

    # -- private -------------------------------------------------------------------------------------------------------

    @cached_property
    def _joint(self) -> PreTrainedTokenizerBase:
        """A private copy in which the gist is an added token, so that each part is split as in the whole text."""
        from tokenizers import AddedToken

        joint = copy.deepcopy(self.tokenizer)
        if self.has_own_gist_token:
            _forget(joint, self.gist_token)
        # A tokenizer that reads special tokens in a text as text would do so with a special sentinel too.
        is_special = not getattr(joint, "split_special_tokens", False)
        if not is_special and getattr(joint, "backend_tokenizer", None) is None:
            raise GistError(
                f"split_special_tokens=True needs a fast tokenizer, {type(joint).__name__} is a slow one, which would "
                "split the gist token as well; load it with split_special_tokens=False"
            )
        sentinel: Any = AddedToken(self._sentinel, normalized=False, special=is_special)
        joint.add_tokens([sentinel], special_tokens=is_special)
        return joint

    @cached_property
    def _special(self) -> SpecialTokens:
        template = self.template
        layout = template.prompt + template.continuation + template.completion
        return SpecialTokens(self._joint, layout, self._sentinel)

    @cached_property
    def _put_before(self) -> tuple[int, ...]:
        ids: Any = self._joint(self._sentinel)["input_ids"]
        return tuple(ids[: ids.index(self._joint.convert_tokens_to_ids(self._sentinel))])

    def _after_gist(self, texts: list[str]) -> list[list[int]]:
        return [ids[1:] for ids in self.encode_texts([self._sentinel + text for text in texts])]

    def _check_inputs(self, inputs: Sequence[str | Sequence[Message]]) -> None:
        if isinstance(inputs, str):
            raise GistError("inputs must be a list of texts, got one text; put it in a list")
        for row, input in enumerate(inputs):
            if not isinstance(input, str):
                check_messages(f"inputs[{row}]", input, self.template)

    def _complete(
        self, inputs: Sequence[str | Sequence[Message]], outputs: Sequence[str], continuations: list[list[int]]
    ) -> list[list[int]]:
        _check_texts("outputs", outputs)
        if len(outputs) != len(inputs):
            raise GistError(f"there must be as many outputs as inputs, {len(inputs)}, got {len(outputs)}")
        if self.is_encoder_decoder:
            targets = self.encode_texts([self.template.completion_text(text) for text in outputs])
            return [self._ended(ids) for ids in targets]
        pairs = [
            self.template.answered(self.as_text(input), text)
            for input, text in zip(cast("Sequence[str]", inputs), outputs, strict=True)
        ]
        completions = []
        for ids, before, (asked, text) in zip(
            self._after_gist([text for _, text in pairs]), continuations, pairs, strict=True
        ):
            in_place = ids[: len(before)] == before
            completions.append(
                self._ended(ids[len(before) :] if in_place else self._after_gist([text[len(asked) :]])[0])
            )
        return completions

    def _ended(self, ids: list[int]) -> list[int]:
        """A completion with its end, which chat templates write themselves."""
        if isinstance(self.template, ChatTemplate) and self.template.end:
            return ids
        return [*ids, self.eos_token_id]


def read_tokenizer(name_or_path: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a stock tokenizer.

    Args:
        name_or_path: a directory, or a repository on the Hugging Face hub.
        **kwargs: arguments for ``AutoTokenizer.from_pretrained``.

    Returns:
        The tokenizer, without a gist token.

    Raises:
        GistError: its files are missing or damaged.
    """
    from transformers import AutoTokenizer

    fault = missing(name_or_path)
    if fault is not None:
        raise GistError(f"{name_or_path} has no tokenizer: {fault}")
    try:
        return AutoTokenizer.from_pretrained(local(name_or_path), **kwargs)
    except _DAMAGE as error:
        raise GistError(
            f"{name_or_path} has no readable tokenizer ({_reason(error)}); download its tokenizer files again"
        ) from error


def _reason(error: Exception) -> str:
    """The error's type and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_texts(name: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise GistError(f"{name} must be a list of texts, got one text; put it in a list")
    if not hasattr(texts, "__len__"):  # A generator would be empty after this check.
        raise GistError(f"{name} must be a list of texts, got {type(texts).__name__}; make a list of it")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            hint = "; of messages, give the text of the system message (with tools: prompt_with_tools)"
            raise GistError(
                f"{name}[{row}] must be a text, got {type(text).__name__}"
                f"{hint if name == 'prompts' and isinstance(text, list | tuple | Mapping) else ''}"
            )
        if (fault := text_fault(text)) is not None:
            raise GistError(f"{name}[{row}] {fault}")


def _check_counts(num_gist_tokens: int | Sequence[int], rows: int) -> list[int]:
    if isinstance(num_gist_tokens, str | Mapping) or not isinstance(num_gist_tokens, Integral | Iterable):
        raise GistError(f"num_gist_tokens must be a whole number or a list of them, got {num_gist_tokens!r}")
    counts: list[Any] = [num_gist_tokens] * rows if isinstance(num_gist_tokens, Integral) else list(num_gist_tokens)
    if len(counts) != rows:
        raise GistError(f"num_gist_tokens must be one number or one for each of {rows} prompts, got {len(counts)}")
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, Integral):
            raise GistError(f"num_gist_tokens must be a whole number, got {count!r}")
        if count < 1:
            raise GistTokenError(f"num_gist_tokens must be at least 1, got {count}; 1 to 10 is usual")
    return [int(count) for count in counts]


def _forget(tokenizer: Any, token: str) -> None:
    """Remove an added token from a fast tokenizer, so that its literal is text.

    A slow one cannot do this, so such texts are refused.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules["added_tokens"] = [added for added in rules["added_tokens"] if added["content"] != token]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(rules))
