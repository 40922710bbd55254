"""Exact spans of a prompt and the questions that ask for them, by hand."""

from __future__ import annotations

import pytest

from gisting.eval.spans import find_spans

PROMPT = """You are the assistant of Hadley & Sons, a bicycle shop in Bristol.
1. The shop opens at 9:30 and closes at 6 pm.
2. Returns are taken within 30 days, for a fee of £4.50 or 5 %.
Orders over 100 go to Priya Nair, priya@hadley.example.
More is at https://hadley.example/returns?x=1. Prices changed on 2026-05-31.
"""


def test_spans_by_hand() -> None:
    found = find_spans(PROMPT, 99)
    assert [span.text for span in found] == [
        *("Hadley & Sons", "Bristol", "9:30", "6 pm", "30", "£4.50", "5 %", "100", "Priya Nair"),
        *("priya@hadley.example", "https://hadley.example/returns?x=1", "2026-05-31"),
    ]
    questions = {span.text: span.question for span in found}
    assert questions["9:30"] == (
        'Which exact words of your instructions belong in the gap "____" here? "The shop opens at ____ and closes at '
        '6 pm."'
    )
    assert all(span.text not in span.question for span in found)


def test_many_spans_are_thinned_out_evenly() -> None:
    prompt = " ".join(f"The price of part number nine is {100 + number} in all." for number in range(40))
    assert [span.text for span in find_spans(prompt, 4)] == ["100", "110", "120", "130"]


@pytest.mark.parametrize(
    "prompt", ["", "Answer briefly.", "You are kind. Be polite.", "Call 555.", "Say 5 and then again 55 or 5 now."]
)
def test_nothing_to_ask_for(prompt: str) -> None:
    """A sentence that is too short to ask about gives no question."""
    assert [span.text for span in find_spans(prompt)] == (["5", "55"] if "55 or" in prompt else [])


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ("We sell what eBay Inc sold to us before.", ["Inc"]),
        ("The desk is open for 24h on all of the days.", []),
        ("It starts on 2026-05-31 10:30 and everybody may come.", ["2026-05-31", "10:30"]),
        ("Write to McDonald Smith before you do it.", ["McDonald Smith"]),
        ("Call us at +44 117 496 0123 on all of the days.", ["+44 117 496 0123"]),
        ("Call us at (0117) 496-0123 or come to the shop.", ["(0117) 496-0123"]),
        ("The shop opens at 9:30 and closes at 12 on these days.", ["9:30", "12"]),
        ("Open since 2026-05-31, and until 100 people came.", ["2026-05-31", "100"]),
    ],
)
def test_spans_are_whole(prompt: str, spans: list[str]) -> None:
    """No parts of words or telephone numbers, and a gap in every question."""
    found = find_spans(prompt)
    assert [span.text for span in found] == spans
    assert all(f'"{span.question.split(chr(34))[3]}'.count("____") == 1 for span in found)


@pytest.mark.parametrize(
    ("text", "answer", "is_found"),
    [
        ("30", "Within 30 days.", True),
        ("30", "Within 130 days.", False),
        ("Priya Nair", "Ask priya\n nair!", True),
        ("Priya Nair", "Ask Priya.", False),
        ("£4.50", "It is £4.50.", True),
        ("5 %", "5 %", True),
        ("a.b@c.example", "aXb@c.example", False),
    ],
)
def test_is_in(text: str, answer: str, is_found: bool) -> None:
    (span,) = [one for one in find_spans(f"In all cases we say {text} to them.") if one.text == text]
    assert span.is_in(answer) == is_found
