"""What `gisting train` shows: a bar in a terminal, otherwise a line for each report."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from gisting.measure import training
from gisting.measure.training import ShownTraining


def steps(shown: ShownTraining, *, start: int = 0, is_first: bool = True) -> None:
    """Train from ``start`` to step 4, with a report after every second step."""
    state: Any = SimpleNamespace(global_step=start, max_steps=4, is_world_process_zero=is_first)
    with shown:
        shown.on_train_begin(None, state, None)
        for state.global_step in range(start + 1, 5):
            shown.on_step_end(None, state, None)
            if state.global_step % 2 == 0:
                shown.on_log(None, state, None, logs={"loss": 1 / state.global_step, "grad_norm": 3.0})
        shown.on_log(None, state, None, logs={"train_runtime": 1.0})
        shown.on_train_end(None, state, None)


def test_a_line_for_each_report(capsys: pytest.CaptureFixture[str]) -> None:
    steps(ShownTraining())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(
        "step 2 of 4: loss 0.5000, 0:00:0[01] left\nstep 4 of 4: loss 0.2500, 0:00:00 left\n", captured.err
    )


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    steps(ShownTraining(), is_first=False)
    assert capsys.readouterr().err == ""


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    steps(ShownTraining(), start=2)
    shown = capsys.readouterr().err
    assert "training" in shown
    assert "100%" in shown
    assert "loss 0.2500" in shown
    assert "step 4 of 4" not in shown


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (61, "0:01:01"), (86_399.6, "24:00:00")])
def test_durations(seconds: float, text: str) -> None:
    assert training._duration(seconds) == text
