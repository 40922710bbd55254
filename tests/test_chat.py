"""Chat templates of many families: the ids are those of ``apply_chat_template``, at every turn, or they are refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from typing import Any

import pytest
import torch
import transformers

import gisting
from gisting.data.collate import GistCollator
from gisting.data.plain import plain_sources
from gisting.data.records import Record
from gisting.errors import CacheMismatchError, GistError
from gisting.eval.conditions import evaluate
from gisting.generation import answers, converse
from gisting.models.patch import patch
from gisting.pipeline import GistTextGenerationPipeline
from gisting.serving.requests import chat_ids
from gisting.tokens import ChatTemplate, GistTokenizer, Template
from tests import tiny
from tests.chats import CHATS, Chat

CONTENTS = [
    " x\n",
    '"',
    "</think>",
    "",
    "\N{WAVING HAND SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4}",
    "שלום עולם",
    "<|im_start|>",
]
CONTENTS += ["{prompt}{input}", "a\r\n\r\nb", "'{{ 7 * 6 }}"]
IDS = ["space", "quote", "think", "empty", "emoji", "rtl", "marker", "placeholder", "lines", "jinja"]
NAMES = list(CHATS)
Messages = list[dict[str, Any]]


@functools.cache
def wrapped(name: str) -> GistTokenizer:
    return GistTokenizer(CHATS[name].tokenizer(), "chat")


def turns(*texts: str) -> Messages:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def with_prompt(chat: Chat, prompt: str, messages: Messages) -> Messages:
    """The whole conversation, as one who has no gist would send it."""
    if chat.role == "system":
        return [{"role": "system", "content": prompt}, *messages]
    return [{**messages[0], "content": f"{prompt.rstrip()}\n\n{messages[0]['content']}"}, *messages[1:]]


def stock(name: str, messages: Messages, *, asks: bool = True) -> list[int]:
    """The ids of stock transformers. The day is the one that Llama's template writes where there is no clock."""
    tokenizer: Any = wrapped(name).tokenizer
    source = CHATS[name].source.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    source = source.replace("strftime_now('%B %d, %Y')", "'26 Jul 2024'")
    text = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=asks)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompt_ids(tokenizer: GistTokenizer, prompt: str) -> list[int]:
    return tokenizer.encode_prompts([prompt], 1)[0].chunks[0]


# -- ids ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", CONTENTS, ids=IDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_ids_of_every_turn_are_the_templates(name: str, content: str) -> None:
    """One, two and three turns, with the content as what each of them says, and as the prompt."""
    tokenizer, chat = wrapped(name), CHATS[name]
    for texts in (
        [content],
        ["Hi.", "Hello!", content],
        ["Hi.", content, "And?"],
        [content, content, content],
        ["a", "b", "c", content, "e"],
    ):
        messages = turns(*texts)
        for prompt in ("Be brief.", content) if content.strip() else ("Be brief.",):
            whole = prompt_ids(tokenizer, prompt) + tokenizer.encode_continuations([messages])[0]
            assert whole == stock(name, with_prompt(chat, prompt, messages)), (prompt, texts)
    assert tokenizer.encode_continuations([content]) == tokenizer.encode_continuations([turns(content)])


@pytest.mark.parametrize("content", CONTENTS, ids=IDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_taught_answer_is_the_templates(name: str, content: str) -> None:
    """Up to and with the token that ends it, which is the id that ends a completion everywhere."""
    tokenizer, chat = wrapped(name), CHATS[name]
    for input in (content, turns("Hi.", "Hello!", content)):
        (before, taught), (whole,) = (
            tokenizer.encode_answers([input], [content])[0],
            [stock(name, with_prompt(chat, "p", [*_messages(input), *turns("", content)[1:]]), asks=False)],
        )
        assert taught[-1] == tokenizer.eos_token_id
        assert taught.count(tokenizer.eos_token_id) == 1
        found = prompt_ids(tokenizer, "p") + before + taught
        number = len(found) - (not chat.end)
        assert found[:number] == whole[:number]
        template: Any = tokenizer.template
        assert tokenizer.decode(whole[number:], skip_special_tokens=False) == template.after_end


def _messages(input: str | Messages) -> Messages:
    return turns(input) if isinstance(input, str) else input


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_from_a_template(name: str) -> None:
    tokenizer, chat = wrapped(name), CHATS[name]
    template = tokenizer.template
    assert isinstance(template, ChatTemplate)
    assert (template.end, template.role, template.keeps_answers) == (chat.end, chat.role, chat.keeps_answers)
    assert tokenizer.eos_token_id == tokenizer.tokenizer.convert_tokens_to_ids(chat.end or chat.eos)


@pytest.mark.parametrize("name", NAMES)
def test_the_next_turn_goes_on_after_the_answer(name: str) -> None:
    """What a conversation holds before an answer's end, and what the next turn begins with, are one text."""
    tokenizer, chat = wrapped(name), CHATS[name]
    if not chat.keeps_answers:
        with pytest.raises(GistError, match=r"^this chat template writes an earlier answer differently"):
            tokenizer.encode_next_turns(["And?"])
        return
    held = prompt_ids(tokenizer, "p")
    texts = []
    for place, (asked, said) in enumerate([("Hi.", "Hello!"), ("And?", "That is all."), ("Bye.", "Bye!")]):
        texts += [asked]
        continuation = (tokenizer.encode_next_turns if place else tokenizer.encode_continuations)([asked])[0]
        assert held + continuation == stock(name, with_prompt(chat, "p", turns(*texts)))
        taught = tokenizer.encode_completions([asked], [said])[0]
        held += continuation + tokenizer.without_end(taught)
        texts += [said]


@pytest.mark.parametrize("name", NAMES)
def test_a_bare_query_is_what_a_server_is_sent(name: str) -> None:
    """Without a prompt: the conversation without a system message, with what the template puts in its place."""
    tokenizer = wrapped(name)
    wanted = stock(name, turns("Hi."))
    assert tokenizer.encode_bare(["Hi."]) == [wanted]
    assert plain_sources(tokenizer, ["", "p", ""], ["Hi.", "Hi.", "Yo."]) == [
        wanted,
        stock(name, with_prompt(CHATS[name], "p", turns("Hi."))),
        stock(name, turns("Yo.")),
    ]
    batch = GistCollator(tokenizer, conditions="negative")([Record("p", "Hi.", "Yo!")])
    gist = batch["input_ids"][0].tolist().index(tokenizer.gist_token_id)
    assert batch["input_ids"][0].tolist()[gist + 1 :][: len(wanted)] == wanted


def test_tools_in_a_conversation() -> None:
    """Calls of tools and what they returned are written as the template writes them."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
    messages = [
        *turns("1 + ü?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '"3"'},
        {"role": "tool", "content": " 4\n"},
        {"role": "assistant", "content": "7"},
        *turns("And?"),
    ]
    tokenizer = wrapped("qwen2.5")
    whole = prompt_ids(tokenizer, "p") + tokenizer.encode_continuations([messages])[0]
    assert whole == stock("qwen2.5", with_prompt(CHATS["qwen2.5"], "p", messages))


@pytest.mark.parametrize("name", ["gemma-2", "llama-2", "qwen3"])
def test_a_server_reads_chats_in_the_same_way(name: str) -> None:
    tokenizer = wrapped(name)
    messages = turns("Hi.", "Hello!", " And?\n")
    assert chat_ids(tokenizer, messages) == tokenizer.encode_continuations([messages])[0]


def test_a_chat_template_is_saved(tmp_path: Any) -> None:
    for name in NAMES:
        wrapped(name).save_pretrained(tmp_path / name)
        loaded = GistTokenizer.from_pretrained(tmp_path / name)
        assert loaded.template == wrapped(name).template
        assert loaded.fingerprint == wrapped(name).fingerprint
        assert loaded.encode("p", "x", "y") == wrapped(name).encode("p", "x", "y")
    assert len({wrapped(name).fingerprint for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", ["smollm2", "llama-3.2", "gemma-2"])
def test_a_saved_chat_template_is_the_tokenizers_own(name: str, tmp_path: Any) -> None:
    """So a checkpoint that is loaded with the template named is the same one, on another day too."""
    wrapped(name).save_pretrained(tmp_path)
    again = GistTokenizer(transformers.AutoTokenizer.from_pretrained(tmp_path), "chat")
    assert again.fingerprint == wrapped(name).fingerprint


def test_a_chat_of_earlier_versions_is_read_as_it_was_trained(tmp_path: Any) -> None:
    """They saved fixed texts, and ended an answer with the tokenizer's end of sequence."""
    tokenizer = wrapped("chatml")
    tokenizer.save_pretrained(tmp_path)
    state = json.loads((tmp_path / "gist.json").read_text("utf-8"))
    fields = [field.name for field in dataclasses.fields(Template)]
    state["template"] = {name: state["template"][name] for name in fields} | {"completion": "{output}"}
    (tmp_path / "gist.json").write_text(json.dumps(state), "utf-8")
    loaded = GistTokenizer.from_pretrained(tmp_path)
    assert type(loaded.template) is Template
    assert loaded.encode_continuations(["Hi."]) == tokenizer.encode_continuations(["Hi."])
    taught = loaded.encode_completions(["Hi."], ["Yo"])[0]
    assert loaded.decode(taught, skip_special_tokens=False) == "Yo<|endoftext|>"


# -- what is refused ---------------------------------------------------------------------------------------------------

_TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}"
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chatml(content: str = "m.content", before: str = "", turn: str = _TURN, ask: str = _ASK) -> GistTokenizer:
    tokenizer = CHATS["chatml"].tokenizer()
    tokenizer.chat_template = before + turn.replace("CONTENT", content) + ask
    return GistTokenizer(tokenizer, "chat")


@pytest.mark.parametrize("content", ["m.content | trim", "m.content | tojson", "m.content.split('</think>')[-1]"])
@pytest.mark.parametrize("text", CONTENTS, ids=IDS)
def test_what_a_template_does_to_contents_is_followed(content: str, text: str) -> None:
    tokenizer = chatml(content)
    prompt = text if text.strip() else "p"
    messages = turns(text, text, text)
    stock: Any = tokenizer.tokenizer
    whole = stock.apply_chat_template(
        [{"role": "system", "content": prompt}, *messages], add_generation_prompt=True, return_dict=False
    )
    assert prompt_ids(tokenizer, prompt) + tokenizer.encode_continuations([messages])[0] == whole


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"content": "m.content | upper | replace('\ue0f0', 'x')"}, "it does not write every message once"),
        ({"turn": _TURN + _TURN}, "it does not write every message once, unchanged and in order"),
        ({"turn": _TURN.replace("in messages", "in messages | reverse")}, "it does not write every message once"),
        ({"ask": _ASK.replace("\n", "<think>\n")}, "it begins an answer in another way than it asks for one"),
        (
            {"turn": _TURN.replace("<|im_end|>", "{{ '<|im_end|>' if loop.last or m.role != 'assistant' }}")},
            "it ends an earlier answer in another way than the last",
        ),
        ({"before": "{{ messages | length }}"}, "it moves the prompt when the conversation goes on"),
        ({"before": "{{ raise_exception('not today') }}"}, "refuses a conversation of system, user: not today"),
        ({"content": "m.content.text"}, "it does not write every message once"),
        ({"before": "{% if"}, "refuses a conversation of system, user: "),
    ],
    ids=["changed", "twice", "reversed", "thinking", "open", "moved", "raises", "fields", "syntax"],
)
def test_templates_that_cannot_be_followed_are_refused(settings: dict[str, str], reason: str) -> None:
    with pytest.raises(GistError) as caught:
        chatml(**settings)
    assert str(caught.value).startswith(
        "the tokenizer's chat template cannot be followed: with the prompt as the system message, "
    )
    assert reason in str(caught.value)
    assert str(caught.value).endswith("; use another template: one of the library, or a Template")


def test_a_prompt_that_changes_what_follows_it_is_refused() -> None:
    tokenizer = chatml(before="{% set tail = '!' if 'loud' in messages[0].content else '' %}", ask="{{ tail }}" + _ASK)
    with pytest.raises(GistError, match=r"^prompt 'be loud' changes what the chat template writes after it"):
        tokenizer.encode_prompts(["be loud"], 1)
    assert tokenizer.encode_prompts(["be calm"], 1)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"^inputs\[0\] has no messages; give at least one of the user$"),
        ([{"role": "system", "content": "p"}], r"^inputs\[0\]\[0\] is a system message, which the gist replaces"),
        (["Hi."], r"^inputs\[0\] must be a text, or a list of messages, got list$"),
        (7, r"^inputs\[0\] must be a text, or a list of messages, got int$"),
        (turns("a", "b")[1:], r"^the chat template refuses a conversation of|^messages must begin with a text of the"),
        ([{"role": "user"}], r"^messages must begin with a text of the user"),
    ],
    ids=["none", "system", "texts", "number", "assistant-first", "no-content"],
)
def test_conversations_that_cannot_follow_a_gist(messages: Any, message: str) -> None:
    with pytest.raises(GistError, match=message):
        wrapped("gemma-2").encode_continuations([messages])


def test_messages_need_a_chat_template() -> None:
    tokenizer = GistTokenizer(CHATS["chatml"].tokenizer(), "plain")
    with pytest.raises(GistError, match=r"^inputs\[0\] is a list of messages, which only the template 'chat' lays out"):
        tokenizer.encode_continuations([turns("Hi.")])


# -- dates, named templates, defaults ----------------------------------------------------------------------------------


def test_the_date_of_a_template_is_the_same_on_every_day(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gisting"):
        text = GistTokenizer(CHATS["llama-3.2"].tokenizer(), "chat").template.prompt_text("p")
    assert "Today Date: 26 Jul 2024\n\np" in text
    assert [record.getMessage() for record in caplog.records] == [
        "the chat template writes today's date before the prompt; every prompt is compressed with 26 Jul 2024 instead, "
        "so that caches stay valid"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "gisting"):
        GistTokenizer(CHATS["granite-3"].tokenizer(), "chat")
    assert not caplog.records, "the date is in the default system message only"


def test_a_date_after_the_prompt_is_refused() -> None:
    with pytest.raises(GistError, match=r"^the tokenizer's chat template writes today's date after the prompt"):
        chatml(ask="{{ strftime_now('%Y') }}" + _ASK)


def test_named_chat_templates() -> None:
    tokenizer: Any = CHATS["chatml"].tokenizer()
    tokenizer.chat_template = {"default": CHATS["smollm2"].source, "tool_use": CHATS["chatml"].source}
    found = GistTokenizer(tokenizer, "chat")
    assert found.encode_bare(["Hi."]) == wrapped("smollm2").encode_bare(["Hi."])
    tokenizer.chat_template = {"rag": CHATS["smollm2"].source, "tool_use": CHATS["chatml"].source}
    with pytest.raises(GistError) as caught:
        GistTokenizer(tokenizer, "chat")
    assert str(caught.value) == (
        "the tokenizer has several chat templates (rag, tool_use), none of which is named 'default'; choose one: "
        "tokenizer.chat_template = tokenizer.chat_template[NAME]"
    )


def test_the_default_is_the_chat_template_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gisting"):
        found = GistTokenizer(CHATS["chatml"].tokenizer())
    assert found.template == wrapped("chatml").template
    assert [record.getMessage() for record in caplog.records] == [
        "no template is given: taking the tokenizer's own chat template, as with template='chat'; earlier versions "
        "took 'alpaca', which can still be given"
    ]
    assert GistTokenizer(CHATS["chatml"].tokenizer(), is_encoder_decoder=True).template.name == "alpaca-t5"
    published = CHATS["chatml"].tokenizer()
    published.add_tokens(["<GIST>"])
    assert GistTokenizer(published).template.name == "alpaca"
    plain = CHATS["chatml"].tokenizer()
    plain.chat_template = None
    assert GistTokenizer(plain).template.name == "alpaca"


# -- conversations -----------------------------------------------------------------------------------------------------

LETTERS = "abcdefgh"


class Talk:
    """A random model in a conversation under a family's chat template, which answers in letters."""

    def __init__(self, name: str) -> None:
        self.name, self.tokenizer = name, GistTokenizer(CHATS[name].tokenizer(), "chat")
        self.model = patch(
            tiny.model("llama", vocab_size=len(self.tokenizer), max_position_embeddings=4096), self.tokenizer
        )
        letters = {ids[0] for ids in self.tokenizer.encode_texts(list(LETTERS))}
        allowed = {*letters, self.tokenizer.eos_token_id}
        self.settings: dict[str, Any] = {
            "do_sample": False,
            "max_new_tokens": 12,
            "suppress_tokens": [number for number in range(len(self.tokenizer)) if number not in allowed],
            "eos_token_id": self.tokenizer.eos_token_id,
        }


@pytest.mark.parametrize("name", ["smollm2", "mistral-v1", "gemma-2", "phi-3", "olmo-2", "text"])
def test_a_conversation_is_the_templates_at_every_turn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the states are of, with answers that end and answers that are cut, is what stock transformers makes of the
    same messages; and a turn answers what the same messages in one go answer.
    """
    talk = Talk(name)
    tokenizer, chat = talk.tokenizer, CHATS[name]
    held: list[list[int]] = [[], []]
    real = answers.decoder.continued

    def continued(model: Any, cache: Any, past: Any, continuations: Any, said: Any) -> Any:
        for row, (before, after) in enumerate(zip(continuations, said, strict=True)):
            held[row] += [*before, *after]
        return real(model, cache, past, continuations, said)

    monkeypatch.setattr(answers.decoder, "continued", continued)
    cache = gisting.compress(talk.model, tokenizer, ["Be brief."], 2)
    texts: list[list[str]] = [[], []]
    for number, inputs in enumerate((["Hi.", "Hello there, you!"], ["And?", " x\n"], ["", "c"])):
        # In the second turn every answer is cut off; in the others it ends at the latest with its last token.
        cut, ended = {"max_new_tokens": 3, "min_new_tokens": 3}, {"forced_eos_token_id": tokenizer.eos_token_id}
        how = talk.settings | (cut if number == 1 else ended)
        turn = converse(talk.model, tokenizer, inputs, cache=cache, **how)
        for row, input in enumerate(inputs):
            texts[row] += [input]
            wanted = stock(name, with_prompt(chat, "p", turns(*texts[row])))
            start = prompt_ids(tokenizer, "p")
            given = start + held[row]
            assert given[: len(wanted)] == wanted
            said = tokenizer.decode(given[len(wanted) :])
            assert said.strip() == turn.texts[row]
            texts[row] += [turn.texts[row]]
        assert turn.cache.num_gist_tokens == [2 + len(ids) for ids in held]
        cache = turn.cache
    messages = [turns(*said, "More.") for said in texts]
    at_once = gisting.generate(
        talk.model,
        tokenizer,
        messages,
        cache=gisting.compress(talk.model, tokenizer, ["Be brief."], 2),
        **talk.settings,
    )
    assert gisting.generate(talk.model, tokenizer, ["More.", "More."], cache=cache, **talk.settings) == at_once


def test_caches_of_a_gist_and_of_a_conversation_are_told_apart(tmp_path: Any) -> None:
    talk = Talk("gemma-2")
    cache = gisting.compress(talk.model, talk.tokenizer, ["Be brief."], 2)
    turn = converse(talk.model, talk.tokenizer, ["Hi."], cache=cache, **talk.settings)
    assert (cache.has_answers, turn.cache.has_answers) == (False, True)
    turn.cache.save(tmp_path / "turn")
    loaded = gisting.GistCache.load(tmp_path / "turn")
    assert loaded.has_answers
    assert loaded.select([0, 0]).has_answers
    assert gisting.GistCache.cat([loaded]).has_answers
    wanted = converse(talk.model, talk.tokenizer, ["And?"], cache=turn.cache, **talk.settings).texts
    assert converse(talk.model, talk.tokenizer, ["And?"], cache=loaded, **talk.settings).texts == wanted
    with pytest.raises(CacheMismatchError, match=r"^some caches end with an answer and some with a gist"):
        gisting.GistCache.cat([cache, turn.cache])


def test_an_answer_that_ends_at_once() -> None:
    talk = Talk("smollm2")
    ids = range(len(talk.tokenizer))
    settings = dict(talk.settings)
    settings["suppress_tokens"] = [number for number in ids if number != talk.tokenizer.eos_token_id]
    cache = gisting.compress(talk.model, talk.tokenizer, ["Be brief."], 2)
    turn = converse(talk.model, talk.tokenizer, ["Hi."], cache=cache, **settings)
    assert turn.texts == [""]
    assert turn.cache.num_gist_tokens == [2 + len(talk.tokenizer.encode_continuations(["Hi."])[0])]
    at_once = gisting.generate(talk.model, talk.tokenizer, [turns("Hi.", "", "And?")], cache=cache, **talk.settings)
    assert gisting.generate(talk.model, talk.tokenizer, ["And?"], cache=turn.cache, **talk.settings) == at_once


def test_a_template_that_rewrites_answers_cannot_converse_but_answers_messages() -> None:
    talk = Talk("qwen3")
    cache = gisting.compress(talk.model, talk.tokenizer, ["Be brief."], 2)
    turn = converse(talk.model, talk.tokenizer, ["Hi."], cache=cache, **talk.settings)
    with pytest.raises(GistError, match=r"generate\(model, tokenizer, \[messages\], cache=cache\)$"):
        converse(talk.model, talk.tokenizer, ["And?"], cache=turn.cache, **talk.settings)
    messages = turns("Hi.", turn.texts[0], "And?")
    ids = talk.tokenizer.encode_continuations([messages])[0]
    given = torch.tensor([[talk.tokenizer.gist_token_id] * 2 + ids])
    generate: Any = talk.model.generate
    said = generate(given, past_key_values=cache.as_past_key_values(), **talk.settings)
    wanted = talk.tokenizer.decode(said[0, given.shape[1] :].tolist()).strip()
    assert gisting.generate(talk.model, talk.tokenizer, [messages], cache=cache, **talk.settings) == [wanted]


def test_the_negative_control_of_a_chat_is_a_chat() -> None:
    talk = Talk("smollm2")
    ids = talk.tokenizer.encode_bare(["Hi."])
    stock_model: Any = tiny.stock_twin("llama", talk.model, max_position_embeddings=4096)
    given = torch.tensor(ids)
    said = stock_model.generate(given, **talk.settings)[0, len(ids[0]) :].tolist()
    found = gisting.generate(
        talk.model, talk.tokenizer, ["Hi."], prompts=["Be brief."], condition="negative", **talk.settings
    )
    assert found == [talk.tokenizer.decode(said).strip()]


@pytest.mark.parametrize("name", ["smollm2", "gemma-2", "llama-2"])
def test_stock_generate_reads_a_chat(name: str) -> None:
    """An unpatched model with the weights of the patched one answers what ``gisting.generate`` answers."""
    talk = Talk(name)
    tokenizer = talk.tokenizer
    cache = gisting.compress(talk.model, tokenizer, ["Be brief."], 2)
    messages = turns("Hi.", "Hello!", "And?")
    how = {"num_gist_tokens": 2, "add_generation_prompt": True}
    given = tokenizer.apply_chat_template(messages, **how, return_tensors="pt")
    stock_model: Any = tiny.stock_twin("llama", talk.model, max_position_embeddings=4096)
    said = stock_model.generate(**given, past_key_values=cache.as_past_key_values(), **talk.settings)
    found = tokenizer.decode(said[0, given["input_ids"].shape[1] :].tolist()).strip()
    assert [found] == gisting.generate(talk.model, tokenizer, [messages], cache=cache, **talk.settings)

    ids = [tokenizer.gist_token_id] * 2 + tokenizer.encode_continuations([messages])[0]
    assert given["input_ids"].tolist() == [ids]
    with_system = [{"role": "system", "content": "Be brief."}, *messages]
    assert tokenizer.apply_chat_template(with_system, **how, return_dict=False) == ids
    assert tokenizer.apply_chat_template(messages, **how, tools=None) == {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
    }
    text = tokenizer.apply_chat_template(messages, **how, tokenize=False)
    assert text == "<GIST><GIST>" + tokenizer.decode(ids[2:], skip_special_tokens=False)
    finished = tokenizer.apply_chat_template([*messages, *turns("", "Bye!")[1:]], num_gist_tokens=2, tokenize=False)
    assert finished.startswith(text)
    assert "Bye!" in finished


@pytest.mark.parametrize(
    ("conversation", "settings", "message"),
    [
        (turns("Hi."), {"tools": [{}], "padding": True}, r"^padding, tools cannot be given with gist tokens"),
        (turns("Hi."), {"return_tensors": "np"}, r"^return_tensors must be 'pt' or None, got 'np'$"),
        (turns("Hi."), {"num_gist_tokens": 0}, r"^num_gist_tokens must be at least 1, got 0"),
        ([turns("Hi.")], {}, r"^conversation must be a text, or a list of messages, got list$"),
        ([{"role": "system", "content": "p"}], {}, r"^conversation has no messages; give at least one of the user$"),
    ],
    ids=["tools", "numpy", "k", "batch", "system-only"],
)
def test_chats_that_have_no_gist_tokens(conversation: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GistError, match=message):
        wrapped("smollm2").apply_chat_template(conversation, **settings)


@pytest.mark.parametrize("name", ["smollm2", "gemma-2"])
def test_every_control_of_a_chat_is_a_chat(name: str) -> None:
    """What the model reads under each condition, in answers and in losses."""
    talk = Talk(name)
    tokenizer, chat = talk.tokenizer, CHATS[name]
    read: list[str] = []
    talk.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tokenizer.decode(kwargs["input_ids"][0], skip_special_tokens=False)),
        with_kwargs=True,
    )

    def text(prompt: str | None) -> str:
        messages = turns("Hi.") if prompt is None else with_prompt(chat, prompt, turns("Hi."))
        return tokenizer.decode(stock(name, messages), skip_special_tokens=False)

    for condition, wanted in {
        "no-prompt": text(None),
        "negative": text(None),
        "prompt": text("Be brief."),
        "truncated": text("Be"),
    }.items():
        read.clear()
        settings = {"conditions": [condition], "with_rouge": False, "with_perplexity": True, "max_new_tokens": 1}
        evaluate(talk.model, tokenizer, [Record("Be brief.", "Hi.", "Yo")], 2, **settings)
        answered, taught = read
        assert answered.replace(tokenizer.gist_token, "") == wanted
        assert taught.endswith(wanted + f"Yo{chat.end}")


def test_a_pipeline_takes_chats() -> None:
    """And returns them with the answer, as the stock pipeline does."""
    talk = Talk("gemma-2")
    build: Any = transformers.pipeline
    pipe = build(
        "text-generation", model=talk.model, tokenizer=talk.tokenizer, pipeline_class=GistTextGenerationPipeline
    )
    cache = gisting.compress(talk.model, talk.tokenizer, ["Be brief."], 2)
    chats = [turns("Hi."), turns("Hi.", "Hello!", "And?")]
    wanted = gisting.generate(talk.model, talk.tokenizer, chats, cache=cache, **talk.settings)
    answered = [[*chat, {"role": "assistant", "content": text}] for chat, text in zip(chats, wanted, strict=True)]
    assert pipe(chats, cache=cache, **talk.settings) == [[{"generated_text": chat}] for chat in answered]
    assert pipe(chats[0], cache=cache, **talk.settings) == [{"generated_text": answered[0]}]
