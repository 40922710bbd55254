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
from gisting.data.packing import GistPackingCollator
from gisting.data.plain import plain_sources
from gisting.data.records import Record
from gisting.errors import CacheMismatchError, GistError
from gisting.eval.conditions import evaluate
from gisting.eval.results import Evaluation, evaluate_splits
from gisting.generation import answers, converse
from gisting.models.patch import patch
from gisting.pipeline import GistTextGenerationPipeline
from gisting.serving.requests import chat_ids
from gisting.tokens import ChatTemplate, GistTokenizer, Template
from gisting.train.finetune import finetune, published_arguments
from tests import tiny
from tests.chats import CALLED, CHATS, WEATHER, Chat

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
def wrapped(name: str, content: str = "") -> GistTokenizer:
    """Make a tokenizer which, like stock transformers, reads the special tokens of a content that is a marker."""
    return GistTokenizer(CHATS[name].tokenizer(), "chat", reads_special_tokens=content == "<|im_start|>")


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
    tokenizer, chat = wrapped(name, content), CHATS[name]
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
    tokenizer, chat = wrapped(name, content), CHATS[name]
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


RETURNED = [
    {"role": "tool", "name": "get_weather", "tool_call_id": "callabcde", "content": text} for text in ('"3"', " 4\n")
]
TALK = [*turns("Hi?"), CALLED, *RETURNED, {"role": "assistant", "content": "7"}, *turns("And?"), CALLED, RETURNED[0]]
WITH_CALLS = ["qwen2.5", "hermes-3", "llama-3.1"]


@pytest.mark.parametrize("name", [*WITH_CALLS, "mistral-v3"])
def test_tools_in_a_conversation(name: str) -> None:
    """Calls of tools and what they returned are written as the template writes them, at every turn."""
    tokenizer = wrapped(name)
    for end in range(1, len(TALK) + 1):
        messages = TALK[:end]
        if name == "mistral-v3" and messages[-1]["role"] != "user":  # It writes the prompt into the last message.
            continue
        whole = prompt_ids(tokenizer, "p") + tokenizer.encode_continuations([messages])[0]
        assert whole == stock(name, with_prompt(CHATS[name], "p", messages)), end


@pytest.mark.parametrize("name", WITH_CALLS)
def test_a_call_is_an_answer(name: str) -> None:
    """As text, it has the ids that the template writes for the call, up to and with the end of the answer."""
    tokenizer, chat = wrapped(name), CHATS[name]
    for asked in (TALK[:1], TALK[:6]):
        (before, taught), template = (
            tokenizer.encode_answers([asked], [tokenizer.template.written_answer(asked, CALLED)])[0],
            tokenizer.template,
        )
        assert isinstance(template, ChatTemplate)
        whole = stock(name, with_prompt(chat, "p", [*asked, CALLED]), asks=False)
        found = prompt_ids(tokenizer, "p") + before + taught
        assert found == whole[: len(found)]
        assert tokenizer.decode(whole[len(found) :], skip_special_tokens=False) == template.after_end
        assert "get_weather" in tokenizer.decode(taught)


def test_thoughts_are_a_part_of_the_last_answer_only() -> None:
    template = wrapped("qwen3").template
    assert isinstance(template, ChatTemplate)
    message = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYo"}
    assert template.written_answer("Hi.", message) == message["content"]
    assert "hm" not in template.continuation_text([*turns("Hi."), message, *turns("And?")])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*WITH_CALLS, "mistral-v3")])
def test_a_template_without_calls_refuses_them(name: str) -> None:
    """Otherwise the model would be shown, or taught, an empty answer."""
    with pytest.raises(GistError, match=r"^the chat template (does not write the call of 'get_weather'|refuses)"):
        wrapped(name).encode_continuations([TALK[:3]])


def test_a_call_that_no_text_stands_for_is_refused() -> None:
    template: Any = wrapped("mistral-v3").template
    with pytest.raises(GistError, match=r"^the chat template writes a call of a tool in another way than answers"):
        template.written_answer("Hi?", CALLED)


@pytest.mark.parametrize("prompt", ["Be brief.", " x\n", None], ids=["text", "space", "none"])
@pytest.mark.parametrize("name", [name for name in NAMES if CHATS[name].tools == "system"])
def test_tools_are_a_prompt(name: str, prompt: str | None) -> None:
    """With the gist after the prompt that stands for them, the ids are those of the template with ``tools``."""
    tokenizer: Any = wrapped(name)
    text = tokenizer.prompt_with_tools(prompt, [WEATHER, WEATHER])
    start = [] if prompt is None else [{"role": "system", "content": prompt}]
    for end in (1, 2, 3, 4, 5, 6, 8):
        whole = tokenizer.tokenizer.apply_chat_template(
            [*start, *TALK[:end]], tools=[WEATHER, WEATHER], add_generation_prompt=True, return_dict=False
        )
        assert prompt_ids(tokenizer, text) + tokenizer.encode_continuations([TALK[:end]])[0] == whole
    assert text.count("get_weather") == 2


@pytest.mark.parametrize("kind", [GistCollator, GistPackingCollator])
@pytest.mark.parametrize("name", ["smollm2", "gemma-2", "granite-3"])
def test_rows_that_draw_the_negative_control_are_chats(name: str, kind: Any) -> None:
    """Among rows that draw others, which keep theirs; also after their texts were encoded ahead."""
    tokenizer = wrapped(name)
    records = [Record(f"p{number}", f"Hi {number}.", "Yo!") for number in range(24)]
    torch.manual_seed(0)
    collator = kind(tokenizer, conditions={"gist": 1, "negative": 1}, max_length=256)
    found = {True: 0, False: 0}
    for rows in (records, collator.encode_ahead(records)):
        batch = collator(rows)
        ids = [token for row in batch["input_ids"].tolist() for token in row]
        for number, record in enumerate(rows):
            head = prompt_ids(tokenizer, f"p{number}")
            start = (
                next(
                    place
                    for place in range(len(ids))
                    if ids[place : place + len(head) + 1] == [*head, tokenizer.gist_token_id]
                )
                + len(head)
                + 1
            )
            bare, after = tokenizer.encode_bare([record.input])[0], tokenizer.encode_continuations([record.input])[0]
            is_bare = ids[start : start + len(bare)] == bare
            assert is_bare or ids[start : start + len(after)] == after
            found[is_bare] += 1
    assert min(found.values()) > 12
    masks = batch["attention_mask"][:, 0]
    assert batch["labels"].shape == batch["input_ids"].shape == masks[:, 0].shape


def test_a_bare_conversation_counts_where_inputs_are_cut() -> None:
    """Granite's has a system message of its own, so it is longer than what follows a gist."""
    tokenizer = wrapped("granite-3")
    record = Record("p", "word " * 40, "Yo!")
    bare = len(tokenizer.encode_bare([record.input])[0])
    after = len(tokenizer.encode_continuations([record.input])[0])
    assert bare > after
    limit = len(prompt_ids(tokenizer, "p")) + 1 + bare - 8 + len(tokenizer.encode_completions(["x"], ["Yo!"])[0])
    lengths = set()
    for seed in range(8):
        torch.manual_seed(seed)
        batch = GistCollator(tokenizer, conditions={"gist": 1, "negative": 1}, max_length=limit)([record])
        lengths.add(batch["input_ids"].shape[1])
    assert len(lengths) == 2
    assert limit - 5 <= max(lengths) <= limit


def test_tools_without_calls_are_a_prompt() -> None:
    """A template may write tools, but not calls, which a model then writes as text."""
    tokenizer = chatml("m.content ~ (tools | tojson if tools and loop.first)")
    text = tokenizer.prompt_with_tools("p", [WEATHER])
    assert text.startswith('p[{"type": "function"')
    stock: Any = tokenizer.tokenizer
    messages = [{"role": "system", "content": "p"}, *turns("Hi.")]
    whole = stock.apply_chat_template(messages, tools=[WEATHER], add_generation_prompt=True, return_dict=False)
    assert prompt_ids(tokenizer, text) + tokenizer.encode_continuations(["Hi."])[0] == whole


@pytest.mark.parametrize("name", [name for name in NAMES if CHATS[name].tools != "system"])
def test_tools_elsewhere_are_refused(name: str) -> None:
    chat = CHATS[name]
    reason = "does not write tools into the system message alone" if chat.tools else "writes no tools; choose one"
    if chat.role == "user":
        reason = "does not write tools into the system message alone"
    for prompt in ("Be brief.", None):
        with pytest.raises(GistError, match=rf"^the chat template {reason}"):
            wrapped(name).prompt_with_tools(prompt, [WEATHER])


@pytest.mark.parametrize(
    ("template", "tools", "message"),
    [
        ("chat", [], r"^tools must be a list of at least one description of a function, got \[\]; give \["),
        ("chat", WEATHER, r"^tools must be a list of at least one description of a function, got \{'type': "),
        ("chat", ["get_weather"], r"^tools must be a list of at least one description of a function, got \['get_"),
        (
            "plain",
            [WEATHER],
            r"^tools are laid out by the template 'chat' only, and the tokenizer's template is 'plain",
        ),
    ],
    ids=["none", "one", "names", "plain"],
)
def test_tools_that_are_none(template: str, tools: Any, message: str) -> None:
    tokenizer = GistTokenizer(CHATS["qwen2.5"].tokenizer(), template)
    with pytest.raises(GistError, match=message):
        tokenizer.prompt_with_tools("p", tools)


# -- conversations as records ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_is_trained_on_at_every_answer(name: str) -> None:
    """Each row is the template's conversation up to an answer, with the gist after the prompt; the answer is taught."""
    tokenizer, chat = wrapped(name), CHATS[name]
    messages = turns("Hi.", "Hello!", " And?\n", 'a "b"', "", "Bye!")
    item = {"messages": [{"role": "system", "content": "Be brief."}, *messages]}
    number, gist = len(prompt_ids(tokenizer, "Be brief.")), [tokenizer.gist_token_id] * 2
    batch = GistCollator(tokenizer, 2, max_length=4096)([item])
    masks = batch["attention_mask"][:, 0]
    rows = [ids[mask[1] > mask[0]].tolist() for ids, mask in zip(batch["input_ids"], masks, strict=True)]
    answers = [labels[labels != -100].tolist() for labels in batch["labels"]]
    for end, row, taught in zip((2, 4, 6), rows, answers, strict=True):
        before = stock(name, with_prompt(chat, "Be brief.", messages[: end - 1]))
        whole = stock(name, with_prompt(chat, "Be brief.", messages[:end]), asks=False)
        assert row == [*before[:number], *gist, *before[number:], *taught]
        written = taught if chat.end else taught[:-1]  # The end that the template does not write.
        assert [*before, *written] == whole[: len(before + written)]
        assert taught[-1] == tokenizer.eos_token_id
    # Packed, there is one copy of the prompt, and all that follows it.
    packed = GistPackingCollator(tokenizer, 2, max_length=4096)([item])
    assert packed["input_ids"].tolist() == [[*rows[0][: number + 2], *(id for row in rows for id in row[number + 2 :])]]
    assert packed["labels"][packed["labels"] != -100].tolist() == [id for taught in answers for id in taught]


@pytest.mark.parametrize("name", ["qwen2.5", "hermes-3"])
def test_a_conversation_with_tools_is_trained_on(name: str) -> None:
    """As a row of a data set, whose columns have every key of every message, mostly None."""
    datasets = pytest.importorskip("datasets")
    tokenizer: Any = wrapped(name)
    other = {"function": {"name": "add", "arguments": {"a": 1}}, "type": "function", "id": "x"}
    item = {"messages": [{"role": "system", "content": "Be brief."}, *TALK[:7]], "tools": [WEATHER]}
    added = {"messages": [*turns("1?"), {**CALLED, "tool_calls": [other]}], "tools": None}
    rows = datasets.Dataset.from_list([item, added])
    assert rows[0]["messages"][2]["tool_calls"][0]["function"]["arguments"] == {"city": "Zürich", "a": None}
    batch = GistCollator(tokenizer, 1, max_length=4096)([rows[0]])
    assert len(batch["input_ids"]) == 3
    for ids, mask, end in zip(batch["input_ids"], batch["attention_mask"][:, 0], (3, 6, 8), strict=True):
        found = [token for token in ids[mask[1] > mask[0]].tolist() if token != tokenizer.gist_token_id]
        whole = tokenizer.tokenizer.apply_chat_template(item["messages"][:end], tools=[WEATHER], return_dict=False)
        template = tokenizer.template
        assert tokenizer.decode(found, skip_special_tokens=False) + template.after_end == tokenizer.decode(
            whole, skip_special_tokens=False
        )
        assert found == whole[: len(found)]


def test_a_conversation_that_is_too_long_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Its turns are not cut; its shorter beginning stays."""
    item = {"messages": [{"role": "system", "content": "p"}, *turns("Hi.", "Yo.", "word " * 200, "No.")]}
    with caplog.at_level(logging.WARNING, "gisting"):
        batch = GistCollator(wrapped("chatml"), 1, max_length=256)([item])
    assert len(batch["input_ids"]) == 1
    assert "the end of the input is cut of 0, and 1 are left out" in caplog.text
    assert "or their input is a conversation, which is not cut" in caplog.text


def test_a_conversation_needs_a_chat_template() -> None:
    item = {"messages": [{"role": "system", "content": "p"}, *turns("Hi.", "Yo.", "And?", "No.")]}
    with pytest.raises(GistError, match=r"is a list of messages, which only the template 'chat' lays out"):
        GistCollator(GistTokenizer(CHATS["chatml"].tokenizer(), "plain"))([item])


@pytest.mark.parametrize("name", ["smollm2", "gemma-2"])
def test_a_conversation_is_evaluated_at_every_answer(name: str) -> None:
    """Under every condition, with what the model reads: the conversation so far, with the gist or a control."""
    talk = Talk(name)
    tokenizer, chat = talk.tokenizer, CHATS[name]
    read: list[str] = []
    talk.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tokenizer.decode(kwargs["input_ids"][0], skip_special_tokens=False)),
        with_kwargs=True,
    )
    messages = turns("Hi.", "Hello!", "And?", "Yo")
    item = {"messages": [{"role": "system", "content": "Be brief."}, *messages]}
    for condition in ("gist", "positive", "negative", "truncated", "no-prompt", "prompt"):
        read.clear()
        settings = {"conditions": [condition], "with_rouge": False, "with_perplexity": True, "max_new_tokens": 1}
        (result,) = evaluate(talk.model, tokenizer, [item], 2, batch_size=1, **settings)
        assert result.num_records == 2
        if condition in ("no-prompt", "prompt"):
            for end, text in ((1, read[0]), (3, read[2])):
                asked = messages[:end] if condition == "no-prompt" else with_prompt(chat, "Be brief.", messages[:end])
                assert text == tokenizer.decode(stock(name, asked), skip_special_tokens=False)
    cache = gisting.compress(talk.model, tokenizer, ["Be brief."], 2)
    said = gisting.generate(talk.model, tokenizer, ["Hi.", messages[:3]], cache=cache, **talk.settings)
    (result,) = evaluate(
        talk.model, tokenizer, [item], 2, conditions=["gist"], with_rouge=False, max_new_tokens=12, **_decoding(talk)
    )
    assert result.predictions == said


def test_an_evaluation_of_conversations_is_kept(tmp_path: Any) -> None:
    talk = Talk("smollm2")
    item = {"messages": [{"role": "system", "content": "p"}, *turns("Hi.", "Hello!", "And?", "Yo")]}
    settings = {"conditions": ["gist"], "with_rouge": False, "max_new_tokens": 2}
    made = evaluate_splits(talk.model, talk.tokenizer, {"talks": [item]}, 2, name="m", environment={}, **settings)
    made.save(tmp_path / "a.json")
    assert Evaluation.load(tmp_path / "a.json").splits[0].records == made.splits[0].records
    assert len(made.splits[0].records) == 2


def _decoding(talk: Talk) -> dict[str, Any]:
    return {name: talk.settings[name] for name in ("suppress_tokens", "eos_token_id")}


def test_conversations_train_a_model(tmp_path: Any) -> None:
    """A data set of conversations, packed and not, and as a stream; the loss of each is that of its answers."""
    datasets = pytest.importorskip("datasets")
    items = [
        {"messages": [{"role": "system", "content": f"p{n}"}, *turns("Hi.", "Hello!", f"And {n}?", "Yo")]}
        for n in range(4)
    ]
    rows = datasets.Dataset.from_list(items)
    losses = []
    for records, settings in ((rows, {}), (rows, {"pack_length": 512}), (rows.to_iterable_dataset(), {})):
        talk = Talk("smollm2")
        arguments = published_arguments(tmp_path, batch_size=8, max_steps=1, save_strategy="no", disable_tqdm=True)
        measured = finetune(talk.model, talk.tokenizer, records, arguments, num_gist_tokens=2, **settings)
        losses.append(measured["train_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0] == pytest.approx(losses[2], abs=1e-4)
    grouped = published_arguments(tmp_path, batch_size=8, max_steps=1, train_sampling_strategy="group_by_length")
    with pytest.raises(GistError, match=r"^records whose input is a conversation cannot be grouped by length"):
        finetune(talk.model, talk.tokenizer, rows, grouped)


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
    tokenizer.reads_special_tokens = text == "<|im_start|>"
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


def test_messages_are_no_prompt() -> None:
    with pytest.raises(
        GistError, match=r"^prompts\[0\] must be a text, got list; of messages, give the text of the sys"
    ):
        wrapped("chatml").encode_prompts([[{"role": "system", "content": "p"}]], 1)  # type: ignore[list-item]


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


@pytest.mark.parametrize("name", ["smollm2", "gemma-2"])
def test_a_cache_makes_what_stock_generate_reads(name: str) -> None:
    """For texts and chats of several lengths at once, and after a turn."""
    talk = Talk(name)
    tokenizer = talk.tokenizer
    stock_model: Any = tiny.stock_twin("llama", talk.model, max_position_embeddings=4096)
    cache = gisting.compress(talk.model, tokenizer, ["Be brief.", "Be kind."], [2, 3])
    turn = converse(talk.model, tokenizer, ["Hi.", "Hello!"], cache=cache, **talk.settings)
    for past, inputs in ((cache, ["Hi.", turns("Hi.", "Hello!", "And?")]), (turn.cache, ["And?", "More, please."])):
        given = past.stock_inputs(tokenizer, inputs)
        said = stock_model.generate(**given, past_key_values=past.as_past_key_values(), **talk.settings)
        found = [tokenizer.decode(row).strip() for row in said[:, given["input_ids"].shape[1] :].tolist()]
        assert found == gisting.generate(talk.model, tokenizer, inputs, cache=past, **talk.settings)
    one = tokenizer.apply_chat_template(
        turns("Hi."), num_gist_tokens=3, add_generation_prompt=True, return_tensors="pt"
    )
    given = cache[1].stock_inputs(tokenizer, [turns("Hi.")])
    assert given["input_ids"].equal(one["input_ids"])
    assert given["attention_mask"].equal(one["attention_mask"])
    with pytest.raises(GistError, match=r"^inputs must be one for each of the 2 prompts, got 1; select\(\) repeats$"):
        cache.stock_inputs(tokenizer, ["Hi."])


def test_stock_trainer_takes_the_tokenizer(tmp_path: Any) -> None:
    """As its ``processing_class``, which it saves with every checkpoint."""
    talk = Talk("smollm2")
    rows = [{"messages": [{"role": "system", "content": "p"}, *turns("Hi.", "Yo.", "And?", "No.")]}] * 4
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        report_to="none",
        save_steps=1,
        include_num_input_tokens_seen="all",
        use_cpu=True,
    )
    trainer = transformers.Trainer(
        talk.model,
        arguments,
        data_collator=GistCollator(talk.tokenizer, 2),
        train_dataset=rows,  # type: ignore[arg-type]
        processing_class=talk.tokenizer,  # type: ignore[arg-type]
    )
    trainer.train()
    for folder in (tmp_path / "checkpoint-1", tmp_path / "end"):
        trainer.save_model(str(tmp_path / "end"))
        _, tokenizer = gisting.load(folder)
        assert tokenizer.fingerprint == talk.tokenizer.fingerprint


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
