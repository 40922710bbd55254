"""Requests with a gist: from texts and messages to ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gisting.data.messages import prompt_of
from gisting.errors import GistError
from gisting.models.patch import patch
from gisting.serving.gists import GistRefusedError, Served, StoredGists
from gisting.serving.requests import chat_ids, chat_with_ids, completion_with_ids, request
from gisting.store import GistStore
from gisting.store.index import prompt_digest
from gisting.tokens import GistTokenizer
from tests import tiny
from tests.chats import CALL, CALLED, CHATS, WEATHER

G = 64
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3"},
    {"role": "user", "content": [{"type": "text", "text": "w4"}]},
]


@pytest.fixture(scope="module")
def tokenizer() -> GistTokenizer:
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def gists(tmp_path_factory: pytest.TempPathFactory) -> StoredGists:
    path = tmp_path_factory.mktemp("requests") / "store"
    model, tokenizer = tiny.patched("llama")
    with GistStore(path) as store:
        store.get_or_compress(model, tokenizer, ["w1 w2 w3"], 3, names=["three"])
        (entry,) = store.list()
    return StoredGists(path, Served((entry.model,), entry.tokenizer, "plain", G))


def test_a_request_in_every_form(tokenizer: GistTokenizer) -> None:
    rest = tokenizer.encode_continuations(["w5 w6"])[0]
    found = request("three", "w5 w6", tokenizer=tokenizer, num_gist_tokens=3)
    assert found.prompt == {"prompt_token_ids": [G, G, G, *rest]}
    assert found.extra_args == {"kv_transfer_params": {"gist": "three"}}
    assert found.completion() == {"prompt": [G, G, G, *rest], "extra_body": found.extra_args}
    assert request("three", token_ids=rest, tokenizer=tokenizer, num_gist_tokens=3) == found
    with pytest.raises(GistError, match="was not made from messages"):
        found.chat()
    chat = request("three", messages=MESSAGES, tokenizer=tokenizer, num_gist_tokens=3).chat()
    ids = [G, G, G, *chat_ids(tokenizer, MESSAGES)]
    params = {"gist": "three", "prompt_token_ids": ids}
    assert chat == {"messages": MESSAGES, "extra_body": {"kv_transfer_params": params}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give one of input, messages and token_ids, got none"),
        ({"input": "w1", "token_ids": [1]}, "got input and token_ids"),
        ({"input": "w1", "num_gist_tokens": 0}, "num_gist_tokens must be at least 1"),
        ({"token_ids": []}, "nothing after the gist"),
    ],
)
def test_requests_that_cannot_be_made(tokenizer: GistTokenizer, given: dict[str, Any], message: str) -> None:
    with pytest.raises(GistError, match=message):
        request("three", **{"tokenizer": tokenizer, "num_gist_tokens": 3, **given})


def test_a_chat_is_read_as_a_conversation_is(tokenizer: GistTokenizer) -> None:
    # Each answer follows its input and ends with the end of sequence, as in training and in converse.
    turn = tokenizer.encode("w9", "w1 w2", "w3", num_gist_tokens=1)
    (last,) = tokenizer.encode_continuations(["w4"])
    assert chat_ids(tokenizer, MESSAGES) == [*turn.input_ids[turn.gist_end :], *last]
    assert turn.input_ids[-1] == tokenizer.eos_token_id


def test_the_chat_of_one_message_is_an_input(tokenizer: GistTokenizer) -> None:
    assert chat_ids(tokenizer, MESSAGES[:1]) == tokenizer.encode_continuations(["w1 w2"])[0]
    # As the openai client returns an answer.
    answer = {**MESSAGES[1], "tool_calls": None, "function_call": None}
    assert chat_ids(tokenizer, [MESSAGES[0], answer, MESSAGES[2]]) == chat_ids(tokenizer, MESSAGES)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("w1", "must be a list"),
        (["w1"], r"messages\[0\] must be from the user"),
        ([{"role": "system", "content": "w1"}], "which the gist replaces"),
        ([{"role": "developer", "content": "w1"}], "is a developer message"),
        (MESSAGES[1:], "must be from the user"),
        ([MESSAGES[0], MESSAGES[0]], r"messages\[1\] must be from the assistant"),
        (MESSAGES[:2], "must end with one from the user"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "must be text"),
        ([{"role": "user", "content": None}], "must be text"),
        ([{"role": "user", "content": []}], "must be text"),
        ([{"role": "tool", "content": "w1"}], "must be from the user"),
        ([MESSAGES[0], {**MESSAGES[1], "tool_calls": [{"id": "a"}]}, MESSAGES[2]], r"messages\[1\] holds tool_calls"),
        ([MESSAGES[0], {**MESSAGES[1], "function_call": {"name": "a"}}, MESSAGES[2]], "holds function_call"),
    ],
)
def test_chats_that_cannot_follow_a_gist(tokenizer: GistTokenizer, messages: Any, message: str) -> None:
    with pytest.raises(GistRefusedError, match=message):
        chat_ids(tokenizer, messages)


def body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "kv_transfer_params": {"gist": "three"}, **more}


def test_completions(gists: StoredGists, tokenizer: GistTokenizer) -> None:
    one, two = tokenizer.encode_continuations(["w1", "w2 w3"])
    for prompt, wanted in (
        ("w1", [G, G, G, *one]),
        (["w1"], [[G, G, G, *one]]),
        (["w1", "w2 w3"], [[G, G, G, *one], [G, G, G, *two]]),
        (one, [G, G, G, *one]),
        ([G, G, G, *one], [G, G, G, *one]),
        ([one, [G, G, G, *two]], [[G, G, G, *one], [G, G, G, *two]]),
    ):
        assert completion_with_ids(body(prompt=prompt), gists, tokenizer) == body(prompt=wanted)
    assert completion_with_ids({"prompt": "w1"}, gists, tokenizer) is None


def test_chats(gists: StoredGists, tokenizer: GistTokenizer) -> None:
    ids = [G, G, G, *chat_ids(tokenizer, MESSAGES)]
    given = body(messages=MESSAGES, stream=True)
    wanted = {**given, "kv_transfer_params": {"gist": "three", "prompt_token_ids": ids}}
    assert chat_with_ids(given, gists, tokenizer) == wanted
    assert chat_with_ids(wanted, gists, tokenizer) == wanted
    assert chat_with_ids({"messages": MESSAGES}, gists, tokenizer) is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompt": "w1", "echo": True}, "echo does not work with a gist"),
        ({"prompt": "w1", "prompt_logprobs": 0}, "prompt_logprobs does not work"),
        ({"prompt": "w1", "truncate_prompt_tokens": 5}, "it would cut off the gist"),
        ({"prompt": "w1", "suffix": "w2"}, "suffix does not work"),
        ({"prompt": "w1", "tools": [{}]}, "tools does not work with a gist: tools are part of a chat"),
        ({"prompt": "w1", "allowed_token_ids": [1, G]}, "allowed_token_ids holds the gist token"),
        ({"prompt": None}, "prompt must be a text"),
        ({"prompt": []}, "prompt must be a text"),
        ({"prompt": [1, True]}, "prompt must be a text"),
        ({"prompt": [-1]}, "prompt must be a text"),
        ({"prompt": ["w1", 1]}, "prompt must be a text"),
        ({"prompt": [[]]}, "prompt must be a text"),
        ({"prompt": [G, 1]}, "has 1 gist tokens in front"),
    ],
)
def test_completions_that_do_not_work_with_a_gist(
    gists: StoredGists, tokenizer: GistTokenizer, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(GistRefusedError, match=message):
        completion_with_ids(body(**more), gists, tokenizer)


@pytest.mark.parametrize("field", ["echo", "prompt_logprobs", "use_beam_search", "suffix", "tools"])
@pytest.mark.parametrize("value", [None, False, []])
def test_options_that_are_off_are_ignored(gists: StoredGists, tokenizer: GistTokenizer, field: str, value: Any) -> None:
    if field == "prompt_logprobs" and value is False:
        pytest.skip("False equals 0, which scores the prompt")
    assert completion_with_ids(body(prompt="w1", **{field: value}), gists, tokenizer)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tools": [{}]}, "tools cannot come with a gist: tools are laid out by the template 'chat' only"),
        ({"chat_template": "x"}, "chat_template does not work"),
        ({"reasoning_effort": "low"}, "reasoning_effort does not work"),
        ({"add_generation_prompt": False}, "add_generation_prompt does not work"),
        ({"continue_final_message": True}, "continue_final_message does not work"),
        ({"kv_transfer_params": {"gist": "three", "prompt_token_ids": "w1"}}, "must be a list of ids"),
        ({"kv_transfer_params": {"gist": "three", "prompt_token_ids": [G, 1]}}, "has 1 gist tokens in front"),
        ({"messages": None}, "at least one message"),
    ],
)
def test_chats_that_do_not_work_with_a_gist(
    gists: StoredGists, tokenizer: GistTokenizer, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(GistRefusedError, match=message):
        chat_with_ids({**body(messages=MESSAGES), **more}, gists, tokenizer)


# -- tools -------------------------------------------------------------------------------------------------------------

CALLED_IN_JSON = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{**CALL, "function": {"name": "get_weather", "arguments": '{"city": "Zürich"}'}}],
}
RETURNED = {"role": "tool", "tool_call_id": "callabcde", "content": [{"type": "text", "text": "3"}]}


@pytest.fixture(scope="module")
def chat() -> GistTokenizer:
    return GistTokenizer(CHATS["qwen2.5"].tokenizer(), "chat")


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory, chat: GistTokenizer) -> StoredGists:
    path = tmp_path_factory.mktemp("requests") / "store"
    model = patch(tiny.model("llama", vocab_size=len(chat), max_position_embeddings=4096), chat)
    prompts = {"both": chat.prompt_with_tools("Be brief.", [WEATHER]), "tools": chat.prompt_with_tools(None, [WEATHER])}
    with GistStore(path) as store:
        store.get_or_compress(model, chat, [*prompts.values(), "Be brief."], 2, names=[*prompts, "three"])
        entry = store.list()[0]
    return StoredGists(path, Served((entry.model,), entry.tokenizer, "chat", chat.gist_token_id))


SYSTEM = {"role": "system", "content": "Be brief."}


def test_a_gist_that_does_not_say_what_it_was_made_of(with_tools: StoredGists, chat: GistTokenizer) -> None:
    with GistStore(with_tools.path) as store:
        store.put("silent", replace(store["both"], about=(None,)))
    with pytest.raises(GistRefusedError, match=r"gist 'silent' does not say what it was made of.* compress it again"):
        chat_with_ids(asked("silent", [SYSTEM, *MESSAGES[:1]], tools=[WEATHER]), with_tools, chat)


def test_a_system_message_in_parts_is_that_of_its_gist(with_tools: StoredGists, chat: GistTokenizer) -> None:
    """As a file of prompts reads them."""
    parts = [{"type": "text", "text": text} for text in ("Be", "brief.")]
    system = {**SYSTEM, "content": parts}
    prompt = prompt_of({"messages": [system], "tools": [WEATHER]}, "item", chat)
    with GistStore(with_tools.path) as store:
        store.put("parts", replace(store["both"], about=({"prompt_sha256": prompt_digest(prompt)},)))
    assert chat_with_ids(asked("parts", [system, *MESSAGES[:1]], tools=[WEATHER]), with_tools, chat) is not None


def asked(name: str, messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"model": "m", "kv_transfer_params": {"gist": name}, "messages": messages, **more}


@pytest.mark.parametrize(("name", "start"), [("both", [SYSTEM]), ("tools", [])])
def test_a_chat_with_the_tools_that_its_gist_was_made_of(
    with_tools: StoredGists, chat: GistTokenizer, name: str, start: list[dict[str, Any]]
) -> None:
    """The ids are the chat template's, with the gist in place of system message and tools; calls as vLLM reads them."""
    messages = [{"role": "user", "content": "Hi?"}, CALLED_IN_JSON, RETURNED]
    read = [messages[0], CALLED, {**RETURNED, "content": "3"}]
    stock: Any = chat.tokenizer
    for end in (1, 3):
        made = chat_with_ids(asked(name, [*start, *messages[:end]], tools=[WEATHER]), with_tools, chat)
        whole = stock.apply_chat_template(
            [*start, *read[:end]], tools=[WEATHER], add_generation_prompt=True, return_dict=False
        )
        prompt = chat.prompt_with_tools("Be brief." if start else None, [WEATHER])
        number = len(chat.encode_prompts([prompt], 1)[0].chunks[0])
        assert made is not None
        assert made["kv_transfer_params"]["prompt_token_ids"] == [chat.gist_token_id] * 2 + whole[number:]
        assert made["tools"] == [WEATHER]
        assert made["messages"] == [*start, *messages[:end]]
    # In a later turn without the list of tools, their calls are a part of the conversation.
    made = chat_with_ids(asked(name, messages), with_tools, chat)
    assert made is not None
    assert made["kv_transfer_params"]["prompt_token_ids"][2:] == chat.encode_continuations([read])[0]


@pytest.mark.parametrize(
    ("name", "messages", "tools", "message"),
    [
        (
            "tools",
            [SYSTEM, MESSAGES[0]],
            [WEATHER],
            r"gist 'tools' was not made of these tools \(get_weather\) and this s",
        ),
        (
            "both",
            MESSAGES[:1],
            [WEATHER],
            r"was not made of these tools \(get_weather\) without a system message; send",
        ),
        ("three", [SYSTEM, MESSAGES[0]], [WEATHER], "gist 'three' was not made of these tools"),
        (
            "both",
            [SYSTEM, MESSAGES[0]],
            [WEATHER, WEATHER],
            r"these tools \(get_weather, get_weather\) and this system",
        ),
        ("both", MESSAGES[:1], ["get_weather"], "tools cannot come with a gist: tools must be a list"),
        ("both", MESSAGES[:1], [{"function": 7}], r"was not made of these tools \(\?\)"),
        ("both", [{**SYSTEM, "content": 7}], [WEATHER], r"messages\[0\] must be text"),
        ("both", [SYSTEM], [WEATHER], "messages must be a list of at least one message"),
        ("both", [SYSTEM, MESSAGES[0]], None, "is a system message, which the gist replaces"),
        ("both", [MESSAGES[0], CALLED_IN_JSON], None, "must end with one from the user or a tool"),
        (
            "both",
            [SYSTEM, MESSAGES[0], CALLED, RETURNED],
            None,
            r"messages\[0\] must be from the user, the assistant or",
        ),
        (
            "both",
            [
                MESSAGES[0],
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
                RETURNED,
            ],
            None,
            r"messages\[1\]: tool_calls must be a list of functions with a name, and arguments that are an object",
        ),
        (
            "both",
            [MESSAGES[0], {"role": "assistant", "tool_calls": 7}, RETURNED],
            None,
            r"messages\[1\]: tool_calls must",
        ),
    ],
)
def test_other_tools_are_refused_by_name(
    with_tools: StoredGists, chat: GistTokenizer, name: str, messages: list[Any], tools: Any, message: str
) -> None:
    with pytest.raises(GistRefusedError, match=message) as caught:
        chat_with_ids(asked(name, messages, tools=tools), with_tools, chat)
    assert caught.value.status == 400


def test_text_that_the_tokenizer_must_read_as_a_gist_is_refused(tmp_path: Path) -> None:
    own = GistTokenizer(tiny.word_tokenizer(("<GIST>",)), "plain")
    assert own.has_own_gist_token
    with pytest.raises(GistRefusedError, match="the text cannot follow a gist: text 0 contains '<GIST>'"):
        request("a", "w1 <GIST>", tokenizer=own, num_gist_tokens=1)
