"""Text to ids, for every kind of tokenizer, compared with splitting the whole text with a real gist token in it."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gisting.errors import GistError, GistTokenError
from gisting.tokens import TEMPLATES, GistEncoding, GistTokenizer, Template, cut_into_chunks
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
FUZZ = settings(deadline=None, max_examples=40, derandomize=True)

# Nothing between the parts, so that everything a tokenizer does at a boundary shows.
BARE = Template("bare", "{prompt}", "{input}", "", "{output}")
LAYOUTS = [*TEMPLATES.values(), BARE]


# -- tokenizers of every kind, made here -------------------------------------------------------------------------------

CORPUS = [
    "Instruction: Say hello to the world\n",
    "\nInput: the quick brown fox\nOutput: jumps over the lazy dog",
    "hello hello world world, hello the answer is 42.",
    "Translate the sentence into French: good morning",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z A B C 0 1 2 3 4 5 6 7 8 9 < > { } | ▁",
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def starting(token: str, inner: Tokenizer, after: str = "") -> processors.TemplateProcessing:
    names = [name for name in (token, after) if name]
    single = " ".join(name for name in (token, "$A", after) if name)
    return processors.TemplateProcessing(
        single=single, pair=None, special_tokens=[(name, inner.token_to_id(name)) for name in names]
    )


def byte_bpe(*, add_prefix_space: bool = False, start: str = "") -> PreTrainedTokenizerBase:
    """Like GPT-2's, with a start token like LLaMA 3's."""
    return copy.deepcopy(trained_byte_bpe(add_prefix_space, start))


@functools.cache
def trained_byte_bpe(add_prefix_space: bool, start: str) -> PreTrainedTokenizerBase:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS * 4, trainer)
    if start:
        inner.post_processor = starting(start, inner)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)


def unigram() -> PreTrainedTokenizerBase:
    """Like T5's: spaces become part of words, several spaces are one, and ``</s>`` ends every text."""
    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(CORPUS * 4, trainer)
    inner.post_processor = starting("", inner, after="</s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", extra_ids=0
    )


def word_piece() -> PreTrainedTokenizerBase:
    """Like BERT's: lower case, without accents and spaces."""
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    inner.train_from_iterator(CORPUS * 4, trainer)
    inner.post_processor = starting("[CLS]", inner, after="[SEP]")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]"
    )


def stories(shared: Path) -> PreTrainedTokenizerBase:
    """A published LLaMA tokenizer: BPE with byte fallback, and a space before every stretch of text."""
    return AutoTokenizer.from_pretrained(shared / "models" / "stories260K")


def llama(shared: Path, folder: Path) -> PreTrainedTokenizerBase:
    """The SentencePiece model of LLaMA, with a space before the first stretch of text only."""
    shutil.copy(shared / "tokenizers" / "llama-32000.model", folder / "tokenizer.model")
    return LlamaTokenizer.from_pretrained(folder, add_bos_token=True)


def with_real_gist_token(tokenizer: PreTrainedTokenizerBase, token: str = "<GIST>") -> PreTrainedTokenizerBase:
    """A copy with the gist token added, as in the published code."""
    known = copy.deepcopy(tokenizer)
    known.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    return known


@dataclass
class Kind:
    """A tokenizer, and what it puts before and after a text."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    start: tuple[str, ...] = ()
    tail: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Both take long to make from 32,000 tokens, and hypothesis needs them many times.
        self.with_own = functools.cache(lambda: with_real_gist_token(self.tokenizer))
        self.wrapped = functools.cache(self._wrapped)

    def _wrapped(
        self, layout: Template | None = None, *, is_encoder_decoder: bool = False, is_own: bool = False
    ) -> GistTokenizer:
        tokenizer = self.with_own() if is_own else self.tokenizer
        return GistTokenizer(tokenizer, layout, is_encoder_decoder=is_encoder_decoder, reads_special_tokens=True)

    def ids_of(self, tokens: tuple[str, ...]) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(token) for token in tokens]


KINDS: dict[str, Callable[[Path, Path], Kind]] = {
    "byte-bpe": lambda shared, tmp: Kind("byte-bpe", byte_bpe()),
    "byte-bpe-start": lambda shared, tmp: Kind("byte-bpe-start", byte_bpe(start="<s>"), ("<s>",)),
    "byte-bpe-prefix-space": lambda shared, tmp: Kind("byte-bpe-prefix-space", byte_bpe(add_prefix_space=True)),
    "unigram": lambda shared, tmp: Kind("unigram", unigram(), (), ("</s>",)),
    "word-piece": lambda shared, tmp: Kind("word-piece", word_piece(), ("[CLS]",), ("[SEP]",)),
    "word-level": lambda shared, tmp: Kind("word-level", tiny.word_tokenizer()),
    "bytes": lambda shared, tmp: Kind("bytes", ByT5Tokenizer(), (), ("</s>",)),
    "stories": lambda shared, tmp: Kind("stories", stories(shared), ("<s>",)),
    "llama": lambda shared, tmp: Kind("llama", llama(shared, tmp), ("<s>",)),
}
PUBLISHED = {"stories", "llama"}


# The largest vocabulary by far: every copy of its tokenizer takes a second.
PARAMETERS = [pytest.param(name, marks=pytest.mark.slow) if name == "llama" else name for name in KINDS]


@pytest.fixture(scope="module", params=PARAMETERS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    shared = request.getfixturevalue("shared") if request.param in PUBLISHED else Path()
    return KINDS[request.param](shared, tmp_path_factory.mktemp(request.param))


@functools.cache
def bytes_tokenizer() -> PreTrainedTokenizerBase:
    """One id per byte, so decoding gives exactly the text."""
    return ByT5Tokenizer()


MARKER = "\u27e6real gist token\u27e7"


class Together:
    """The slow definition: split the whole text, with k real gist tokens in it, in one call.

    The real token has a name that no test text contains, so that a literal ``<GIST>`` in the text is text.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.joint = with_real_gist_token(kind.tokenizer, MARKER)
        self.marker_id = self.joint.convert_tokens_to_ids(MARKER)

    def __call__(self, before: str, k: int, after: str, gist_id: int, *, has_start: bool = True) -> list[int]:
        ids = list(self.joint(before + MARKER * k + after)["input_ids"])
        start, tail = self.kind.ids_of(self.kind.start), self.kind.ids_of(self.kind.tail)
        assert ids[: len(start)] == start
        assert ids[len(ids) - len(tail) :] == tail
        ids = ids[0 if has_start else len(start) : len(ids) - len(tail)]
        assert ids.count(self.marker_id) == k
        return [gist_id if token == self.marker_id else token for token in ids]


@pytest.fixture(scope="module")
def together(kind: Kind) -> Together:
    return Together(kind)


PIECES = [
    *("hello", "hel", "lo", "world", "the", "w1", "w2", "Instruction:", "Input:", "Output:", "42", ".", "a"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u200b", "\u3000"),
    *("é", "e\u0301", "\u0301", "日本語", "🙂", "👩‍👩‍👧", "ﬁ", "½", "Ａ", "▁", "ß", "İ"),
    *("<s>", "</s>", "{prompt}", "{input}", "{output}", "<", ">", "GIST", "\\", "\0"),
]
texts = st.one_of(
    st.text(max_size=12), st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.just(""), st.just(" ")
).filter(lambda text: "<GIST>" not in text)
prompts = texts.filter(lambda text: text.strip())
literal_texts = st.lists(
    st.sampled_from(["<GIST>", "<GIST> ", " <GIST>", "<GIST>\n", "<gist>", "hello", " ", "\n", "é", "<", ">"]),
    max_size=5,
).map("".join)


# -- apart equals together ---------------------------------------------------------------------------------------------


@given(prompt=prompts, input=texts, k=st.integers(1, 5), layout=st.sampled_from(LAYOUTS))
@example(prompt=" hello ", input=" hello ", k=1, layout=BARE)
@example(prompt="hello\n", input="\nworld", k=2, layout=BARE)
@example(prompt="e", input="\u0301", k=1, layout=BARE)
@FUZZ
def test_prompt_and_continuation_apart_are_the_text_together(
    kind: Kind, together: Together, prompt: str, input: str, k: int, layout: Template
) -> None:
    tokenizer = kind.wrapped(layout)
    encoding = tokenizer.encode(prompt, input, num_gist_tokens=k)
    whole = together(layout.prompt_text(prompt), k, layout.continuation_text(input), tokenizer.gist_token_id)
    assert encoding.input_ids == whole
    start = whole.index(tokenizer.gist_token_id)
    assert encoding == GistEncoding(whole, start, start + k, len(whole))
    assert encoding.num_gist_tokens == k
    (head,) = tokenizer.encode_prompts([prompt], k)
    (middle,) = tokenizer.encode_continuations([input])
    assert head.input_ids + middle == whole
    assert (head.gist_start, head.gist_end, head.completion_start) == (start, start + k, start + k)


@given(prompt=prompts, input=texts, output=texts, layout=st.sampled_from(LAYOUTS))
@example(prompt="x", input="hel", output="lo", layout=BARE)
@example(prompt="x", input="hello", output="\n", layout=TEMPLATES["plain"])
@FUZZ
def test_a_completion_goes_on_from_its_continuation(
    kind: Kind, together: Together, prompt: str, input: str, output: str, layout: Template
) -> None:
    """A completion is split as in the whole text, unless a token would cross the boundary; then it is split separately,
    as the model continues.
    """
    tokenizer = kind.wrapped(layout)
    before = tokenizer.encode(prompt, input)
    encoding = tokenizer.encode(prompt, input, output)
    assert encoding.completion_start == before.completion_start
    assert encoding.input_ids[: encoding.completion_start] == before.input_ids
    completion = encoding.input_ids[encoding.completion_start :]
    assert tokenizer.encode_completions([input], [output]) == [completion]
    assert completion[-1] == kind.tokenizer.eos_token_id

    after = layout.continuation_text(input) + layout.completion_text(output)
    whole = together(layout.prompt_text(prompt), 1, after, tokenizer.gist_token_id)
    if whole[: len(before.input_ids)] == before.input_ids:
        assert encoding.input_ids[:-1] == whole
    else:
        apart = together("", 1, layout.completion_text(output), tokenizer.gist_token_id, has_start=False)
        assert completion[:-1] == apart[1:]


@pytest.mark.parametrize("output", ["answer", "Yes, it is.", "42", "hello world\nhello", "é 🙂"])
@pytest.mark.parametrize("input", ["", "the quick brown fox"], ids=["no-input", "input"])
def test_published_completions_are_the_text_together(kind: Kind, together: Together, input: str, output: str) -> None:
    """Every kind of tokenizer splits ``Output: answer`` as the paper's template expects."""
    tokenizer = kind.wrapped(TEMPLATES["alpaca"])
    text = f"\nInput: {input}\nOutput: {output}" if input else f"\nOutput: {output}"
    whole = together("Instruction: Say hello\n", 3, text, tokenizer.gist_token_id)
    encoding = tokenizer.encode("Say hello", input, output, num_gist_tokens=3)
    assert encoding.input_ids == [*whole, kind.tokenizer.eos_token_id]


def test_a_token_that_would_reach_over_the_boundary_is_split_there() -> None:
    """``hello`` is one token; after the continuation ``hel``, the answer ``lo`` must not change it."""
    tokenizer = GistTokenizer(byte_bpe(), BARE)
    wrapped = tokenizer.tokenizer
    assert len(wrapped("hello")["input_ids"]) == 1
    encoding = tokenizer.encode("x", "hel", "lo")
    assert encoding.input_ids[encoding.gist_end : encoding.completion_start] == wrapped("hel")["input_ids"]
    assert encoding.input_ids[encoding.completion_start :] == [*wrapped("lo")["input_ids"], wrapped.eos_token_id]


@given(rows=st.lists(st.tuples(prompts, texts, texts, st.integers(1, 4)), max_size=5), layout=st.sampled_from(LAYOUTS))
@settings(FUZZ, max_examples=20)
def test_a_batch_is_its_rows_one_by_one(kind: Kind, rows: list[tuple[str, str, str, int]], layout: Template) -> None:
    tokenizer = kind.wrapped(layout)
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[], [], [], []]
    have = tokenizer.encode_batch(*columns[:3], num_gist_tokens=columns[3])
    assert have == [tokenizer.encode(p, i, o, num_gist_tokens=k) for p, i, o, k in rows]
    assert tokenizer.encode_completions(columns[1], columns[2]) == [
        encoding.input_ids[encoding.completion_start :] for encoding in have
    ]


@given(prompt=prompts, input=texts, output=texts)
@settings(FUZZ, max_examples=30)
def test_an_encoder_decoder_writes_its_answer_as_a_text_of_its_own(
    kind: Kind, together: Together, prompt: str, input: str, output: str
) -> None:
    tokenizer = kind.wrapped(is_encoder_decoder=True)
    source = f"\nInput: {input}" if input else ""
    encoding = tokenizer.encode(prompt, input, output, num_gist_tokens=2)
    assert encoding.input_ids[: encoding.completion_start] == together(
        f"Instruction: {prompt}\n", 2, source, tokenizer.gist_token_id
    )
    target = kind.tokenizer(output, add_special_tokens=False)["input_ids"]
    assert encoding.input_ids[encoding.completion_start :] == [*target, kind.tokenizer.eos_token_id]


@pytest.mark.parametrize("k", [1, 2, 5, 10, 63, 64, 111])
def test_spans_of_k_gist_tokens(kind: Kind, k: int) -> None:
    tokenizer = kind.wrapped()
    one, many = (tokenizer.encode("Say hello", "world", "hello", num_gist_tokens=n) for n in (1, k))
    assert many.num_gist_tokens == k
    assert many.input_ids[many.gist_start : many.gist_end] == [tokenizer.gist_token_id] * k
    assert many.input_ids.count(tokenizer.gist_token_id) == k
    assert (many.gist_start, many.completion_start - many.gist_end) == (
        one.gist_start,
        one.completion_start - one.gist_end,
    )
    assert many.input_ids[: many.gist_start] == one.input_ids[: one.gist_start]
    assert many.input_ids[many.gist_end :] == one.input_ids[one.gist_end :]


# -- what a text begins with -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_what_starts_a_text_stands_first_and_only_there(kind: Kind, layout: Template) -> None:
    tokenizer = kind.wrapped(layout)
    start, tail = kind.ids_of(kind.start), kind.ids_of(kind.tail)
    encoding = tokenizer.encode("Say hello", "world", "hello")
    assert encoding.input_ids[: len(start)] == start
    for token in start:
        assert encoding.input_ids.count(token) == 1
    body = encoding.input_ids[:-1]  # the last one is the end of sequence
    for token in {*tail, kind.tokenizer.eos_token_id}:
        assert token not in body


def test_a_layout_that_spells_its_own_start_gets_no_second_one() -> None:
    layout = Template("own", "<s>{prompt}", "{input}", "", "{output}", add_special_tokens=False)
    tokenizer = GistTokenizer(byte_bpe(start="<s>"), layout)
    start = tokenizer.tokenizer.bos_token_id
    ids = tokenizer.encode("hello", "world").input_ids
    assert (ids[0], ids.count(start)) == (start, 1)


def test_the_start_is_found_where_the_vocabulary_lacks_the_letter_a() -> None:
    inner = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "hello": 2}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = starting("<s>", inner)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    assert wrapped("hello")["input_ids"] == [0, 2]
    assert GistTokenizer(wrapped, BARE).encode("hello").input_ids == [0, 2, 3]


# -- the literal in a text is text -------------------------------------------------------------------------------------


@given(
    prompt=literal_texts.filter(lambda text: text.strip()),
    input=literal_texts,
    output=literal_texts,
    layout=st.sampled_from(LAYOUTS),
)
@example(prompt="<GIST>", input="<GIST>", output="<GIST>", layout=BARE)
@example(prompt="<GIST>", input="<GIST>", output="<GIST>", layout=TEMPLATES["alpaca"])
@pytest.mark.parametrize("is_own", [False, True], ids=["new-token", "own-token"])
@FUZZ
def test_the_literal_is_text(
    kind: Kind, together: Together, is_own: bool, prompt: str, input: str, output: str, layout: Template
) -> None:
    """It is split as without a gist token, even by a published checkpoint's tokenizer, which has one."""
    tokenizer = kind.wrapped(layout, is_own=is_own)
    assert tokenizer.has_own_gist_token == is_own
    gist_id = tokenizer.gist_token_id
    assert gist_id == len(kind.tokenizer)
    if is_own and not kind.tokenizer.is_fast and "<GIST>" in prompt + input + output:
        # A tokenizer written in Python cannot forget a token: the text is refused, never misread.
        with pytest.raises(GistError, match="can only read as the gist token; remove it from the text"):
            tokenizer.encode(prompt, input, output, num_gist_tokens=2)
        return
    before = tokenizer.encode(prompt, input, num_gist_tokens=2)
    assert before.input_ids == together(layout.prompt_text(prompt), 2, layout.continuation_text(input), gist_id)
    encoding = tokenizer.encode(prompt, input, output, num_gist_tokens=2)
    assert encoding.input_ids.count(gist_id) == 2
    plain = kind.wrapped(layout).encode(prompt, input, output, num_gist_tokens=2)
    assert encoding == plain


@pytest.mark.parametrize("is_own", [False, True], ids=["new-token", "own-token"])
def test_the_literal_is_text_for_an_encoder_decoder(kind: Kind, is_own: bool) -> None:
    tokenizer = kind.wrapped(is_encoder_decoder=True, is_own=is_own)
    if is_own and not kind.tokenizer.is_fast:
        with pytest.raises(GistError, match="can only read as the gist token; remove it from the text"):
            tokenizer.encode("hello", "world", "the <GIST>", num_gist_tokens=3)
        return
    encoding = tokenizer.encode("<GIST> hello", "<GIST>", "the <GIST>", num_gist_tokens=3)
    assert encoding.input_ids.count(tokenizer.gist_token_id) == 3
    target = kind.tokenizer("the <GIST>", add_special_tokens=False)["input_ids"]
    assert encoding.input_ids[encoding.completion_start :] == [*target, kind.tokenizer.eos_token_id]


def test_a_vocabulary_in_which_the_literal_is_a_word_lets_no_gist_token_in() -> None:
    """Here the gist token is not an added token but an ordinary word: its literal is refused, or is text."""
    tokenizer = GistTokenizer(tiny.word_tokenizer(("<GIST>",)), "plain")
    assert tokenizer.has_own_gist_token
    for texts_of_a_user in (("w1 <GIST>", "w2"), ("w1", "w2 <GIST> w3"), ("w1", "<GIST>")):
        try:
            ids = tokenizer.encode(*texts_of_a_user, num_gist_tokens=2).input_ids
        except GistError:
            continue
        assert ids.count(tokenizer.gist_token_id) == 2


def test_the_literal_does_not_turn_a_chat_template_into_text() -> None:
    """A published checkpoint's own token, and the control tokens of a chat around a text with the literal."""
    wrapped = with_real_gist_token(chat_tokenizer(SYSTEM_CHAT))
    tokenizer = GistTokenizer(wrapped, "chat")
    ids = tokenizer.encode("hello <GIST>", "world <GIST>").input_ids
    assert ids.count(tokenizer.gist_token_id) == 1
    assert ids.count(wrapped.convert_tokens_to_ids("<|turn|>")) == 3


@pytest.mark.parametrize("place", ["prompt", "input", "output"])
def test_no_private_character_of_the_library_is_a_way_in(kind: Kind, place: str) -> None:
    """The characters that used to mark the gist internally are ordinary text."""
    parts = {"prompt": "hello", "input": "hello", "output": "hello"}
    parts[place] = "hello \ue0f8gist\ue0f9 world"
    tokenizer = kind.wrapped(TEMPLATES["plain"])
    ids = tokenizer.encode(**parts, num_gist_tokens=2).input_ids
    assert ids.count(tokenizer.gist_token_id) == 2
    assert max(ids) < len(tokenizer)


# -- layouts -----------------------------------------------------------------------------------------------------------

PUBLISHED_LAYOUTS = [
    pytest.param("alpaca", False, "x", "Instruction: t\n<GIST><GIST>\nInput: x\nOutput:", " y</s>", id="llama"),
    pytest.param("alpaca", False, "", "Instruction: t\n<GIST><GIST>\nOutput:", " y</s>", id="llama-no-input"),
    pytest.param("alpaca-t5", True, "x", "Instruction: t\n<GIST><GIST>\nInput: x", "y</s>", id="t5"),
    pytest.param("alpaca-t5", True, "", "Instruction: t\n<GIST><GIST>", "y</s>", id="t5-no-input"),
    pytest.param("plain", False, "x", "t\n<GIST><GIST>\nx\n", "y</s>", id="plain"),
    pytest.param("plain", False, "", "t\n<GIST><GIST>\n", "y</s>", id="plain-no-input"),
    pytest.param(None, False, "x", "Instruction: t\n<GIST><GIST>\nInput: x\nOutput:", " y</s>", id="default"),
    pytest.param(None, True, "x", "Instruction: t\n<GIST><GIST>\nInput: x", "y</s>", id="default-encoder-decoder"),
    pytest.param(
        Template("user", "System: {prompt}.", " User: {input}?", " Go on.", " -> {output}!"),
        False,
        "x",
        "System: t.<GIST><GIST> User: x?",
        " -> y!</s>",
        id="user",
    ),
]


@pytest.mark.parametrize(("layout", "is_encoder_decoder", "input", "text", "completion"), PUBLISHED_LAYOUTS)
def test_layouts_to_the_byte(
    layout: str | Template | None, is_encoder_decoder: bool, input: str, text: str, completion: str
) -> None:
    """T5's source ends without the ``</s>`` that its tokenizer would put there."""
    tokenizer = GistTokenizer(bytes_tokenizer(), layout, is_encoder_decoder=is_encoder_decoder)
    encoding = tokenizer.encode("t", input, "y", num_gist_tokens=2)
    source, target = (
        encoding.input_ids[: encoding.completion_start],
        encoding.input_ids[encoding.completion_start :],
    )
    assert tokenizer.decode(source, skip_special_tokens=False) == text
    assert tokenizer.decode(target, skip_special_tokens=False) == completion


def test_a_text_may_hold_the_placeholders() -> None:
    tokenizer = GistTokenizer(bytes_tokenizer(), "alpaca")
    ids = tokenizer.encode("{prompt} {input} {output}", "{prompt} {input}", "{output}{prompt}").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "Instruction: {prompt} {input} {output}\n<GIST>\nInput: {prompt} {input}\nOutput: {output}{prompt}</s>"
    )


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("prompt", "no placeholder"),
        ("prompt", "{prompt} {prompt}"),
        ("continuation", "{inputs}"),
        ("continuation", "{input}{input}"),
        ("completion", ""),
        ("completion", "{output}{output}"),
    ],
)
def test_a_layout_holds_each_placeholder_once(field: str, text: str) -> None:
    fields = {"prompt": "{prompt}", "continuation": "{input}", "completion": "{output}", field: text}
    placeholder = {"prompt": "{prompt}", "continuation": "{input}", "completion": "{output}"}[field]
    with pytest.raises(GistError) as caught:
        Template("mine", continuation_without_input="", **fields)
    assert str(caught.value) == f"template 'mine': {field} must contain {placeholder} exactly once, got {text!r}"


# -- chat templates ----------------------------------------------------------------------------------------------------

SYSTEM_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
NO_SYSTEM_CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|turn|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
WRONG_ORDER_CHAT = "{% for m in messages | reverse %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TWICE_CHAT = "{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}"
INPUT_TWICE_CHAT = "{{ messages[0].content }} {{ messages[1].content }} {{ messages[1].content }}"
DROPPED_CHAT = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"


def chat_tokenizer(template: str) -> PreTrainedTokenizerBase:
    wrapped = byte_bpe(start="<s>")
    wrapped.add_tokens([AddedToken(token, special=True) for token in ("<|turn|>", "<|end|>")], special_tokens=True)
    wrapped.chat_template = template
    return wrapped


CHATS = [
    pytest.param(
        SYSTEM_CHAT,
        "Say hello",
        "world",
        "<s><|turn|>system\nSay hello<GIST><|end|>\n<|turn|>user\nworld<|end|>\n<|turn|>assistant\n",
        id="system-role",
    ),
    pytest.param(
        SYSTEM_CHAT,
        "Say hello",
        "",
        "<s><|turn|>system\nSay hello<GIST><|end|>\n<|turn|>user\n<|end|>\n<|turn|>assistant\n",
        id="system-role-no-input",
    ),
    pytest.param(
        NO_SYSTEM_CHAT,
        "Say hello",
        "world",
        "<s><|turn|>user\nSay hello<GIST>\n\nworld<|end|>\n<|turn|>model\n",
        id="no-system-role",
    ),
]


@pytest.mark.parametrize(("template", "prompt", "input", "text"), CHATS)
def test_chat_layouts(template: str, prompt: str, input: str, text: str) -> None:
    """The gist follows the prompt; ``<s>`` comes once, from the template, which also ends the answer."""
    tokenizer = GistTokenizer(chat_tokenizer(template), "chat")
    encoding = tokenizer.encode(prompt, input, "hello!")
    source = encoding.input_ids[: encoding.completion_start]
    assert tokenizer.decode(source, skip_special_tokens=False) == text
    assert encoding.input_ids.count(tokenizer.tokenizer.bos_token_id) == 1
    completion = encoding.input_ids[encoding.completion_start :]
    assert tokenizer.decode(completion, skip_special_tokens=False) == "hello!<|end|>"
    assert tokenizer.template.name == "chat"


def test_a_chat_is_what_the_tokenizer_itself_makes_of_the_messages() -> None:
    wrapped = chat_tokenizer(SYSTEM_CHAT)
    messages = [{"role": "system", "content": "Say hello"}, {"role": "user", "content": "the world"}]
    stock = wrapped.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    tokenizer = GistTokenizer(wrapped, "chat")
    ids = tokenizer.encode("Say hello", "the world").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=False).replace("<GIST>", "") == stock


@given(prompt=prompts, input=texts, k=st.integers(1, 3))
@pytest.mark.parametrize("template", [SYSTEM_CHAT, NO_SYSTEM_CHAT], ids=["system-role", "no-system-role"])
@settings(FUZZ, max_examples=30)
def test_a_chat_apart_is_the_chat_together(template: str, prompt: str, input: str, k: int) -> None:
    tokenizer = cached_chat(template)
    layout = tokenizer.template
    joint = Together(Kind("chat", tokenizer.tokenizer, ("<s>",)))
    whole = joint(
        layout.prompt_text(prompt), k, layout.continuation_text(input), tokenizer.gist_token_id, has_start=False
    )
    assert tokenizer.encode(prompt, input, num_gist_tokens=k).input_ids == whole


@functools.cache
def cached_chat(template: str) -> GistTokenizer:
    return GistTokenizer(chat_tokenizer(template), "chat", reads_special_tokens=True)


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(WRONG_ORDER_CHAT, id="wrong-order"),
        pytest.param(TWICE_CHAT, id="prompt-twice"),
        pytest.param(INPUT_TWICE_CHAT, id="input-twice"),
        pytest.param(DROPPED_CHAT, id="system-message-dropped"),
    ],
)
def test_a_chat_template_that_cannot_be_split_is_refused(template: str) -> None:
    with pytest.raises(GistError) as caught:
        GistTokenizer(chat_tokenizer(template), "chat")
    reason = "it does not write every message once, unchanged and in order"
    assert str(caught.value).startswith(
        f"the tokenizer's chat template cannot be followed: with the prompt as the system message, {reason}; as the "
        "beginning of the user's message, "
    )


def test_chat_needs_a_chat_template() -> None:
    with pytest.raises(GistError) as caught:
        GistTokenizer(bytes_tokenizer(), "chat")
    assert str(caught.value) == (
        "template='chat' needs a tokenizer with a chat template, ByT5Tokenizer has none; "
        "use one of alpaca, alpaca-t5, plain or a Template"
    )


# -- errors ------------------------------------------------------------------------------------------------------------

EMPTY = "prompt {} is empty; there is nothing to compress, give its text"
ERRORS: list[Any] = [
    pytest.param(lambda t: t.encode(""), EMPTY.format(0), id="prompt-empty"),
    pytest.param(lambda t: t.encode(" \n\t"), EMPTY.format(0), id="prompt-blank"),
    pytest.param(lambda t: t.encode_prompts(["a", "", ""], 1), EMPTY.format(1), id="second-prompt-empty"),
    pytest.param(
        lambda t: t.encode("a", num_gist_tokens=0),
        "num_gist_tokens must be at least 1, got 0; 1 to 10 is usual",
        id="k-0",
    ),
    pytest.param(
        lambda t: t.encode_prompts(["a", "b"], [1, -3]),
        "num_gist_tokens must be at least 1, got -3; 1 to 10 is usual",
        id="k-negative",
    ),
    pytest.param(
        lambda t: t.encode_prompts(["a", "b"], [1]),
        "num_gist_tokens must be one number or one for each of 2 prompts, got 1",
        id="k-too-few",
    ),
    pytest.param(
        lambda t: t.encode_prompts("a text", 1),
        "prompts must be a list of texts, got one text; put it in a list",
        id="prompts-one-text",
    ),
    pytest.param(
        lambda t: t.encode_continuations("a text"),
        "inputs must be a list of texts, got one text; put it in a list",
        id="inputs-one-text",
    ),
    pytest.param(
        lambda t: t.encode_completions(["a"], "a"),
        "outputs must be a list of texts, got one text; put it in a list",
        id="outputs-one-text",
    ),
    pytest.param(lambda t: t.encode_prompts(["a", 7], 1), "prompts[1] must be a text, got int", id="prompt-no-text"),
    pytest.param(
        lambda t: t.encode("a", None),
        "inputs[0] must be a text, or a list of messages, got NoneType",
        id="input-no-text",
    ),
    pytest.param(
        lambda t: t.encode_batch(["a"], ["b"], [b"c"]), "outputs[0] must be a text, got bytes", id="output-no-text"
    ),
    pytest.param(
        lambda t: t.encode_batch(["a", "b"], ["c"]),
        "there must be as many inputs and outputs as prompts, 2, got 1 and none",
        id="inputs-too-few",
    ),
    pytest.param(
        lambda t: t.encode_batch(["a"], ["b"], ["c", "d"]),
        "there must be as many inputs and outputs as prompts, 1, got 1 and 2",
        id="outputs-too-many",
    ),
    pytest.param(
        lambda t: t.encode_completions(["a", "b"], ["c"]),
        "there must be as many outputs as inputs, 2, got 1",
        id="completions-too-few",
    ),
    pytest.param(
        lambda t: GistTokenizer(t.tokenizer, "alpacca"),
        "template must be one of alpaca, alpaca-t5, plain, chat or a Template, got 'alpacca'",
        id="template-unknown",
    ),
    pytest.param(
        lambda t: GistTokenizer(t),
        "tokenizer is a GistTokenizer already; pass the tokenizer it wraps, .tokenizer",
        id="wrapped-twice",
    ),
    pytest.param(
        lambda t: GistTokenizer(t.tokenizer, gist_token_id=7),
        "gist_token_id 7 is already a token of the tokenizer, which has 384 tokens: "
        "some were added after the gist token; use the tokenizer without them",
        id="gist-token-id-taken",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors(call: Callable[[GistTokenizer], object], message: str) -> None:
    with pytest.raises(GistError) as caught:
        call(GistTokenizer(bytes_tokenizer()))
    assert str(caught.value) == message


def test_k_below_1_is_an_error_about_gist_tokens() -> None:
    with pytest.raises(GistTokenError):
        GistTokenizer(bytes_tokenizer()).encode("a", num_gist_tokens=0)


def test_a_k_that_is_no_number_is_named() -> None:
    with pytest.raises(GistError, match="num_gist_tokens must be"):
        GistTokenizer(bytes_tokenizer()).encode_prompts(["a"], 1.5)


def test_an_end_of_sequence_is_needed_where_an_answer_ends() -> None:
    inner = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = GistTokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"))
    tokenizer.encode("a", "a")
    for call in (
        lambda: tokenizer.encode("a", "a", "a"),
        lambda: tokenizer.eos_token_id,
        lambda: tokenizer.pad_token_id,
    ):
        with pytest.raises(GistError) as caught:
            call()
        assert str(caught.value) == (
            "the tokenizer has no eos_token; set tokenizer.eos_token to the token that ends an answer"
        )


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_encoding_does_not_list_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing 32,000 tokens takes 8 ms, a hundred times what it takes to split a prompt."""
    wrapped = byte_bpe()
    tokenizer = GistTokenizer(wrapped)
    tokenizer.encode("hello", "world", "hello")
    calls: list[str] = []
    listed = wrapped.get_vocab
    monkeypatch.setattr(wrapped, "get_vocab", lambda: calls.append("get_vocab") or listed())
    tokenizer.encode("hello", "world", "hello")
    tokenizer.encode_continuations(["world"])
    assert calls == []


# -- ids and names -----------------------------------------------------------------------------------------------------


def test_the_gist_token_takes_the_first_free_id(kind: Kind) -> None:
    tokenizer = GistTokenizer(kind.tokenizer)
    assert tokenizer.gist_token_id == len(kind.tokenizer)
    assert len(tokenizer) == len(kind.tokenizer) + 1
    assert not tokenizer.has_own_gist_token


def test_the_gist_token_takes_no_id_of_a_vocabulary_with_holes() -> None:
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 10, "<unk>": 3}, unk_token="<unk>"))
    tokenizer = GistTokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"))
    assert (tokenizer.gist_token_id, len(tokenizer)) == (11, 12)


def test_a_later_free_id_may_be_chosen() -> None:
    """A checkpoint whose embedding is padded to a round number."""
    tokenizer = GistTokenizer(bytes_tokenizer(), gist_token_id=511)
    assert len(tokenizer) == 512
    assert tokenizer.encode("a", num_gist_tokens=2).input_ids.count(511) == 2


def test_a_published_checkpoint_keeps_its_own_gist_token(kind: Kind) -> None:
    """The published code adds ``<GIST>`` last; the ids equal those without it."""
    own = GistTokenizer(with_real_gist_token(kind.tokenizer))
    assert own.has_own_gist_token
    assert (own.gist_token_id, len(own)) == (len(kind.tokenizer), len(kind.tokenizer) + 1)
    new = GistTokenizer(kind.tokenizer)
    assert own.encode("Say hello", "world", "hello", num_gist_tokens=3) == new.encode(
        "Say hello", "world", "hello", num_gist_tokens=3
    )


def test_tokens_added_before_the_gist_token_are_known() -> None:
    wrapped = byte_bpe()
    wrapped.add_tokens(["w1"])
    tokenizer = GistTokenizer(wrapped)
    assert tokenizer.gist_token_id == len(wrapped)
    assert wrapped.convert_tokens_to_ids("w1") in tokenizer.encode("say w1 now").input_ids


def test_tokens_added_after_the_gist_token_are_refused_on_loading(tmp_path: Path) -> None:
    GistTokenizer(byte_bpe()).save_pretrained(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    gist_id = len(stock)
    stock.add_tokens(["<late>"])
    stock.save_pretrained(tmp_path)
    with pytest.raises(GistError) as caught:
        GistTokenizer.from_pretrained(tmp_path)
    assert str(caught.value) == (
        f"gist_token_id {gist_id} is already a token of the tokenizer, which has {gist_id + 1} tokens: "
        "some were added after the gist token; use the tokenizer without them"
    )


@pytest.mark.parametrize("is_used_before", [False, True], ids=["before-first-use", "after-first-use"])
def test_a_token_added_to_the_wrapped_tokenizer_takes_no_gist_id(is_used_before: bool) -> None:
    """Its id would be the gist's: it is refused, or no text becomes a gist token."""
    tokenizer = GistTokenizer(byte_bpe(), "plain")
    if is_used_before:
        tokenizer.encode("hello", "world")
    tokenizer.tokenizer.add_tokens(["<late>"])
    with pytest.raises(GistError, match=r"^the tokenizer had \d+ tokens when it was wrapped, now it has \d+; wrap it"):
        tokenizer.encode("hello <late>", "world <late>", "<late>")


def test_padding_is_the_end_of_sequence_where_there_is_none() -> None:
    wrapped = byte_bpe()
    assert GistTokenizer(wrapped).pad_token_id == wrapped.convert_tokens_to_ids("<pad>")
    wrapped.pad_token = None
    assert GistTokenizer(wrapped).pad_token_id == wrapped.eos_token_id


def test_how_it_is_shown() -> None:
    assert repr(GistTokenizer(bytes_tokenizer())) == (
        "GistTokenizer(ByT5Tokenizer, template='alpaca', gist_token='<GIST>', gist_token_id=384)"
    )


# -- back to text ------------------------------------------------------------------------------------------------------


def test_decode_shows_or_skips_the_gist() -> None:
    tokenizer = GistTokenizer(bytes_tokenizer(), "plain")
    ids = tokenizer.encode("hello", "world", "é", num_gist_tokens=2).input_ids
    assert tokenizer.decode(ids) == "hello\n\nworld\né"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hello\n<GIST><GIST>\nworld\né</s>"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([tokenizer.gist_token_id]) == ""
    assert tokenizer.decode([tokenizer.gist_token_id], skip_special_tokens=False) == "<GIST>"


def test_decode_shows_the_gist_by_its_name() -> None:
    tokenizer = GistTokenizer(bytes_tokenizer(), "plain", gist_token="[G]")
    assert tokenizer.decode(tokenizer.encode("a", "b").input_ids, skip_special_tokens=False) == "a\n[G]\nb\n"


@pytest.mark.parametrize("is_own", [False, True], ids=["new-token", "own-token"])
def test_decode_for_every_kind(kind: Kind, is_own: bool) -> None:
    tokenizer = kind.wrapped(is_own=is_own)
    ids = tokenizer.encode("a b", "c d", "e", num_gist_tokens=3).input_ids
    shown, hidden = tokenizer.decode(ids, skip_special_tokens=False), tokenizer.decode(ids)
    assert shown.count("<GIST>") == 3
    assert "<GIST>" not in hidden
    if kind.name != "word-level":  # none of these words are in its vocabulary
        assert "".join(hidden.lower().split()) == "instruction:abinput:cdoutput:e"


@given(output=texts.filter(lambda text: "<s>" not in text and "</s>" not in text))
@FUZZ
def test_decoding_an_answer_gives_its_text_to_the_byte(output: str) -> None:
    for tokenizer in lossless():
        (ids,) = tokenizer.encode_completions(["x"], [output])
        assert tokenizer.decode(ids) == output


@functools.cache
def lossless() -> tuple[GistTokenizer, ...]:
    return GistTokenizer(bytes_tokenizer(), "plain"), GistTokenizer(byte_bpe(), "plain")


@pytest.mark.parametrize(("line", "span"), [("1 G G 2", (1, 3)), ("G 1 2", (0, 1)), ("1 2 3 G", (3, 4))])
def test_the_gist_of_ids_from_elsewhere_is_located(line: str, span: tuple[int, int]) -> None:
    tokenizer = GistTokenizer(tiny.word_tokenizer(), "plain")
    ids = [tokenizer.gist_token_id if word == "G" else int(word) for word in line.split()]
    found = tokenizer.locate(ids)
    assert (found.gist_start, found.gist_end) == span
    assert found.input_ids == ids


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 2 3", r"input_ids contain no gist token \(id 64\); put num_gist_tokens >= 1 of them between"),
        ("1 G 2 G", r"input_ids contain 2 gist tokens between 1 and 4 with other ids in between; the gist tokens"),
        ("G G 1 G 2", r"input_ids contain 3 gist tokens between 0 and 4"),
    ],
    ids=["no-gist", "apart", "three-apart"],
)
def test_gist_tokens_missing_or_apart(line: str, message: str) -> None:
    tokenizer = GistTokenizer(tiny.word_tokenizer(), "plain")
    ids = [tokenizer.gist_token_id if word == "G" else int(word) for word in line.split()]
    with pytest.raises(GistTokenError, match=message):
        tokenizer.locate(ids)


# -- long prompts in chunks --------------------------------------------------------------------------------------------


@given(length=st.integers(0, 300), chunk_length=st.integers(1, 80))
@example(length=0, chunk_length=5)
@example(length=80, chunk_length=80)
@example(length=81, chunk_length=80)
@settings(FUZZ, max_examples=200)
def test_chunks_hold_all_ids_in_order_and_differ_by_one_at_most(length: int, chunk_length: int) -> None:
    chunks = cut_into_chunks(range(length), chunk_length)
    assert [token for chunk in chunks for token in chunk] == list(range(length))
    assert len(chunks) == max(1, math.ceil(length / chunk_length))
    sizes = [len(chunk) for chunk in chunks]
    assert max(sizes) <= chunk_length
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert cut_into_chunks(range(length), None) == [list(range(length))]


@given(
    prompt=prompts,
    input=texts,
    output=texts,
    k=st.integers(1, 4),
    length=st.integers(1, 12),
    layout=st.sampled_from(LAYOUTS),
)
@settings(FUZZ, max_examples=30)
def test_a_gist_stands_behind_each_chunk(
    kind: Kind, prompt: str, input: str, output: str, k: int, length: int, layout: Template
) -> None:
    tokenizer = kind.wrapped(layout)
    whole = tokenizer.encode(prompt, input, output, num_gist_tokens=k)
    encoding = tokenizer.encode(prompt, input, output, num_gist_tokens=k, chunk_length=length)
    chunks = cut_into_chunks(whole.input_ids[: whole.gist_start], length)
    assert encoding.chunks == chunks
    before = [token for chunk in chunks for token in chunk + [tokenizer.gist_token_id] * k]
    assert encoding.input_ids == before + whole.input_ids[whole.gist_end :]
    assert encoding.num_gist_tokens == k * len(chunks)
    assert encoding.num_prompt_tokens == whole.num_prompt_tokens == whole.gist_start
    assert (encoding.gist_start, encoding.gist_end) == (len(chunks[0]), len(before))
    assert encoding.completion_start - encoding.gist_end == whole.completion_start - whole.gist_end
    assert all(encoding.input_ids[start:end] == [tokenizer.gist_token_id] * k for start, end in encoding.gist_spans)
    located = tokenizer.locate(encoding.input_ids[: encoding.completion_start], is_chunked=True)
    assert (located.gist_spans, located.chunks) == (encoding.gist_spans, chunks)
    if len(chunks) == 1:
        assert encoding == whole


def test_chunks_by_eye() -> None:
    """Seven ids in chunks of at most three: 3, 2 and 2."""
    tokenizer = GistTokenizer(tiny.word_tokenizer(), BARE)
    encoding = tokenizer.encode("w1 w2 w3 w4 w5 w6 w7", "w8", "w9", num_gist_tokens=2, chunk_length=3)
    names = {tokenizer.gist_token_id: "G", 2: "$"} | {number + 4: str(number) for number in range(60)}
    assert " ".join(names[token] for token in encoding.input_ids) == "1 2 3 G G 4 5 G G 6 7 G G 8 9 $"
    assert encoding == GistEncoding(encoding.input_ids, 3, 13, 14, ((3, 5), (7, 9), (11, 13)))
    assert (encoding.num_gist_tokens, encoding.num_prompt_tokens) == (6, 7)


def test_start_ids_are_part_of_the_first_chunk() -> None:
    inner = tiny.word_tokenizer()
    inner.backend_tokenizer.post_processor = starting("<s>", inner.backend_tokenizer)
    tokenizer = GistTokenizer(inner, BARE)
    assert tokenizer.start_ids == [1]
    (encoding,) = tokenizer.encode_prompts(["w1 w2 w3"], 1, 2)
    assert encoding.chunks == [[1, 5], [6, 7]]
    (alone,) = tokenizer.encode_prompts(["w1"], 1, 2)
    assert alone.chunks == [[1, 5]]
    assert tokenizer.encode_texts(["w1", ""]) == [[5], []]


def test_gists_of_several_lengths_are_no_chunks() -> None:
    tokenizer = GistTokenizer(tiny.word_tokenizer(), "plain")
    with pytest.raises(GistTokenError, match=r"input_ids contain gists of 2, 1 tokens; a prompt must have"):
        tokenizer.locate([5, 64, 64, 6, 64, 7], is_chunked=True)


def test_texts_must_be_texts() -> None:
    tokenizer = GistTokenizer(tiny.word_tokenizer(), "plain")
    with pytest.raises(GistError, match="texts must be a list of texts, got one text"):
        tokenizer.encode_texts("w1")
    with pytest.raises(GistError, match=r"texts\[1\] must be a text, got int"):
        tokenizer.encode_texts(["w1", 2])  # pyright: ignore[reportArgumentType]


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_own", [False, True], ids=["new-token", "own-token"])
def test_saved_and_loaded_it_is_the_same(kind: Kind, is_own: bool, tmp_path: Path) -> None:
    wrapped = with_real_gist_token(kind.tokenizer) if is_own else kind.tokenizer
    layout = Template("mine", "Do: {prompt}\n", "\nWith: {input}\n", "\n", "{output}")
    tokenizer = GistTokenizer(wrapped, layout, is_encoder_decoder=kind.name == "unigram")
    tokenizer.save_pretrained(tmp_path)
    loaded = GistTokenizer.from_pretrained(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.template == layout
    assert (loaded.gist_token, loaded.gist_token_id, len(loaded), loaded.is_encoder_decoder) == (
        tokenizer.gist_token,
        tokenizer.gist_token_id,
        len(tokenizer),
        tokenizer.is_encoder_decoder,
    )
    literal = () if is_own and not kind.tokenizer.is_fast else (" <GIST> ",)
    for text in ("hello world", "é 🙂\n", *literal, "▁ {input}"):
        have, expected = (t.encode(text, text, text, num_gist_tokens=2) for t in (loaded, tokenizer))
        assert have == expected
        assert loaded.decode(have.input_ids) == tokenizer.decode(have.input_ids)


@pytest.mark.parametrize("template", ["alpaca", "alpaca-t5", "plain", "chat"])
def test_every_layout_is_saved(template: str, tmp_path: Path) -> None:
    tokenizer = GistTokenizer(chat_tokenizer(SYSTEM_CHAT), template, gist_token="[G]", gist_token_id=1000)
    tokenizer.save_pretrained(tmp_path)
    GistTokenizer.from_pretrained(str(tmp_path)).save_pretrained(tmp_path / "again")
    loaded = GistTokenizer.from_pretrained(tmp_path / "again")
    assert loaded.template == tokenizer.template
    assert (loaded.gist_token, loaded.gist_token_id) == ("[G]", 1000)
    assert loaded.fingerprint == tokenizer.fingerprint


def test_what_is_saved_beside_the_tokenizer(tmp_path: Path) -> None:
    GistTokenizer(bytes_tokenizer(), "plain").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "gist.json").read_text("utf-8")) == {
        "format": 1,
        "gist_token": "<GIST>",
        "gist_token_id": 384,
        "is_encoder_decoder": False,
        "template": {
            "name": "plain",
            "prompt": "{prompt}\n",
            "continuation": "\n{input}\n",
            "continuation_without_input": "\n",
            "completion": "{output}",
            "add_special_tokens": True,
        },
    }


def test_stock_transformers_reads_the_directory_and_knows_no_gist_token(kind: Kind, tmp_path: Path) -> None:
    """So no text can put a gist token into another program that serves the checkpoint."""
    tokenizer = GistTokenizer(kind.tokenizer)
    tokenizer.save_pretrained(tmp_path)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert len(stock) == len(kind.tokenizer)
    assert "<GIST>" not in stock.get_vocab()
    ids = stock("hello <GIST> world <GIST>")["input_ids"]
    assert tokenizer.gist_token_id not in ids
    assert ids == kind.tokenizer("hello <GIST> world <GIST>")["input_ids"]


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    GistTokenizer(bytes_tokenizer()).save_pretrained(tmp_path)
    path = tmp_path / "gist.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "format": 2}), "utf-8")
    with pytest.raises(GistError) as caught:
        GistTokenizer.from_pretrained(tmp_path)
    assert str(caught.value) == (
        f"{path} has format 2, this version reads 1; upgrade gisting: pip install -U gist-tokens"
    )


def test_a_directory_without_gist_json_is_refused(tmp_path: Path) -> None:
    bytes_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(GistError) as caught:
        GistTokenizer.from_pretrained(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} has no gist.json, so it is not a saved GistTokenizer; "
        "wrap the tokenizer instead: GistTokenizer(AutoTokenizer.from_pretrained(...))"
    )


# -- what it is known by -----------------------------------------------------------------------------------------------


def test_the_fingerprint_is_twelve_hex_digits_and_follows_what_a_text_means() -> None:
    def smaller() -> PreTrainedTokenizerBase:
        wrapped = tiny.word_tokenizer()
        wrapped.add_tokens(["w60"])
        return wrapped

    def lower_case() -> PreTrainedTokenizerBase:
        wrapped = tiny.word_tokenizer()
        wrapped.backend_tokenizer.normalizer = normalizers.Lowercase()
        return wrapped

    other_layout = Template("plain", "{prompt}", "\n{input}\n", "\n", "{output}")
    all_different = [
        GistTokenizer(tiny.word_tokenizer(), "plain"),
        GistTokenizer(tiny.word_tokenizer(), "alpaca"),
        GistTokenizer(tiny.word_tokenizer(), other_layout),
        GistTokenizer(tiny.word_tokenizer(), "plain", is_encoder_decoder=True),
        GistTokenizer(tiny.word_tokenizer(), "plain", gist_token_id=100),
        GistTokenizer(tiny.word_tokenizer(("x",)), "plain"),
        GistTokenizer(smaller(), "plain"),
        GistTokenizer(lower_case(), "plain"),
        GistTokenizer(ByT5Tokenizer(), "plain"),
        GistTokenizer(ByT5Tokenizer(extra_ids=10), "plain"),
    ]
    prints = [tokenizer.fingerprint for tokenizer in all_different]
    assert len(set(prints)) == len(prints)
    for digits in prints:
        assert len(digits) == 12
        assert int(digits, 16) >= 0


@pytest.mark.slow
def test_the_fingerprint_is_the_same_in_every_process() -> None:
    """The fingerprint uses no salted hash and no order of a set."""
    script = (
        "from transformers import ByT5Tokenizer; from gisting.tokens import GistTokenizer; from tests import tiny\n"
        "for t in (ByT5Tokenizer(), tiny.word_tokenizer()): print(GistTokenizer(t).fingerprint)"
    )
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "kernels"))
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": paths}
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    here = [GistTokenizer(t).fingerprint for t in (ByT5Tokenizer(), tiny.word_tokenizer())]
    assert ran.stdout.split() == here


def test_padding_and_truncating_calls_change_nothing(kind: Kind) -> None:
    """A fast tokenizer remembers its last call, but fingerprint and ids depend only on the text."""
    expected = kind.wrapped()
    touched = copy.deepcopy(kind.tokenizer)
    touched.pad_token = touched.pad_token or touched.eos_token
    touched("hello world " * 20, truncation=True, max_length=5)
    touched(["hello", "hello world"], padding="max_length", max_length=63, truncation=True)
    tokenizer = GistTokenizer(touched)
    long = "hello world " * 30
    assert tokenizer.fingerprint == expected.fingerprint
    assert tokenizer.encode(long, long, long) == expected.encode(long, long, long)
    touched(["hello", "hello world"], padding="max_length", max_length=63, truncation=True)
    assert tokenizer.encode(long, long, long) == expected.encode(long, long, long)


def state_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "vocabulary": dict(tokenizer.get_vocab()),
        "added": {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()},
        "special": dict(tokenizer.special_tokens_map),
        "rules": None if backend is None else json.loads(backend.to_str()),
        "ids": tokenizer("</s> hello <GIST> é")["input_ids"],
    }


def test_the_wrapped_tokenizer_is_unchanged_by_everything(kind: Kind, tmp_path: Path) -> None:
    wrapped = copy.deepcopy(kind.tokenizer)
    before = state_of(wrapped)
    tokenizer = GistTokenizer(wrapped)
    encoding = tokenizer.encode("hello <GIST>", "w1 </s>", "é", num_gist_tokens=64)
    tokenizer.encode_completions(["a"], ["b"])
    tokenizer.decode(encoding.input_ids, skip_special_tokens=False)
    assert tokenizer.fingerprint
    tokenizer.save_pretrained(tmp_path)
    copy.deepcopy(tokenizer)
    pickle.dumps(tokenizer)
    assert tokenizer.tokenizer is wrapped
    assert state_of(wrapped) == before


def test_copied_and_pickled_it_is_the_same(kind: Kind) -> None:
    """DataLoader workers get such copies, made before or after its first use."""
    fresh = GistTokenizer(kind.tokenizer, "plain")
    copies = [copy.deepcopy(fresh)]
    expected = fresh.encode("Say hello", "a <GIST>", "é", num_gist_tokens=2)
    copies.append(pickle.loads(pickle.dumps(fresh)))  # noqa: S301
    for again in copies:
        assert again.encode("Say hello", "a <GIST>", "é", num_gist_tokens=2) == expected
        assert again.fingerprint == fresh.fingerprint
        assert again.template == fresh.template
