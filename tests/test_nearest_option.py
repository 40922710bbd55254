"""An option that does not exist is answered with the ones that could be meant."""

from __future__ import annotations

import pytest

from gisting.cli.shared import nearest

NAMES = ["--learning-rate", "--batch-size", "--num-train-epochs", "--max-new-tokens", "--output", "--num-gist-tokens"]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("--lr", ["--learning-rate"]),
        ("--bs", ["--batch-size"]),
        ("--leaning-rate", ["--learning-rate"]),
        ("--learning_rate", ["--learning-rate"]),
        ("--epochs", ["--num-train-epochs"]),
        ("--batch", ["--batch-size"]),
        ("--max-tokens", ["--max-new-tokens", "--num-gist-tokens"]),
        ("--gist-tokens", ["--num-gist-tokens", "--max-new-tokens"]),
        ("--ouput", ["--output"]),
        ("--zzz", []),
        ("--", []),
    ],
)
def test_nearest(wrong: str, expected: list[str]) -> None:
    assert nearest(wrong, NAMES) == expected


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("train", "--lr", "1"), "--learning-rate"),
        (("eval", "runs/demo", "--dat", "x"), "--data"),
        (("store", "list", "gists", "--jsn"), "--json"),
    ],
)
def test_a_command_suggests(words: tuple[str, ...], name: str, run) -> None:
    done = run(*words)
    assert done.code == 2
    assert name in done.err
