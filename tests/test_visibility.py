"""Compare masks with drawings, with a slow definition, and with the masks of the published implementation.

A line of text is a sequence: ``_`` is padding, ``G`` a gist token, and anything else an ordinary token.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gisting import visibility as vis
from gisting.errors import GistError
from gisting.visibility import FOREVER, Visibility

FUZZ = settings(deadline=None, max_examples=40, derandomize=True)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def parse(line: str) -> tuple[Tensor, Tensor]:
    """Read ``is_gist`` and ``padding``, ``(1, K)`` each, from a drawn sequence."""
    tokens = line.split()
    return torch.tensor([[token == "G" for token in tokens]]), torch.tensor([[token != "_" for token in tokens]])


def numbers(line: str) -> Tensor:
    return torch.tensor([[int(number) for number in line.split()]])


def picture(text: str) -> list[str]:
    """Remove the indentation and the trailing blanks that a drawing has in this file."""
    lines = [line for line in text.splitlines() if line.strip()]
    indent = min(len(line) - len(line.lstrip()) for line in lines[1:])
    return [line[indent:].rstrip() for line in lines]


# -- drawings ----------------------------------------------------------------------------------------------------------

DRAWINGS = [
    pytest.param(
        vis.causal,
        "_ _ a b c",
        {},
        """
            _ _ a b c
          _ . . . . .
          _ . . . . .
          a . . 1 . .
          b . . 1 1 .
          c . . 1 1 1
        """,
        id="causal-left-padding",
    ),
    pytest.param(
        vis.causal,
        "a b c _ _",
        {},
        """
            a b c _ _
          a 1 . . . .
          b 1 1 . . .
          c 1 1 1 . .
          _ 1 1 1 . .
          _ 1 1 1 . .
        """,
        id="causal-right-padding",
    ),
    pytest.param(
        vis.gist,
        "_ a b G G c d",
        {},
        """
            _ a b G G c d
          _ . . . . . . .
          a . 1 . . . . .
          b . 1 1 . . . .
          G . 1 1 1 . . .
          G . 1 1 1 1 . .
          c . . . 1 1 1 .
          d . . . 1 1 1 1
        """,
        id="gist",
    ),
    pytest.param(
        vis.gist,
        "a b G",
        {},
        """
            a b G
          a 1 . .
          b 1 1 .
          G 1 1 1
        """,
        id="gist-ends-the-sequence",
    ),
    pytest.param(
        vis.gist,
        "a b G _ _",
        {},
        """
            a b G _ _
          a 1 . . . .
          b 1 1 . . .
          G 1 1 1 . .
          _ . . 1 . .
          _ . . 1 . .
        """,
        id="gist-ends-the-sequence-before-padding",
    ),
    pytest.param(
        vis.gist,
        "a b c d",
        {},
        """
            a b c d
          a 1 . . .
          b 1 1 . .
          c 1 1 1 .
          d 1 1 1 1
        """,
        id="gist-without-gist-is-causal",
    ),
    pytest.param(
        vis.gist,
        "a b G c G G d e",
        {},
        """
            a b G c G G d e
          a 1 . . . . . . .
          b 1 1 . . . . . .
          G 1 1 1 . . . . .
          c . . 1 1 . . . .
          G . . 1 1 1 . . .
          G . . 1 1 1 1 . .
          d . . 1 . 1 1 1 .
          e . . 1 . 1 1 1 1
        """,
        id="several-gist-spans",
    ),
    pytest.param(
        vis.gist,
        "a b G G c d e G G f",
        {},
        """
            a b G G c d e G G f
          a 1 . . . . . . . . .
          b 1 1 . . . . . . . .
          G 1 1 1 . . . . . . .
          G 1 1 1 1 . . . . . .
          c . . 1 1 1 . . . . .
          d . . 1 1 1 1 . . . .
          e . . 1 1 1 1 1 . . .
          G . . 1 1 1 1 1 1 . .
          G . . 1 1 1 1 1 1 1 .
          f . . 1 1 . . . 1 1 1
        """,
        id="chunks-of-a-long-prompt",
    ),
    pytest.param(
        vis.positive,
        "a b G c d",
        {},
        """
            a b G c d
          a 1 . . . .
          b 1 1 . . .
          G 1 1 1 . .
          c 1 1 1 1 .
          d 1 1 1 1 1
        """,
        id="positive",
    ),
    pytest.param(
        vis.negative,
        "_ a b G c d",
        {},
        """
            _ a b G c d
          _ . . . . . .
          a . 1 . . . .
          b . 1 1 . . .
          G . 1 1 1 . .
          c . . . . 1 .
          d . . . . 1 1
        """,
        id="negative",
    ),
    pytest.param(
        vis.negative,
        "a G b G c",
        {},
        """
            a G b G c
          a 1 . . . .
          G 1 1 . . .
          b 1 1 1 . .
          G 1 1 1 1 .
          c . . . . 1
        """,
        id="negative-several-gist-spans",
    ),
    pytest.param(
        vis.gist,
        "a G c a b G d _",
        {"documents": "0 0 0 1 1 1 1 2"},
        """
            a G c a b G d _
          a 1 . . . . . . .
          G 1 1 . . . . . .
          c . 1 1 . . . . .
          a . . . 1 . . . .
          b . . . 1 1 . . .
          G . . . 1 1 1 . .
          d . . . . . 1 1 .
          _ . . . . . . . .
        """,
        id="packed-documents",
    ),
    pytest.param(
        vis.gist,
        "a G G b G c d e",
        {"documents": "0 0 1 1 1 1 2 2"},
        """
            a G G b G c d e
          a 1 . . . . . . .
          G 1 1 . . . . . .
          G . . 1 . . . . .
          b . . 1 1 . . . .
          G . . 1 1 1 . . .
          c . . 1 . 1 1 . .
          d . . . . . . 1 .
          e . . . . . . 1 1
        """,
        id="packed-documents-whose-gists-touch",
    ),
    pytest.param(
        vis.negative,
        "a G c a b G d",
        {"documents": "0 0 0 1 1 1 1"},
        """
            a G c a b G d
          a 1 . . . . . .
          G 1 1 . . . . .
          c . . 1 . . . .
          a . . . 1 . . .
          b . . . 1 1 . .
          G . . . 1 1 1 .
          d . . . . . . 1
        """,
        id="packed-documents-negative",
    ),
    pytest.param(
        vis.gist,
        "a b G c x y z w",
        {"branches": "0 0 0 0 1 1 2 2"},
        """
            a b G c x y z w
          a 1 . . . . . . .
          b 1 1 . . . . . .
          G 1 1 1 . . . . .
          c . . 1 1 . . . .
          x . . 1 1 1 . . .
          y . . 1 1 1 1 . .
          z . . 1 1 . . 1 .
          w . . 1 1 . . 1 1
        """,
        id="completions-of-one-prompt",
    ),
    pytest.param(
        vis.positive,
        "a G x y b G z w",
        {"documents": "0 0 0 0 1 1 1 1", "branches": "0 0 1 2 0 0 1 2"},
        """
            a G x y b G z w
          a 1 . . . . . . .
          G 1 1 . . . . . .
          x 1 1 1 . . . . .
          y 1 1 . 1 . . . .
          b . . . . 1 . . .
          G . . . . 1 1 . .
          z . . . . 1 1 1 .
          w . . . . 1 1 . 1
        """,
        id="completions-in-packed-documents",
    ),
    pytest.param(
        vis.encoder_gist,
        "a b G G c d",
        {},
        """
            a b G G c d
          a 1 1 1 1 . .
          b 1 1 1 1 . .
          G 1 1 1 1 . .
          G 1 1 1 1 . .
          c . . 1 1 1 1
          d . . 1 1 1 1
        """,
        id="encoder-gist",
    ),
    pytest.param(
        vis.encoder_gist,
        "a b G _",
        {},
        """
            a b G _
          a 1 1 1 .
          b 1 1 1 .
          G 1 1 1 .
          _ . . 1 .
        """,
        id="encoder-gist-ends-the-sequence",
    ),
    pytest.param(
        vis.encoder_gist,
        "a G b G G c",
        {},
        """
            a G b G G c
          a 1 1 . . . .
          G 1 1 . . . .
          b . 1 1 1 1 .
          G . 1 1 1 1 .
          G . 1 1 1 1 .
          c . 1 . 1 1 1
        """,
        id="encoder-several-gist-spans",
    ),
    pytest.param(
        vis.encoder_positive,
        "a b G c _",
        {},
        """
            a b G c _
          a 1 1 1 1 .
          b 1 1 1 1 .
          G 1 1 1 1 .
          c 1 1 1 1 .
          _ 1 1 1 1 .
        """,
        id="encoder-positive",
    ),
    pytest.param(
        vis.encoder_negative,
        "a b G c d",
        {},
        """
            a b G c d
          a 1 1 1 . .
          b 1 1 1 . .
          G 1 1 1 . .
          c . . . 1 1
          d . . . 1 1
        """,
        id="encoder-negative",
    ),
    pytest.param(
        vis.bidirectional,
        "_ a b c _",
        {},
        """
            _ a b c _
          _ . 1 1 1 .
          a . 1 1 1 .
          b . 1 1 1 .
          c . 1 1 1 .
          _ . 1 1 1 .
        """,
        id="bidirectional",
    ),
]


def build(builder: Callable[..., Visibility], line: str, **packing: str) -> Visibility:
    is_gist, padding = parse(line)
    extra = {name: numbers(text) for name, text in packing.items()}
    if builder in (vis.causal, vis.bidirectional):
        return builder(padding, **extra)
    return builder(is_gist, padding, **extra)


@pytest.mark.parametrize(("builder", "line", "packing", "expected"), DRAWINGS)
def test_drawing(builder: Callable[..., Visibility], line: str, packing: dict[str, str], expected: str) -> None:
    assert build(builder, line, **packing).draw(line.split()).splitlines() == picture(expected)


def test_drawing_of_a_sliding_window() -> None:
    assert build(vis.gist, "a b c G d e f").windowed(3).draw("a b c G d e f".split()).splitlines() == picture(
        """
            a b c G d e f
          a 1 . . . . . .
          b 1 1 . . . . .
          c 1 1 1 . . . .
          G . 1 1 1 . . .
          d . . . 1 1 . .
          e . . . 1 1 1 .
          f . . . . 1 1 1
        """
    )


def test_drawing_of_what_a_decoder_reads() -> None:
    """No decoder row sees the prompt, not even the first rows, although the prompt's own rows saw it in the encoder."""
    assert build(vis.encoder_gist, "a b G c _").for_cross_attention().draw("a b G c _".split()).splitlines() == picture(
        """
            a b G c _
          a . . 1 1 .
          b . . 1 1 .
          G . . 1 1 .
          c . . 1 1 .
          _ . . 1 1 .
        """
    )


def test_drawing_numbers_the_keys_where_there_are_no_labels() -> None:
    lines = vis.causal(torch.ones(1, 12)).draw().splitlines()
    assert lines[0] == "  0 1 2 3 4 5 6 7 8 9 0 1"
    assert lines[12] == "1 1 1 1 1 1 1 1 1 1 1 1 1"


def test_drawing_is_as_wide_as_its_labels_and_of_the_chosen_row() -> None:
    is_gist = torch.cat([parse("a b c")[0], parse("a G c")[0]])
    assert vis.gist(is_gist).draw(["The", "<GIST>", "end"], row=1).splitlines() == picture(
        """
                    The <GIST>    end
             The      1      .      .
          <GIST>      1      1      .
             end      .      1      1
        """
    )


# -- the slow definition -----------------------------------------------------------------------------------------------
# Written from the paper (arXiv 2304.08467, section 3.2 and appendix A) and the docstrings of the builders. Only rows of
# tokens are compared, because the results of padding rows are thrown away. (Drawings and published masks include them.)


@dataclass(frozen=True)
class Token:
    is_gist: bool = False
    is_padding: bool = False
    document: int = 0
    branch: int = 0


def spans(tokens: list[Token], document: int) -> list[tuple[int, int]]:
    """Return the start and the (exclusive) end of each gist span in a document."""
    found: list[tuple[int, int]] = []
    for index, token in enumerate(tokens):
        if not token.is_gist or token.document != document:
            continue
        if found and found[-1][1] == index:
            found[-1] = (found[-1][0], index + 1)
        else:
            found.append((index, index + 1))
    return found


def is_hidden(tokens: list[Token], condition: str, row: int, key: int) -> bool:
    """Return whether the condition hides ``key`` from ``row``. Both are tokens of the same document."""
    its_spans = spans(tokens, tokens[key].document)
    if condition == "gist":
        return not tokens[key].is_gist and any(key < start and row >= end for start, end in its_spans)
    if condition == "negative":
        return bool(its_spans) and key < its_spans[-1][1] <= row
    return False


def decoder_sees(tokens: list[Token], condition: str, row: int, key: int) -> bool:
    if tokens[key].is_padding or key > row or tokens[key].document != tokens[row].document:
        return False
    if tokens[key].branch not in (0, tokens[row].branch):
        return False
    return not is_hidden(tokens, condition, row, key)


def decoder_position(tokens: list[Token], condition: str, index: int) -> int:
    """Count the surviving tokens before this one; a token that gets hidden counts backwards from its own gist."""
    token = tokens[index]
    shared = [
        other
        for other, its in enumerate(tokens)
        if its.document == token.document and its.branch == 0 and not its.is_padding
    ]
    appended = len(tokens)
    surviving = [other for other in shared if not is_hidden(tokens, condition, appended, other)]
    if token.branch:
        before = [
            other
            for other, its in enumerate(tokens[:index])
            if (its.document, its.branch) == (token.document, token.branch)
        ]
        return len(surviving) + len(before)
    if index in surviving:
        return sum(other < index for other in surviving)
    its_spans = spans(tokens, token.document)
    if condition == "negative":
        # Prompt and gist are hidden together: they count backwards from the token after the last gist, at position 0.
        return index - its_spans[-1][1]
    gist_start = next(start for start, _ in its_spans if start > index)
    return decoder_position(tokens, condition, gist_start) - (gist_start - index)


def encoder_sees(tokens: list[Token], condition: str, row: int, key: int) -> bool:
    if tokens[key].is_padding:
        return False
    its_spans = spans(tokens, 0)
    if condition == "positive" or not its_spans:
        return True

    def chunk(index: int) -> int:
        """Number the chunks, each a piece of prompt with its gist; the rest after the last gist is one more chunk."""
        return sum(end <= index for _, end in its_spans)

    if chunk(key) == chunk(row):
        return True
    is_earlier_gist = tokens[key].is_gist and chunk(key) < chunk(row)
    return is_earlier_gist and not (condition == "negative" and chunk(row) == len(its_spans))


@st.composite
def sequences(draw: st.DrawFn, packed: bool, branched: bool) -> list[Token]:
    """Draw one row of documents. Each has shared tokens with random gist flags, then its completions."""
    tokens: list[Token] = []
    for document in range(draw(st.integers(1, 3)) if packed else 1):
        flags = draw(st.lists(st.booleans(), min_size=0 if branched else 1, max_size=8))
        tokens += [Token(is_gist=flag, document=document) for flag in flags]
        for branch in range(1, 1 + (draw(st.integers(0 if flags else 1, 3)) if branched else 0)):
            tokens += [Token(document=document, branch=branch)] * draw(st.integers(1, 3))
    return tokens


@st.composite
def batches(draw: st.DrawFn, *, packing: bool = True) -> tuple[list[list[Token]], bool, bool]:
    packed = packing and draw(st.booleans())
    branched = packing and draw(st.booleans())
    rows = draw(st.lists(sequences(packed, branched), min_size=1, max_size=3))
    width = max(len(row) for row in rows) + draw(st.integers(0, 2))
    is_left = draw(st.booleans())
    padded = []
    for row in rows:
        filling = [Token(is_padding=True, document=99 if packed else 0)] * (width - len(row))
        padded.append(filling + row if is_left else row + filling)
    return padded, packed, branched


def tensors(rows: list[list[Token]]) -> dict[str, Tensor]:
    def field(name: str) -> Tensor:
        return torch.tensor([[getattr(token, name) for token in row] for row in rows])

    return {
        "is_gist": field("is_gist"),
        "padding": ~field("is_padding"),
        "documents": field("document"),
        "branches": field("branch"),
    }


def only_token_rows(dense: list[list[bool]], row: list[Token]) -> dict[int, list[bool]]:
    return {index: line for index, line in enumerate(dense) if not row[index].is_padding}


@pytest.mark.parametrize("condition", ["causal", "gist", "positive", "negative"])
@given(batch=batches())
@FUZZ
def test_a_decoder_mask_is_its_slow_definition(condition: str, batch: tuple[list[list[Token]], bool, bool]) -> None:
    rows, packed, branched = batch
    values = tensors(rows)
    extra = {
        "documents": values["documents"] if packed else None,
        "branches": values["branches"] if branched else None,
    }
    if condition == "causal":
        built = vis.causal(values["padding"], **extra)
    else:
        built = vis.CONDITIONS[condition](values["is_gist"], values["padding"], **extra)
    dense = built.to_dense().tolist()
    for number, row in enumerate(rows):
        slow = [[decoder_sees(row, condition, i, j) for j in range(len(row))] for i in range(len(row))]
        assert only_token_rows(dense[number], row) == only_token_rows(slow, row)


@pytest.mark.parametrize("condition", ["causal", "gist", "positive", "negative"])
@given(batch=batches())
@FUZZ
def test_positions_are_the_slow_definition(condition: str, batch: tuple[list[list[Token]], bool, bool]) -> None:
    rows, packed, branched = batch
    values = tensors(rows)
    extra = {
        "documents": values["documents"] if packed else None,
        "branches": values["branches"] if branched else None,
    }
    if condition == "causal":
        built = vis.causal(values["padding"], **extra)
    else:
        built = vis.CONDITIONS[condition](values["is_gist"], values["padding"], **extra)
    assert built.position_ids is not None
    assert built.position_ids.dtype == torch.int64
    for row, positions in zip(rows, built.position_ids.tolist(), strict=True):
        have = {i: positions[i] for i, token in enumerate(row) if not token.is_padding}
        assert have == {i: decoder_position(row, condition, i) for i in have}


@pytest.mark.parametrize("condition", ["bidirectional", "gist", "positive", "negative"])
@given(batch=batches(packing=False))
@FUZZ
def test_an_encoder_mask_is_its_slow_definition(condition: str, batch: tuple[list[list[Token]], bool, bool]) -> None:
    rows = batch[0]
    values = tensors(rows)
    if condition == "bidirectional":
        built = vis.bidirectional(values["padding"])
    else:
        built = vis.ENCODER_CONDITIONS[condition](values["is_gist"], values["padding"])
    dense = built.to_dense().tolist()
    name = "positive" if condition == "bidirectional" else condition
    for number, row in enumerate(rows):
        slow = [[encoder_sees(row, name, i, j) for j in range(len(row))] for i in range(len(row))]
        assert only_token_rows(dense[number], row) == only_token_rows(slow, row)


@given(batch=batches(), window=st.integers(1, 9))
@FUZZ
def test_a_window_is_its_slow_definition(batch: tuple[list[list[Token]], bool, bool], window: int) -> None:
    values = tensors(batch[0])
    whole = vis.gist(values["is_gist"], values["padding"])
    dense, narrow = whole.to_dense(), whole.windowed(window).to_dense()
    for i in range(whole.num_keys):
        for j in range(whole.num_keys):
            assert torch.equal(narrow[:, i, j], dense[:, i, j] & (i - j < window))


@given(batch=batches(), data=st.data())
@FUZZ
def test_the_last_keys_are_the_lower_right_corner(
    batch: tuple[list[list[Token]], bool, bool], data: st.DataObject
) -> None:
    values = tensors(batch[0])
    whole = vis.gist(values["is_gist"], values["padding"], documents=values["documents"])
    count = data.draw(st.integers(1, whole.num_keys))
    last = whole.last_keys(count)
    assert torch.equal(last.to_dense(), whole.to_dense()[:, -count:, -count:])
    assert torch.equal(last.survivors(), whole.survivors()[:, -count:])
    assert torch.equal(last.position_ids, whole.position_ids[:, -count:])


@given(batch=batches(packing=False))
@FUZZ
def test_survivors_are_what_an_appended_token_would_see(batch: tuple[list[list[Token]], bool, bool]) -> None:
    """The token is appended to tokens, not to padding, so only left-padded rows are tested."""
    rows = [sorted(row, key=lambda token: not token.is_padding) for row in batch[0]]
    values = tensors(rows)
    longer = tensors([[*row, Token()] for row in rows])
    for condition in vis.CONDITIONS.values():
        built, appended = (
            condition(values["is_gist"], values["padding"]),
            condition(longer["is_gist"], longer["padding"]),
        )
        assert torch.equal(built.survivors(), appended.to_dense()[:, -1, :-1])


POSITIONS = [
    pytest.param(vis.causal, "_ _ a b c", {}, "0 0 0 1 2", id="causal"),
    pytest.param(vis.gist, "_ a b G G c d", {}, "0 -2 -1 0 1 2 3", id="the-gist-is-at-0"),
    pytest.param(vis.gist, "a b G _ _", {}, "-2 -1 0 0 0", id="gist-ends-the-sequence"),
    pytest.param(vis.gist, "a G b c G G d", {}, "-1 0 -1 0 1 2 3", id="a-second-span-goes-on-from-the-first"),
    pytest.param(vis.gist, "a b G G c d e G G f", {}, "-2 -1 0 1 -1 0 1 2 3 4", id="chunks-of-a-long-prompt"),
    pytest.param(vis.positive, "a b G c", {}, "0 1 2 3", id="positive-hides-nothing"),
    pytest.param(vis.negative, "a b G c d", {}, "-3 -2 -1 0 1", id="negative-starts-after-the-gist"),
    pytest.param(vis.negative, "a b G _ _", {}, "-3 -2 -1 0 0", id="negative-ends-with-its-gist"),
    pytest.param(vis.gist, "a G c b G d", {"documents": "0 0 0 1 1 1"}, "-1 0 1 -1 0 1", id="documents-restart"),
    pytest.param(
        vis.gist, "a G c x y z", {"branches": "0 0 0 1 1 2"}, "-1 0 1 2 3 2", id="branches-go-on-from-the-shared"
    ),
]


@pytest.mark.parametrize(("builder", "line", "packing", "expected"), POSITIONS)
def test_positions(builder: Callable[..., Visibility], line: str, packing: dict[str, str], expected: str) -> None:
    assert torch.equal(build(builder, line, **packing).position_ids, numbers(expected))


@pytest.mark.parametrize("condition", ["gist", "positive", "negative"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_neither_mask_nor_position(condition: str, side: str) -> None:
    """A sequence is masked alike alone and padded in a longer batch."""
    for line in ("a b G", "a b G c d", "a G b G c", "a b c"):
        alone = build(vis.CONDITIONS[condition], line)
        padded = build(vis.CONDITIONS[condition], f"_ _ _ {line}" if side == "left" else f"{line} _ _ _")
        part = slice(3, None) if side == "left" else slice(None, -3)
        assert torch.equal(padded.to_dense()[:, part, part], alone.to_dense()), line
        assert torch.equal(padded.position_ids[:, part], alone.position_ids), line
        assert torch.equal(padded.survivors()[:, part], alone.survivors()), line


@pytest.mark.parametrize("shift", [-7, -2, -1, 0, 5, 1000])
@pytest.mark.parametrize("condition", ["gist", "positive", "negative"])
def test_documents_may_be_numbered_anyhow(condition: str, shift: int) -> None:
    documents = "0 0 0 1 1 1 1"
    usual = build(vis.CONDITIONS[condition], "a G c a b G d", documents=documents)
    shifted = build(
        vis.CONDITIONS[condition], "a G c a b G d", documents=" ".join(str(int(n) + shift) for n in documents.split())
    )
    assert shifted.draw() == usual.draw()
    assert torch.equal(shifted.position_ids, usual.position_ids)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.float32], ids=str)
def test_padding_may_be_any_attention_mask_of_transformers(dtype: torch.dtype) -> None:
    is_gist, padding = parse("_ a G b")
    assert torch.equal(vis.gist(is_gist, padding.to(dtype)).end, vis.gist(is_gist, padding).end)
    assert torch.equal(vis.causal(padding.to(dtype)).end, vis.causal(padding).end)


def test_a_gist_token_in_the_padding_is_padding() -> None:
    """If a model's pad token is its gist token, only the padding mask tells them apart."""
    is_gist = torch.tensor([[True, True, False, True, False]])
    padding = torch.tensor([[False, False, True, True, True]])
    assert torch.equal(vis.gist(is_gist, padding).to_dense(), build(vis.gist, "_ _ a G b").to_dense())


# -- prompts in parts --------------------------------------------------------------------------------------------------
# As above, and ``C`` is the copy of the gist token before it. A second line holds the number of each token's part.


def chain(line: str, parts: str) -> dict[str, Tensor]:
    tokens = line.split()
    return {
        "is_gist": torch.tensor([[token in "GC" for token in tokens]]),
        "is_copy": torch.tensor([[token == "C" for token in tokens]]),
        "parts": numbers(parts),
        "padding": torch.tensor([[token != "_" for token in tokens]]),
    }


@pytest.mark.parametrize(
    ("builder", "line", "parts", "expected", "positions"),
    [
        pytest.param(
            vis.chained,
            "a b G C c G G d e",
            "1 1 1 1 2 2 2 0 0",
            """
                a b G C c G G d e
              a 1 . . . . . . . .
              b 1 1 . . . . . . .
              G 1 1 1 . . . . . .
              C 1 1 1 . . . . . .
              c . . . . 1 . . . .
              G . . . . 1 1 . . .
              G . . . . 1 1 1 . .
              d . . . 1 . 1 1 1 .
              e . . . 1 . 1 1 1 1
            """,
            "-2 -1 0 0 0 1 2 3 4",
            id="two-parts",
        ),
        pytest.param(
            vis.chained,
            "_ a G C G C b G C c d G e",
            "0 1 1 1 1 1 2 2 2 3 3 3 0",
            """
                _ a G C G C b G C c d G e
              _ . . . . . . . . . . . . .
              a . 1 . . . . . . . . . . .
              G . 1 1 . . . . . . . . . .
              C . 1 1 . . . . . . . . . .
              G . 1 1 . 1 . . . . . . . .
              C . 1 1 . 1 . . . . . . . .
              b . . . . . . 1 . . . . . .
              G . . . . . . 1 1 . . . . .
              C . . . . . . 1 1 . . . . .
              c . . . . . . . . . 1 . . .
              d . . . . . . . . . 1 1 . .
              G . . . . . . . . . 1 1 1 .
              e . . . 1 . 1 . . 1 . . 1 1
            """,
            "0 -1 0 0 1 1 1 2 2 1 2 3 4",
            id="three-parts-left-padding",
        ),
        pytest.param(
            vis.chained,
            "a G C b G C c _",
            "1 1 1 2 2 2 0 0",
            """
                a G C b G C c _
              a 1 . . . . . . .
              G 1 1 . . . . . .
              C 1 1 . . . . . .
              b . . . 1 . . . .
              G . . . 1 1 . . .
              C . . . 1 1 . . .
              c . . 1 . . 1 1 .
              _ . . 1 . . 1 1 .
            """,
            "-1 0 0 0 1 1 2 0",
            id="copies-in-the-last-part-and-right-padding",
        ),
        pytest.param(
            vis.chained,
            "a G C b G",
            "7 7 7 5 5",
            """
                a G C b G
              a 1 . . . .
              G 1 1 . . .
              C 1 1 . . .
              b . . . 1 .
              G . . . 1 1
            """,
            "-1 0 0 0 1",
            id="no-rest-and-parts-numbered-anyhow",
        ),
        pytest.param(
            vis.chained_positive,
            "a G C b G c",
            "1 1 1 2 2 0",
            """
                a G C b G c
              a 1 . . . . .
              G 1 1 . . . .
              C 1 1 . . . .
              b 1 1 . 1 . .
              G 1 1 . 1 1 .
              c 1 1 . 1 1 1
            """,
            "0 1 0 2 3 4",
            id="positive",
        ),
        pytest.param(
            vis.chained_negative,
            "a G C b G c d",
            "1 1 1 2 2 0 0",
            """
                a G C b G c d
              a 1 . . . . . .
              G 1 1 . . . . .
              C 1 1 . . . . .
              b 1 1 . 1 . . .
              G 1 1 . 1 1 . .
              c . . . . . 1 .
              d . . . . . 1 1
            """,
            "-5 -4 0 -2 -1 0 1",
            id="negative",
        ),
    ],
)
def test_drawing_of_a_chain(
    builder: Callable[..., Visibility], line: str, parts: str, expected: str, positions: str
) -> None:
    built = builder(**chain(line, parts))
    assert built.draw(line.split()).splitlines() == picture(expected)
    assert torch.equal(built.position_ids, numbers(positions))


@dataclass(frozen=True)
class Link:
    """A token of a chain: its part (0 for the rest, None for padding), its kind, and its index in its gist."""

    part: int | None
    kind: str = "p"  # p prompt, g gist, c copy, r rest
    number: int = 0
    has_copy: bool = False


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[list[Link]], list[list[int]]]:
    """Draw rows of parts, padded on one side, and the k of every part. The last part may or may not have copies."""
    rows, counts = [], []
    for _ in range(draw(st.integers(1, 3))):
        row: list[Link] = []
        own = draw(st.lists(st.integers(1, 3), min_size=0, max_size=4))
        for part, k in enumerate(own, start=1):
            row += [Link(part)] * draw(st.integers(1, 3))
            has_copy = part < len(own) or draw(st.booleans())
            for number in range(k):
                row.append(Link(part, "g", number, has_copy))
                row += [Link(part, "c", number)] * has_copy
        row += [Link(0, "r")] * draw(st.integers(0 if row else 1, 3))
        rows.append(row)
        counts.append(own)
    width = max(map(len, rows)) + draw(st.integers(0, 2))
    is_left = draw(st.booleans())
    fillings = [[Link(None)] * (width - len(row)) for row in rows]
    padded = [fill + row if is_left else row + fill for fill, row in zip(fillings, rows, strict=True)]
    return padded, counts


def link_sees(row: Link, key: Link) -> bool:
    """Say whether a row sees a key at or before it. In its own part, a copy is a gist token as a row, but not a key."""
    if key.part is None:
        return False
    if row.part == key.part:
        return key.kind != "c"
    return row.part == 0 and (key.kind == "c" or (key.kind == "g" and not key.has_copy))


@given(drawn=chains())
@FUZZ
def test_a_chain_is_its_slow_definition(drawn: tuple[list[list[Link]], list[list[int]]]) -> None:
    rows, counts = drawn
    built = vis.chained(
        torch.tensor([[link.kind in "gc" for link in row] for row in rows]),
        torch.tensor([[link.kind == "c" for link in row] for row in rows]),
        torch.tensor([[link.part or 0 for link in row] for row in rows]),
        torch.tensor([[link.part is not None for link in row] for row in rows]),
    )
    assert built.position_ids is not None
    dense, survivors = built.to_dense().tolist(), built.survivors().tolist()
    for number, row in enumerate(rows):
        tokens = [place for place, link in enumerate(row) if link.part is not None]
        for i in tokens:
            assert dense[number][i] == [j <= i and link_sees(row[i], row[j]) for j in range(len(row))]
        rest = [place for place in tokens if row[place].part == 0]
        for i in tokens:
            link = row[i]
            # A row appended to the rest sees the survivors, and they are at the positions of chained gists.
            assert survivors[number][i] == (link.kind == "r" or link_sees(Link(0, "r"), link))
            if link.kind == "r":
                expected = sum(counts[number]) + rest.index(i)
            else:
                offset = sum(counts[number][: (link.part or 0) - 1])
                gist_start = next(j for j in tokens if (row[j].part, row[j].kind) == (link.part, "g"))
                expected = offset + (i - gist_start if link.kind == "p" else link.number)
            assert built.position_ids[number, i] == expected


@given(batch=batches(packing=False))
@FUZZ
def test_a_single_part_without_copies_is_gist(batch: tuple[list[list[Token]], bool, bool]) -> None:
    values = tensors(batch[0])
    # Keep only the last gist token.
    is_span = values["is_gist"] & values["padding"]
    is_span = is_span & (is_span.flip(-1).long().cumsum(-1).flip(-1) == 1)
    is_part = is_span.flip(-1).cummax(-1).values.flip(-1)
    found = vis.chained(is_span, torch.zeros_like(is_span), is_part, values["padding"])
    expected = vis.gist(is_span, values["padding"])
    for name in ("first", "end", "position_ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


# -- the published masks -----------------------------------------------------------------------------------------------

PUBLISHED_GIST, PUBLISHED_PAD = 95, 0
PUBLISHED_NAMES = {"gist": "gist", "positive": "pos_control", "negative": "neg_control"}


@pytest.fixture(scope="module")
def published(shared: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    everything = load_file(shared / "reference" / "gisting-2023" / "expected.safetensors")
    return {name: tensor for name, tensor in everything.items() if name.startswith("mask.")}


@pytest.mark.parametrize("case", range(8))
@pytest.mark.parametrize("condition", PUBLISHED_NAMES)
def test_masks_equal_the_published_ones(condition: str, case: int, published: dict[str, Tensor]) -> None:
    """Compare all rows and keys, including padding and rows without gist tokens.

    The published mask leaves padded keys to the model.
    """
    ids = published[f"mask.{case}.input_ids"]
    is_gist, padding = ids == PUBLISHED_GIST, ids != PUBLISHED_PAD
    expected = published[f"mask.{case}.{PUBLISHED_NAMES[condition]}"][:, 0] & padding[:, None]
    assert torch.equal(vis.ENCODER_CONDITIONS[condition](is_gist, padding).to_dense(), expected)
    lower = torch.ones(20, 20, dtype=torch.bool).tril()
    assert torch.equal(vis.CONDITIONS[condition](is_gist, padding).to_dense(), expected & lower)


@pytest.mark.parametrize("case", range(8))
def test_cross_masks_equal_the_published_ones_except_without_gist(case: int, published: dict[str, Tensor]) -> None:
    """If a sequence has no gist, the published decoder sees nothing; ours deliberately sees the whole sequence."""
    ids = published[f"mask.{case}.input_ids"]
    is_gist, padding = ids == PUBLISHED_GIST, ids != PUBLISHED_PAD
    has_gist = is_gist.any(-1)
    ours = vis.encoder_gist(is_gist, padding).for_cross_attention().to_dense(num_rows=1)[:, 0]
    theirs = published[f"mask.{case}.cross_gist"] & padding
    assert torch.equal(ours[has_gist], theirs[has_gist])
    assert not theirs[~has_gist].any()
    assert torch.equal(ours[~has_gist], padding[~has_gist])


def test_the_published_masks_cover_all_cases(published: dict[str, Tensor]) -> None:
    """Padding, rows without gist tokens, gist tokens at the start, and several gist tokens do occur."""
    ids = torch.cat([published[f"mask.{case}.input_ids"] for case in range(8)])
    is_gist = ids == PUBLISHED_GIST
    assert (ids == PUBLISHED_PAD).any()
    assert (~is_gist.any(-1)).any()
    assert is_gist[:, 0].any()
    assert (is_gist.sum(-1) > 1).any()


# -- the methods of Visibility -----------------------------------------------------------------------------------------


def test_attention_mask_round_trip() -> None:
    is_gist = torch.cat([parse("a b G c d")[0], parse("G a b c d")[0]])
    built = vis.gist(is_gist, torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]))
    mask = built.as_attention_mask()
    assert mask.dtype == torch.int32
    assert mask.shape == (2, 1, 2, 5)
    assert mask[0, 0].tolist() == [[0, 1, 2, 3, 4], [3, 3, FOREVER, FOREVER, 4]]
    again = Visibility.from_attention_mask(mask)
    assert torch.equal(again.first, built.first)
    assert torch.equal(again.end, built.end)
    assert again.position_ids is None
    assert vis.is_interval_mask(mask)


NO_INTERVALS = [
    pytest.param(torch.ones(2, 5, dtype=torch.int64), "torch.int64 (2, 5)", id="a-padding-mask"),
    pytest.param(torch.ones(2, 1, 2, 5, dtype=torch.bool), "torch.bool (2, 1, 2, 5)", id="bool"),
    pytest.param(torch.ones(2, 1, 2, 5, dtype=torch.int64), "torch.int64 (2, 1, 2, 5)", id="int64"),
    pytest.param(torch.ones(2, 1, 5, 5, dtype=torch.int32), "torch.int32 (2, 1, 5, 5)", id="dense"),
    pytest.param(torch.ones(2, 2, 2, 5, dtype=torch.int32), "torch.int32 (2, 2, 2, 5)", id="two-heads"),
    pytest.param(torch.ones(1, 2, 5, dtype=torch.int32), "torch.int32 (1, 2, 5)", id="three-dimensions"),
]


@pytest.mark.parametrize(("mask", "shown"), NO_INTERVALS)
def test_other_masks_are_no_intervals(mask: Tensor, shown: str) -> None:
    assert not vis.is_interval_mask(mask)
    with pytest.raises(GistError) as caught:
        Visibility.from_attention_mask(mask)
    assert str(caught.value) == (
        f"attention_mask must be int32 of shape (B, 1, 2, K), as made by Visibility.as_attention_mask(), got {shown}"
    )


def test_no_mask_is_no_interval_mask() -> None:
    assert not vis.is_interval_mask(None)


SURVIVORS = [
    pytest.param(vis.causal, "_ a b _", "0 1 1 0", id="causal"),
    pytest.param(vis.gist, "a b G c", "0 0 1 1", id="gist"),
    pytest.param(vis.gist, "a b G", "0 0 1", id="gist-ends-the-sequence"),
    pytest.param(vis.gist, "a G b G", "0 1 0 1", id="second-gist-ends-the-sequence"),
    pytest.param(vis.gist, "a b G _", "0 0 1 0", id="gist-then-padding"),
    pytest.param(vis.positive, "a b G", "1 1 1", id="positive"),
    pytest.param(vis.negative, "a b G", "0 0 0", id="negative-ends-with-its-gist"),
    pytest.param(vis.negative, "a b G c", "0 0 0 1", id="negative"),
    pytest.param(vis.encoder_gist, "a b G", "0 0 1", id="encoder-ends-with-its-gist"),
    pytest.param(vis.encoder_gist, "a b G c _", "0 0 1 1 0", id="encoder"),
    pytest.param(vis.encoder_gist, "a b _", "1 1 0", id="encoder-without-gist"),
    pytest.param(vis.encoder_negative, "a b G", "0 0 0", id="encoder-negative-ends-with-its-gist"),
    pytest.param(vis.encoder_negative, "a b G c", "0 0 0 1", id="encoder-negative"),
]


@pytest.mark.parametrize(("builder", "line", "expected"), SURVIVORS)
def test_survivors_and_what_a_decoder_reads(builder: Callable[..., Visibility], line: str, expected: str) -> None:
    built = build(builder, line)
    assert torch.equal(built.survivors(), numbers(expected).bool())
    for num_rows in (1, 3, 9):
        read = built.for_cross_attention().to_dense(num_rows)
        assert torch.equal(read, numbers(expected).bool()[:, None].expand(1, num_rows, built.num_keys))


def test_a_document_does_not_outlive_its_row() -> None:
    assert not build(vis.gist, "a G c b", documents="0 0 0 1").survivors().any()


def test_to_dense_with_fewer_and_with_more_rows() -> None:
    """Fewer rows than keys are the last rows; more rows than keys are counted from 0."""
    built = build(vis.gist, "a b G c d")
    assert torch.equal(built.to_dense(2), built.to_dense()[:, -2:])
    assert built.to_dense(0).shape == (1, 0, 5)
    more = built.to_dense(7)
    assert torch.equal(more[:, :5], built.to_dense())
    assert more[0, 6].tolist() == [False, False, True, True, True]


def test_to_moves_every_tensor() -> None:
    moved = build(vis.gist, "a b G c").to("meta")
    assert {moved.first.device.type, moved.end.device.type, moved.position_ids.device.type} == {"meta"}
    assert moved.device.type == "meta"
    assert build(vis.encoder_gist, "a G b").to(torch.device("meta")).position_ids is None


def test_intervals_are_kept_as_int32() -> None:
    built = Visibility(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int16))
    assert (built.first.dtype, built.end.dtype) == (torch.int32, torch.int32)
    assert (built.batch_size, built.num_keys) == (2, 3)


# -- costs and devices -------------------------------------------------------------------------------------------------

BUILDERS: dict[str, Callable[[dict[str, Tensor]], Visibility]] = {
    "causal": lambda t: vis.causal(t["padding"], documents=t["documents"], branches=t["branches"]),
    "gist": lambda t: vis.gist(**t),
    "positive": lambda t: vis.positive(**t),
    "negative": lambda t: vis.negative(**t),
    "gist-plain": lambda t: vis.gist(t["is_gist"]),
    "bidirectional": lambda t: vis.bidirectional(t["padding"]),
    "encoder-gist": lambda t: vis.encoder_gist(t["is_gist"], t["padding"]),
    "encoder-positive": lambda t: vis.encoder_positive(t["is_gist"], t["padding"]),
    "encoder-negative": lambda t: vis.encoder_negative(t["is_gist"], t["padding"]),
    "chained": lambda t: vis.chained(t["is_gist"], t["is_gist"], t["documents"], t["padding"]),
    "chained-positive": lambda t: vis.chained_positive(t["is_gist"], t["is_gist"], t["documents"], t["padding"]),
    "chained-negative": lambda t: vis.chained_negative(t["is_gist"], t["is_gist"], t["documents"], t["padding"]),
    "windowed": lambda t: vis.gist(**t).windowed(4),
    "cross": lambda t: vis.encoder_gist(t["is_gist"], t["padding"]).for_cross_attention(),
    "last-keys": lambda t: vis.gist(**t).last_keys(3),
    "mask": lambda t: Visibility.from_attention_mask(vis.gist(**t).as_attention_mask()),
}


class Costs(TorchDispatchMode):
    """Count the operators that run, and record the size of the largest tensor they make."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operators = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_operators += 1
        made = result if isinstance(result, tuple | list) else [result]
        self.largest = max([self.largest, *(one.numel() for one in made if isinstance(one, Tensor))])
        return result


def example(batch: int, keys: int, device: str = "cpu") -> dict[str, Tensor]:
    index = torch.arange(keys).expand(batch, keys)
    values = {
        "is_gist": index % 7 == 3,
        "padding": index >= 2,
        "documents": index // max(keys // 3, 1),
        "branches": (index % max(keys // 3, 1) > keys // 4).long(),
    }
    return {name: tensor.to(device) for name, tensor in values.items()}


def costs_of(build_it: Callable[[dict[str, Tensor]], Visibility], batch: int, keys: int) -> Costs:
    values = example(batch, keys)
    with Costs() as costs:
        build_it(values)
    return costs


@pytest.mark.parametrize("name", BUILDERS)
def test_costs_are_linear_in_the_keys_and_no_loop_runs_over_rows(name: str) -> None:
    """64 rows of 999 keys take as many operators as one row of 63, and no tensor is larger than the mask's 2 B K."""
    small, large = costs_of(BUILDERS[name], 1, 63), costs_of(BUILDERS[name], 64, 999)
    assert large.num_operators == small.num_operators
    assert large.largest <= 2 * 64 * 999


def test_the_cost_counter_catches_a_dense_mask_and_a_loop() -> None:
    assert costs_of(lambda t: vis.gist(t["is_gist"]).to_dense(), 2, 63).largest >= 2 * 63 * 63

    def looping(values: dict[str, Tensor]) -> Visibility:
        rows = [vis.gist(values["is_gist"][row : row + 1]) for row in range(len(values["is_gist"]))]
        return Visibility(torch.cat([row.first for row in rows]), torch.cat([row.end for row in rows]))

    assert costs_of(looping, 3, 63).num_operators > costs_of(looping, 1, 63).num_operators


@pytest.mark.parametrize("name", ["gist", "negative", "encoder-gist"])
def test_a_million_keys(name: str) -> None:
    """A dense mask would take 1 TB."""
    built = BUILDERS[name](example(1, 1_000_000))
    assert built.as_attention_mask().shape == (1, 1, 2, 1_000_000)
    assert bool((built.end[:, 2:] > built.first[:, 2:]).any())


def test_4096_rows_take_no_more_operators_than_one() -> None:
    assert costs_of(BUILDERS["gist"], 4096, 111).num_operators == costs_of(BUILDERS["gist"], 1, 111).num_operators


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_runs_on_any_device(name: str) -> None:
    """On the meta device, reading a value or mixing devices raises."""
    built = BUILDERS[name](example(2, 63, "meta"))
    assert built.device.type == "meta"
    assert built.survivors().device.type == "meta"
    assert built.to_dense().device.type == "meta"


# -- errors ------------------------------------------------------------------------------------------------------------

I23 = torch.zeros(2, 3, dtype=torch.int32)
NO_GIST = torch.zeros(2, 3, dtype=torch.bool)

ERRORS = [
    pytest.param(
        lambda: Visibility(I23.float(), I23),
        "first must be an integer tensor of shape (B, K), got torch.float32 (2, 3)",
        id="first-float",
    ),
    pytest.param(
        lambda: Visibility(I23, I23.bool()),
        "end must be an integer tensor of shape (B, K), got torch.bool (2, 3)",
        id="end-bool",
    ),
    pytest.param(
        lambda: Visibility(I23[0], I23[0]),
        "first must be an integer tensor of shape (B, K), got torch.int32 (3,)",
        id="first-dimensions",
    ),
    pytest.param(
        lambda: Visibility(I23, I23[:, :2]),
        "first and end must have the same shape, got (2, 3) and (2, 2)",
        id="end-shape",
    ),
    pytest.param(
        lambda: Visibility(I23, I23, I23[:1].long()),
        "position_ids must have the shape of first, (2, 3), got (1, 3)",
        id="position-ids-shape",
    ),
    pytest.param(lambda: Visibility(I23, I23).windowed(0), "window must be at least 1, got 0", id="window"),
    pytest.param(lambda: Visibility(I23, I23).last_keys(4), "num_keys must be at most 3, got 4", id="last-keys"),
    pytest.param(lambda: vis.gist(NO_GIST[0]), "is_gist must have shape (B, K), got (3,)", id="is-gist-dimensions"),
    pytest.param(
        lambda: vis.encoder_gist(NO_GIST[0]),
        "is_gist must have shape (B, K), got (3,)",
        id="encoder-is-gist-dimensions",
    ),
    pytest.param(
        lambda: vis.gist(NO_GIST, torch.ones(2, 4)),
        "padding must have the shape of is_gist, (2, 3), got (2, 4)",
        id="padding-shape",
    ),
    pytest.param(
        lambda: vis.encoder_negative(NO_GIST, torch.ones(1, 3)),
        "padding must have the shape of is_gist, (2, 3), got (1, 3)",
        id="encoder-padding-shape",
    ),
    pytest.param(
        lambda: vis.positive(NO_GIST, documents=I23[:1]),
        "documents must have the shape of is_gist, (2, 3), got (1, 3)",
        id="documents-shape",
    ),
    pytest.param(
        lambda: vis.negative(NO_GIST, branches=I23[:, :1]),
        "branches must have the shape of is_gist, (2, 3), got (2, 1)",
        id="branches-shape",
    ),
    pytest.param(
        lambda: vis.chained(NO_GIST, NO_GIST[:1], I23),
        "is_copy must have the shape of is_gist, (2, 3), got (1, 3)",
        id="is-copy-shape",
    ),
    pytest.param(
        lambda: vis.chained_negative(NO_GIST, NO_GIST, I23[:, :2]),
        "parts must have the shape of is_gist, (2, 3), got (2, 2)",
        id="parts-shape",
    ),
    pytest.param(
        lambda: Visibility(I23, I23).draw(["a", "b"]), "tokens must have 3 labels, one per key, got 2", id="draw-labels"
    ),
    pytest.param(lambda: Visibility(I23, I23).draw(row=2), "row must be in 0..1, got 2", id="draw-row"),
    pytest.param(lambda: Visibility(I23, I23).draw(row=-1), "row must be in 0..1, got -1", id="draw-row-negative"),
    pytest.param(
        lambda: Visibility(I23, I23).save_drawing("unused.png", ["a"]),
        "tokens must have 3 labels, one per key, got 1",
        id="save-drawing-labels",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(GistError) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize("builder", [vis.causal, vis.bidirectional], ids=["causal", "bidirectional"])
def test_an_error_names_the_argument_that_the_caller_gave(builder: Callable[..., Visibility]) -> None:
    with pytest.raises(GistError, match=r"^padding must have shape \(B, K\), got \(3,\)"):
        builder(torch.ones(3))


def test_a_negative_number_of_last_keys_is_refused() -> None:
    with pytest.raises(GistError, match="num_keys must be"):
        Visibility(I23, I23).last_keys(-1)


# -- drawing to a file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["a", "a b G c d"], ids=["one-key", "five-keys"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no-labels"])
def test_drawing_to_a_file(line: str, labelled: bool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="saving a PNG needs the eval extra")
    path = tmp_path / "mask.png"
    build(vis.gist, line).save_drawing(path, line.split() if labelled else None)
    content = path.read_bytes()
    assert content.startswith(PNG_SIGNATURE)
    assert len(content) > 1000


def test_drawing_to_a_file_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(GistError, match=r"saving a PNG needs matplotlib; run: pip install 'gist-tokens\[eval\]'"):
        build(vis.gist, "a G b").save_drawing(tmp_path / "mask.png")
    assert not (tmp_path / "mask.png").exists()
