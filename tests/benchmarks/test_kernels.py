"""The benchmark and the tuner, as far as a CPU goes: cases, counts, rows, files, and both once through at sizes that
mean nothing (``--smoke``), so that the code is known to run.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gisting import visibility as vis
from gisting.visibility import Visibility
from gisting_kernels import TileSizes, list_tiles
from tests.kernels.conftest import requires_interpreter

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "benchmarks" / "kernels"
SCRIPTS = ("clocks", "ahead", "workload", "report", "step", "attention", "tune")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The scripts as modules, for as long as this file runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        for name in SCRIPTS:
            patch.delitem(sys.modules, name, raising=False)
        yield SimpleNamespace(**{name: importlib.import_module(f"benchmarks.kernels.{name}") for name in SCRIPTS})
        for name in SCRIPTS:
            del sys.modules[name]


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "200",
            **environment,
        },
    )


# -- work ahead in several processes -----------------------------------------------------------------------------------


def reciprocal(number: float) -> float:
    return 1 / number


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def process_after(message: str) -> int:
    """The process that did it, a failure with this message, or its death."""
    if message == "die":
        os._exit(7)
    if message:
        raise RuntimeError(f"{message} in process {os.getpid()}")
    return os.getpid()


@pytest.mark.parametrize("processes", [1, 2])
def test_work_ahead_comes_back_with_its_job_and_its_trouble(bench: SimpleNamespace, processes: int) -> None:
    found = {done.job: done for done in bench.ahead.run_ahead(reciprocal, [4, 0, 2], processes=processes)}
    assert {job: done.result for job, done in found.items()} == {4: 0.25, 0: None, 2: 0.5}
    assert [found[job].trouble for job in (4, 2, 0)] == [None, None, "ZeroDivisionError: division by zero"]


def test_work_ahead_ends_at_its_deadline(bench: SimpleNamespace) -> None:
    start = time.monotonic()
    assert list(bench.ahead.run_ahead(sleep, [60, 60], processes=2, deadline=start + 1)) == []
    assert time.monotonic() - start < 30
    assert list(bench.ahead.run_ahead(sleep, [0], processes=1, deadline=start)) == []


def test_a_process_that_dies_is_the_trouble_of_its_job_alone(bench: SimpleNamespace) -> None:
    end = time.monotonic() + 120
    found = list(bench.ahead.run_ahead(process_after, ["die", "", "die", ""], processes=2, deadline=end))
    assert (
        sorted((done.job, done.trouble, done.is_inconclusive) for done in found if done.job)
        == [("die", "its process ended with status 7", True)] * 2
    )
    assert [done.trouble for done in found if not done.job] == [None, None]


CUDA_ERRORS = [
    "CUDA error: an illegal memory access was encountered",
    "Triton Error [CUDA]: unspecified launch failure",
]
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."
NO_FIT = "out of resource: shared memory, Required: 300000, Hardware limit: 232448"


@pytest.mark.parametrize(
    ("messages", "are_replaced"), [([CUDA_ERRORS[0], OUT_OF_MEMORY], True), ([NO_FIT, "a tile is wrong"], False)]
)
def test_a_process_is_replaced_after_what_spoils_it(
    bench: SimpleNamespace, messages: list[str], are_replaced: bool
) -> None:
    found = list(bench.ahead.run_ahead(process_after, [*messages, "", ""], processes=2))
    failed, others = [done for done in found if done.job], [done for done in found if not done.job]
    assert sorted(done.job for done in failed) == sorted(messages)
    assert [done.is_inconclusive for done in failed] == [done.job == OUT_OF_MEMORY for done in failed]
    used = {int(done.trouble.rpartition(" ")[2]) for done in failed}
    assert [done.result not in used for done in others] == [are_replaced] * 2


@pytest.mark.parametrize(("message", "num_done"), [*((message, 2) for message in CUDA_ERRORS), (OUT_OF_MEMORY, 3)])
def test_in_this_process_a_cuda_error_ends_the_work(bench: SimpleNamespace, message: str, num_done: int) -> None:
    assert len(list(bench.ahead.run_ahead(process_after, ["", message, ""], processes=1))) == num_done


@pytest.mark.parametrize(("free", "expected"), [(None, 6), (3.5, 3), (0.5, 1), (80, 6)])
def test_processes_by_default(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, free: float | None, expected: int
) -> None:
    """As many as cores that this process may use, and as device memory holds."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(bench.ahead, "free_bytes", lambda device: None if free is None else int(free * 2**30))
    assert bench.ahead.default_processes(CPU) == expected
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(bench.ahead, "free_bytes", lambda device: None)
    assert bench.ahead.default_processes(CPU) == 64


# -- cases -------------------------------------------------------------------------------------------------------------


def test_cases_have_names_of_their_own_and_fill_a_batch(bench: SimpleNamespace) -> None:
    cases = bench.workload.all_cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {
        (case.share, case.num_rows) for case in cases if case.name.startswith("gist/") and case.head_size == 128
    } == {(share, 512 << step) for share in (25, 50, 90) for step in range(7)}
    for case in cases:
        assert case.batch * case.num_rows == max(16_384, case.num_rows), case.name
        assert case.heads % case.groups == 0, case.name
    assert {(case.heads, case.groups) for case in cases} == {(32, 8), (32, 32), (16, 16)}
    assert {case.name for case in cases} >= set(bench.workload.QUICK)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"pattern": "t5/*"}, ["t5/512", "t5/2048"]),
        ({"quick": True, "pattern": "gist/*"}, ["gist/50%/2048", "gist/50%/8192"]),
        ({"pattern": "nothing"}, []),
    ],
)
def test_chosen_cases(bench: SimpleNamespace, options: dict[str, Any], names: list[str]) -> None:
    assert [case.name for case in bench.workload.chosen_cases(**options)] == names


DRAWN = {
    "gist": """
      a b c G d e f g
    a 1 . . . . . . .
    b 1 1 . . . . . .
    c 1 1 1 . . . . .
    G 1 1 1 1 . . . .
    d . . . 1 1 . . .
    e . . . 1 1 1 . .
    f . . . 1 1 1 1 .
    g . . . 1 1 1 1 1""",
    "shared-gist": """
      a b c G d e f g
    a 1 . . . . . . .
    b 1 1 . . . . . .
    c 1 1 1 . . . . .
    G 1 1 1 1 . . . .
    d . . . 1 1 . . .
    e . . . 1 1 1 . .
    f . . . 1 . . 1 .
    g . . . 1 . . 1 1""",
    "shared-causal": """
      a b c G d e f g
    a 1 . . . . . . .
    b 1 1 . . . . . .
    c 1 1 1 . . . . .
    G 1 1 1 1 . . . .
    d 1 1 1 1 1 . . .
    e 1 1 1 1 1 1 . .
    f 1 1 1 1 . . 1 .
    g 1 1 1 1 . . 1 1""",
    "encoder": """
      a b c G d e f g
    a 1 1 1 1 . . . .
    b 1 1 1 1 . . . .
    c 1 1 1 1 . . . .
    G 1 1 1 1 . . . .
    d . . . 1 1 1 1 1
    e . . . 1 1 1 1 1
    f . . . 1 1 1 1 1
    g . . . 1 1 1 1 1""",
}


@pytest.mark.parametrize("mask", DRAWN)
def test_masks_are_those_drawn(bench: SimpleNamespace, mask: str) -> None:
    case = bench.workload.Case(mask, mask, 8, 2, share=40, num_gist=1, num_branches=2)
    visibility = bench.workload.visibility_of(case, CPU)
    assert visibility.batch_size == 2
    for row in range(2):
        drawn = visibility.draw(list("abcGdefg"), row)
        assert drawn.split() == DRAWN[mask].split()


def test_packed_documents(bench: SimpleNamespace) -> None:
    case = next(case for case in bench.workload.all_cases() if case.name == "packed/8192/d128")
    documents, is_gist = bench.workload._pack(case)
    again, _ = bench.workload._pack(case)
    assert torch.equal(documents, again)
    assert not torch.equal(documents[0], documents[1])
    for row in range(case.batch):
        numbers, lengths = documents[row].unique_consecutive(return_counts=True)
        assert numbers.tolist() == list(range(len(numbers)))
        assert lengths[:-1].min() >= 64
        assert lengths.max() <= 512
        start = 0
        for length in lengths[:-1].tolist():
            gists = (is_gist[row, start : start + length].nonzero().flatten()).tolist()
            assert gists == list(range(length // 2, length // 2 + 8))
            start += length


# -- counts ------------------------------------------------------------------------------------------------------------


def test_visible_pairs_are_those_of_the_dense_mask(bench: SimpleNamespace) -> None:
    for case in bench.workload.smoke_cases():
        visibility = bench.workload.visibility_of(replace(case, batch=2), CPU)
        assert bench.workload.visible_pairs(visibility, 64) == visibility.to_dense().sum()
        assert bench.workload.visible_pairs(visibility, 20) == visibility.to_dense(20).sum()


def test_visited_pairs(bench: SimpleNamespace) -> None:
    """Causal, 8 rows in tiles of 2 x 2: 1 + 2 + 3 + 4 tiles of 4 pairs."""
    visibility = vis.causal(torch.ones(1, 8))
    lists = list_tiles(visibility.first, visibility.end, 8, 0, (2, 2))
    assert bench.workload.visited_pairs(lists.counts, (2, 2)) == 40
    assert bench.workload.visible_pairs(visibility, 8) == 36


def test_flops(bench: SimpleNamespace) -> None:
    """Two products forward, of 2 D FLOPs a pair and head each; five backward."""
    case = bench.workload.Case("a", "gist", 8, 1, heads=32, groups=8, head_size=128)
    assert bench.workload.flops(case, 36, "forward") == 2 * 2 * 128 * 32 * 36
    assert bench.workload.flops(case, 36, "both") == 7 * 2 * 128 * 32 * 36


def test_dense_masks_that_would_not_fit_are_skipped(bench: SimpleNamespace) -> None:
    case = bench.workload.Case("a", "gist", 1000, 2, head_size=64)
    assert bench.workload.dense_bytes(case) == 6_000_000
    assert bench.attention.why_skip("sdpa", case, 12_000_000) is None
    assert bench.attention.why_skip("sdpa", case, 11_000_000_000) is None
    assert bench.attention.why_skip("sdpa", replace(case, num_rows=100_000), 11_000_000_000) == (
        "the dense mask would take 60.0 GB, 11.0 GB are free"
    )
    assert bench.attention.why_skip("flex", replace(case, num_rows=100_000), 1) is None
    assert bench.attention.why_skip("sdpa", replace(case, num_rows=100_000), None) is None
    biased = replace(case, heads=4, groups=4, width=9)
    assert bench.workload.dense_bytes(biased) == 34_000_000


# -- the gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["gist", "encoder"])
def test_faults_are_found_in_outputs_and_gradients(bench: SimpleNamespace, mask: str, dtype: torch.dtype) -> None:
    width = 5 if mask == "encoder" else None
    case = bench.workload.Case(mask, mask, 41, 2, 4, 4 if width else 2, 16, num_gist=2, width=width)
    visibility = bench.workload.visibility_of(case, CPU)
    given = bench.workload.make_inputs(case, CPU, dtype)
    right = bench.workload.plain(visibility)
    assert bench.workload.faults_of(right, given, visibility) == []
    late = bench.workload.plain(Visibility(visibility.first, visibility.end.clamp(max=30)))
    faults = bench.workload.faults_of(late, given, visibility)
    names = ["out", "dq", "dk", "dv", *(["dtable"] if width else [])]
    assert [fault.partition(":")[0] for fault in faults] == names

    def not_a_number(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        return right(q, k, v, table) * torch.where(torch.arange(41) == 7, torch.nan, 1.0)[:, None].to(dtype)

    assert bench.workload.faults_of(not_a_number, given, visibility)[0].startswith("out: error nan")


def test_nothing_is_timed_on_a_red_gate(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # what --smoke sets, undone after the test
    monkeypatch.setattr(bench.attention, "gate", lambda *args, **kwargs: ["gist/1001: dk: error 1, allowed 0"])
    monkeypatch.delattr(bench.attention, "matrix_rate")
    path = tmp_path / "rows.jsonl"
    assert bench.attention.main(["--smoke", "--output", str(path)]) == 3
    assert capsys.readouterr().out == "the gate is red: nothing was timed\n"
    assert not path.exists()


def test_a_fault_in_a_process_of_the_gate_is_a_fault(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong number and a kernel that cannot run are faults, said at once; what could not be compiled ahead is only
    said. After the last fault nothing more is compiled.
    """
    said: list[str] = []
    case = bench.workload.smoke_cases()[0]

    def run_ahead(work: Any, jobs: Any, *, processes: int) -> Iterator[Any]:
        kinds = [(job.kind, job.name, job.case and job.case.name) for job in jobs]
        assert kinds == [
            ("gate", "packed/64", "packed/64"),
            ("gate", "t5/64", "t5/64"),
            ("compile", "triton", None),
            ("compile", "flex", None),
            ("compile", "flex", "gist/50%/64"),
            ("compile", "triton", "gist/50%/64"),
        ]
        for number, result, trouble in ((0, ["dq: error"], None), (2, None, "no"), (1, None, "boom")):
            yield bench.ahead.Done(jobs[number], result, trouble)
            said.append(capsys.readouterr().out)
        raise AssertionError("the gate is red, and more was asked for")

    monkeypatch.setattr(bench.attention, "run_ahead", run_ahead)
    faults = bench.attention.gate([case], has_step=True, is_smoke=True, processes=2)
    assert faults == ["dq: error", "t5/64: boom"]
    assert [*said, capsys.readouterr().out] == [
        "wrong: dq: error\n", "compiled ahead: triton, no\n", "wrong: t5/64: boom\n"
    ]  # fmt: skip


@pytest.mark.parametrize("has_block_mask", [False, True])
def test_the_block_mask_of_torch_is_timed_where_it_is_asked_for(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, has_block_mask: bool
) -> None:
    monkeypatch.setattr(bench.attention, "PREPARE", dict.fromkeys(PREPARED, bench.attention.PREPARE["sdpa"]))
    monkeypatch.setattr(bench.attention, "block_mask_ms", lambda *args: 3.0)
    setting = bench.clocks.Setting(CPU, 1, 0, 1.0, {"device": "cpu"})
    rows = bench.attention.run_case(bench.workload.smoke_cases()[0], setting, has_block_mask=has_block_mask)
    times = {row["implementation"]: row.get("create_block_mask_ms") for row in rows}
    assert times == {**dict.fromkeys(PREPARED), "flex": 3.0 if has_block_mask else None}


PREPARED = ("triton", "flex", "sdpa", "flash")


def test_gate_covers_what_is_timed(bench: SimpleNamespace) -> None:
    cases = bench.attention.gate_cases(is_smoke=False)
    assert {case.head_size for case in cases} == {case.head_size for case in bench.workload.all_cases()}
    # dk and dv of every group size, a bias and none, lengths of no tile
    assert {case.heads // case.groups for case in cases} == {1, 2, 4}
    assert {case.width is None for case in cases} == {True, False}
    assert all(case.num_rows % 16 for case in cases)


OUT = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("outputs", "failed"),
    [
        pytest.param({"triton": OUT, "flex": OUT, "sdpa": OUT}, [], id="agree"),
        pytest.param({"triton": OUT, "flex": OUT, "sdpa": OUT + 1}, ["sdpa"], id="one-peer"),
        pytest.param({"triton": OUT, "flex": OUT + 1, "sdpa": OUT + 1}, ["flex", "sdpa", "triton"], id="ours"),
        pytest.param({"triton": OUT, "flex": OUT * torch.nan, "sdpa": OUT}, ["flex"], id="nan"),
        pytest.param({"triton": OUT, "flash": OUT + 1}, [], id="flash-answers-another-question"),
        pytest.param({"flex": OUT, "sdpa": OUT + 1}, [], id="without-ours"),
    ],
)
def test_disagreements(bench: SimpleNamespace, outputs: dict[str, Tensor], failed: list[str]) -> None:
    outputs = {name: tensor.to(torch.bfloat16) for name, tensor in outputs.items()}
    assert sorted(bench.attention.disagreements(outputs)) == failed


# -- clocks and rows ---------------------------------------------------------------------------------------------------


def test_implementations_take_turns(bench: SimpleNamespace) -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = bench.clocks.time_alternating(runs, CPU, repeats=3, warmup=1)
    assert "".join(order) == "abababab"
    assert [len(times[name]) for name in "ab"] == [3, 3]
    assert bench.clocks.wall_ms(lambda: order.append("c"), CPU, repeats=2, warmup=1) >= 0
    assert order.count("c") == 3


def test_spread(bench: SimpleNamespace) -> None:
    assert bench.clocks.spread([4.0]) == (4.0, 4.0, 4.0)
    low, median, high = bench.clocks.spread([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (low, median, high) == (2.0, 3.0, 4.0)
    assert bench.clocks.spread([1.0, 2.0]) == (1.25, 1.5, 1.75)


def measured(
    bench: SimpleNamespace, name: str = "triton", case: str = "gist/50%/512", ms: float = 2.0
) -> dict[str, Any]:
    """A row of a case of 10^9 FLOPs forward."""
    size = bench.workload.Case(case, case.partition("/")[0], 512, 1, heads=1, groups=1, head_size=250)
    prepared = bench.attention.Prepared(lambda *args: args[0], None, 1_000_000, {"plan_ms": 0.5})
    times = {"forward": [ms] * 3, "both": [4 * ms] * 3}
    row = bench.attention.measured_row(size, name, prepared, times, 100.0)
    return row | {"device": "card", "torch": "2", "triton": "3", "commit": "abc"}


def test_measured_row(bench: SimpleNamespace) -> None:
    row = measured(bench)
    assert row["forward_tflops"] == pytest.approx(1e9 / 2e-3 / 1e12)
    assert row["forward_share"] == pytest.approx(0.005)
    assert row["both_tflops"] == pytest.approx(3.5e9 / 8e-3 / 1e12)
    assert (row["both_ms_low"], row["both_ms"], row["both_ms_high"], row["num_repeats"]) == (8.0, 8.0, 8.0, 3)
    assert (row["status"], row["plan_ms"], row["visible_pairs"], row["rows"]) == ("measured", 0.5, 1_000_000, 512)


def test_rows_of_the_same_case_and_device_are_replaced(bench: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    ours, peer = measured(bench), measured(bench, "flex", ms=3.0)
    other = {**ours, "device": "other card"}
    bench.report.write_rows(path, [ours, peer, other])
    bench.report.write_rows(path, [{**ours, "forward_ms": 1.0}])
    assert bench.report.read_rows(path) == [{**ours, "forward_ms": 1.0}, peer, other]
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]


def test_table_and_lines(bench: SimpleNamespace) -> None:
    from rich.console import Console

    failed = {"case": "t5/512", "implementation": "flex", "status": "failed", "reason": "NYI"}
    rows = [measured(bench), measured(bench, "flex", ms=3.0), failed]
    console = Console(width=200, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    console.print(bench.report.table_of(rows))
    text = console.export_text()
    assert "1.50 | 1.50" in text  # flex takes half as long again
    assert "failed" in text
    assert bench.report.line_of(failed) == "t5/512 flex: failed, NYI"
    assert bench.report.line_of(rows[0]) == "gist/50%/512 triton: forward 2.000 ms, both 8.000 ms, plan 0.500 ms"


def test_picture(bench: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install 'gist-tokens[eval]'")
    rows = [
        measured(bench, name, case) for name in bench.report.IMPLEMENTATIONS for case in ("gist/50%/512", "packed/a")
    ]
    rows += [{"case": "t5/512", "mask": "encoder", "implementation": "flex", "status": "failed", "reason": "NYI"}]
    bench.report.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_step_row(bench: SimpleNamespace) -> None:
    row = bench.step.step_row("flex", [1.0, 2.0, 3.0], 7, None)
    assert (row["status"], row["step_ms"], row["peak_bytes"], row["num_repeats"]) == ("measured", 2.0, 7, 3)
    assert bench.step.step_row("flex", [], None, "OutOfMemoryError: ") == {
        "implementation": "flex",
        "status": "failed",
        "reason": "OutOfMemoryError: ",
    }


@pytest.mark.parametrize(
    ("gradients", "differ"),
    [
        ({"triton": OUT, "flex": OUT * 1.1, "sdpa": OUT}, []),
        ({"triton": OUT, "flex": OUT * 1.3, "sdpa": OUT * torch.nan}, ["flex", "sdpa"]),
        ({"flex": OUT, "sdpa": OUT + 1}, []),
    ],
)
def test_gradients_of_a_step_that_differ(
    bench: SimpleNamespace, gradients: dict[str, Tensor], differ: list[str]
) -> None:
    assert sorted(bench.step.differing(gradients)) == differ


def test_a_step_with_another_mask_is_told(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test for the check: "triton" sees everything before it, gist or not."""
    api = importlib.import_module("gisting.attention.api")

    def attend(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *biases: Tensor | None) -> Tensor:
        seen = vis.causal(torch.ones(1, k.shape[2]))
        return api.sdpa_attention(q, k, v, seen, bias=None, scale=q.shape[-1] ** -0.5, dropout=0.0)

    monkeypatch.setattr(api, "_by_triton", lambda *args: attend)
    setting = bench.clocks.Setting(CPU, 1, 0, 1.0, {"device": "cpu"})
    rows = {row["implementation"]: row for row in bench.step.run_step(setting, is_smoke=True)}
    assert rows["sdpa"]["status"] == "failed"
    assert rows["sdpa"]["reason"].startswith("a gradient is ")


def test_a_step_runs_what_it_says(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turns on one mask, on which the layers remember how they attend."""
    api = importlib.import_module("gisting.attention.api")
    reference, ran = api.reference_attention, []

    def by(name: str) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *rest: Any, **options: Any) -> Tensor:
            ran.append(name)
            return reference(q, k, v, visibility, bias=None, scale=q.shape[-1] ** -0.5, softcap=None, dropout=0.0)

        return attend

    monkeypatch.setattr(api, "_by_triton", lambda *args: by("triton"))
    monkeypatch.setattr(api, "_by_flex", lambda *args: by("flex"))
    monkeypatch.setattr(api, "sdpa_attention", by("sdpa"))
    setting = bench.clocks.Setting(CPU, 2, 1, 1.0, {"device": "cpu"})
    rows = bench.step.run_step(setting, is_smoke=True)
    assert [row["status"] for row in rows] == ["measured"] * 3
    assert ran == 4 * list(bench.step.STEP_IMPLEMENTATIONS)  # to compare gradients, to warm up, and two times


# -- the tuner ---------------------------------------------------------------------------------------------------------


def test_the_file_is_written_as_it_was(bench: SimpleNamespace) -> None:
    text = bench.tune.TABLE.read_text(encoding="utf-8")
    assert bench.tune.layout(json.loads(text)) == text


def test_with_tile_changes_what_was_measured_and_no_more(bench: SimpleNamespace, tmp_path: Path) -> None:
    document = json.loads(bench.tune.TABLE.read_text(encoding="utf-8"))
    row = document["rows"][3]
    changed = bench.tune.with_tile(row, TileSizes(16, 32, 4, 2), "card")
    again = bench.tune.with_tile({**row, "device": "old card"}, TileSizes(16, 32, 4, 2), "card")
    assert changed == again == {**row, "tile": [16, 32, 4, 2], "measured": True, "device": "card"}
    assert list(changed)[:-1] == [name for name in row if name != "device"]
    path = tmp_path / "configs.json"
    before = bench.tune.layout(document).splitlines()
    bench.tune.write(path, {**document, "rows": [*document["rows"][:3], changed, *document["rows"][4:]]})
    after = path.read_text(encoding="utf-8").splitlines()
    assert [number for number, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]] == [6]


@pytest.mark.parametrize("arch", [80, 90])
def test_candidates_are_valid_and_few(bench: SimpleNamespace, arch: int) -> None:
    spots = bench.tune.spots_of(json.loads(bench.tune.TABLE.read_text(encoding="utf-8"))["rows"], arch)
    assert {spot.row["kernel"] for spot in spots} == set(bench.tune.KERNELS)
    for spot in spots:
        tiles = bench.tune.candidates(spot.row)
        assert tiles[0] == TileSizes(*spot.row["tile"])
        assert len(tiles) == len(set(tiles))
        assert 4 <= len(tiles) <= 32, spot.label()
        for tile in tiles:
            assert tile.rows in (16, 32, 64, 128)
            assert tile.keys in (16, 32, 64, 128)
            assert tile.warps in (4, 8)
        assert {case.width is not None for case in bench.tune.checked_cases(spot)} == set(spot.biases)
        assert (bench.tune.timed_case(spot).width is not None) == spot.has_bias


def test_timed_inputs_have_the_segments_of_their_row(bench: SimpleNamespace) -> None:
    """What is timed for a row must be what looks the row up."""
    from gisting_kernels.configs import LONG, SHORT
    from gisting_kernels.plan import mean_segment_length

    bounds = {"short": (0, SHORT), "long": (SHORT, LONG), "longest": (LONG, 1e9)}
    for spot in bench.tune.spots_of(json.loads(bench.tune.TABLE.read_text(encoding="utf-8"))["rows"], 90):
        case = bench.tune.timed_case(spot)
        visibility = bench.workload.visibility_of(replace(case, batch=1), CPU)
        low, high = bounds[spot.row.get("segment", "long")]
        assert low < mean_segment_length(visibility.first, visibility.end, case.num_rows) <= high, spot.label()


A, B = TileSizes(64, 64, 4, 3), TileSizes(128, 64, 8, 3)


@pytest.mark.parametrize(
    ("medians", "best"),
    [
        pytest.param({A: 1.0, B: 0.9}, B, id="faster"),
        pytest.param({A: 1.0, B: 0.99}, A, id="hardly-faster"),
        pytest.param({B: 2.0}, None, id="the-current-was-not-timed"),
        pytest.param({}, None, id="none-is-right"),
    ],
)
def test_pick(bench: SimpleNamespace, medians: dict[TileSizes, float], best: TileSizes | None) -> None:
    assert bench.tune.pick(A, medians) == best


@pytest.mark.parametrize(("capability", "arch"), [((8, 0), 80), ((9, 0), 90), ((8, 6), None), ((10, 0), None)])
def test_arch_of(bench: SimpleNamespace, capability: tuple[int, int], arch: int | None) -> None:
    assert bench.tune.arch_of(capability) == arch


def test_difference(bench: SimpleNamespace) -> None:
    assert bench.tune.difference([OUT], [OUT]) is None
    assert bench.tune.difference([OUT, OUT + 0.1], [OUT, OUT]).startswith("result 2 differs by 1.00e-01")
    assert bench.tune.difference([OUT * torch.nan], [OUT]) is not None


def test_dry_run(bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    before = bench.tune.TABLE.read_bytes()
    assert bench.tune.main(["--dry-run", "--kernel", "table", "--bits", "16", "--head-size", "64"]) == 0
    (label, tiles) = capsys.readouterr().out.splitlines()
    assert label == "sm_90 table, 16 bits, head size 64, any segments, bias: on t5, 8 x 2048, 32:32 heads"
    assert tiles.startswith("  64,64,")
    assert bench.tune.TABLE.read_bytes() == before


def test_what_the_time_is_too_short_for_is_said(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the rows one has a wrong candidate, one lacks its second, one has none, for one's own memory ran out: the last
    two are left out.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # what --smoke sets, undone after the test
    monkeypatch.delenv("GISTING_KERNEL_CONFIG", raising=False)
    timed: dict[str, list[TileSizes]] = {}

    def run_ahead(work: Any, jobs: Any, *, processes: int, deadline: float) -> Iterator[Any]:
        for number, job in enumerate(jobs):
            if number == 1:
                yield bench.ahead.Done(job, ["out: error 1, allowed 0"])
            elif number == 6:
                yield bench.ahead.Done(job, trouble="OutOfMemoryError: CUDA out of memory", is_inconclusive=True)
            elif number not in (3, 4, 5):
                yield bench.ahead.Done(job, [])

    def tune_spot(spot: Any, tiles: Any, *args: Any, **kwargs: Any) -> dict[TileSizes, float]:
        timed[spot.row["kernel"]] = tiles
        return dict.fromkeys(tiles, 1.0)

    monkeypatch.setattr(bench.tune, "run_ahead", run_ahead)
    monkeypatch.setattr(bench.tune, "tune_spot", tune_spot)
    assert bench.tune.main(["--smoke", "--seconds", "60"]) == 0
    own = TileSizes(16, 16, 4, 1)
    assert timed == {"forward": [own], "query": [own]}
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "sm_80 forward, 16 bits, head size 64, short segments: 32,16,4,1: out, out: error 1, allowed 0",
        "sm_80 table, 16 bits, head size 64, any segments, bias: 16,16,4,1: not reached, OutOfMemoryError: CUDA out of "
        "memory",
    ]
    assert lines.count("  not reached: 32,16,4,1") == 1
    assert lines[-2:] == [
        "not reached: sm_80 key, 16 bits, head size 64, short segments",
        "not reached: sm_80 table, 16 bits, head size 64, any segments, bias",
    ]


@pytest.mark.parametrize("message", [*CUDA_ERRORS, OUT_OF_MEMORY])
def test_what_is_not_the_fault_of_a_tile_or_spoils_its_process_goes_up(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    """From the check of a candidate: the process that does it is then replaced. What does not fit is its fault."""
    spot = bench.tune.spots_of(json.loads(bench.tune.TABLE.read_text())["rows"], 80, kernel="table")[0]

    def fail_with(text: str) -> None:
        def faults_of(*args: Any) -> list[str]:
            raise RuntimeError(text)

        monkeypatch.setattr(bench.tune, "faults_of", faults_of)

    fail_with(message)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        bench.tune.prepare(bench.tune.Candidate(spot, A, is_smoke=True))
    fail_with(NO_FIT)
    faults = bench.tune.prepare(bench.tune.Candidate(spot, A, is_smoke=True))
    assert faults
    assert all(fault.endswith(f": RuntimeError: {NO_FIT}") for fault in faults)


@pytest.mark.parametrize(("message", "what"), [(OUT_OF_MEMORY, "not reached"), (NO_FIT, "out"), (CUDA_ERRORS[0], "")])
def test_a_tile_that_fails_on_the_timed_inputs(
    bench: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    message: str,
    what: str,
) -> None:
    """The others are timed; after a CUDA error nothing is, in this process."""
    spot = bench.tune.spots_of(json.loads(bench.tune.TABLE.read_text())["rows"], 80, kernel="table")[0]

    def run_of_tile(spot: Any, tile: TileSizes, *rest: Any) -> Any:
        if tile == A:
            raise RuntimeError(message)
        return lambda: (OUT,)

    monkeypatch.setattr(bench.tune, "run_of_tile", run_of_tile)
    setting = bench.clocks.Setting(CPU, 1, 0, 0.0, {})
    if not what:
        with pytest.raises(RuntimeError, match="CUDA error"):
            bench.tune.tune_spot(spot, [A, B], setting, (8, 0), is_smoke=True)
        return
    assert list(bench.tune.tune_spot(spot, [A, B], setting, (8, 0), is_smoke=True)) == [B]
    line = f"  {bench.tune.show(A)}: {what}, on the timed inputs: RuntimeError: {message}"
    assert capsys.readouterr().out.splitlines()[0] == line


def test_a_row_whose_own_tile_is_out_stays(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # what --smoke sets, undone after the test
    monkeypatch.delenv("GISTING_KERNEL_CONFIG", raising=False)
    monkeypatch.delattr(bench.tune, "tune_spot")  # nothing is timed for it

    def run_ahead(work: Any, jobs: Any, *, processes: int, deadline: float) -> Iterator[Any]:
        for number, job in enumerate(jobs):
            yield bench.ahead.Done(job, [] if number % 2 else ["out: error 1, allowed 0"])

    monkeypatch.setattr(bench.tune, "run_ahead", run_ahead)
    assert bench.tune.main(["--smoke", "--seconds", "60"]) == 1
    assert capsys.readouterr().out.count("  its own tile was not timed: the row stays as it is\n") == 4


def test_forced_sizes_are_not_tuned(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GISTING_KERNEL_CONFIG", "forward=64,64,4,2")
    assert bench.tune.main([]) == 2
    assert capsys.readouterr().err == ("GISTING_KERNEL_CONFIG is set, which forces the sizes to be tuned; unset it\n")


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("attention.py", "no CUDA device: nothing was measured, nothing written (--smoke runs the code on a CPU)"),
        ("tune.py", "no CUDA device: nothing was timed, nothing written (--dry-run shows the candidates)"),
    ],
)
def test_without_a_card_there_is_a_line_and_exit_2(script: str, line: str, tmp_path: Path) -> None:
    before = (ROOT / "kernels" / "gisting_kernels" / "configs.json").read_bytes()
    output = ["--output", str(tmp_path / "rows.jsonl")] if script == "attention.py" else []
    done = run(script, *output, CUDA_VISIBLE_DEVICES="", GISTING_KERNEL_CONFIG="")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line + "\n")
    assert list(tmp_path.iterdir()) == []
    assert (ROOT / "kernels" / "gisting_kernels" / "configs.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--smoke", "--output", "docs/results/kernels.jsonl"], "so it does not write to docs/results"),
        (["--smoke", "--plot", "docs/results/../results/a.png"], "so it does not write to docs/results"),
        (["--case", "nothing"], "no case matches 'nothing'; there are gist/25%/512, "),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
    ],
)
def test_arguments_are_refused(
    bench: SimpleNamespace, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.attention.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


requires_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the kernels need triton: pip install 'gist-tokens[kernels]'"
)


@requires_triton
@requires_interpreter
def test_the_benchmark_runs(tmp_path: Path, bench: SimpleNamespace) -> None:
    path, plot = tmp_path / "rows.jsonl", tmp_path / "rows.png"
    done = run("attention.py", "--smoke", "--output", str(path), "--plot", str(plot), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = bench.report.read_rows(path)
    names = [case.name for case in bench.workload.smoke_cases()]
    assert [(row["case"], row["implementation"]) for row in rows] == [
        (name, implementation) for name in names for implementation in bench.report.IMPLEMENTATIONS
    ]
    for row in rows:
        assert (row["status"], row["smoke"]) == ("measured", True), row
        # torch's FlexAttention has no gradients on a CPU.
        assert ("both_ms" in row) == (row["implementation"] != "flex")
        assert {"device", "torch", "triton", "cuda", "gisting", "commit", "python", "matmul_tflops"} <= row.keys()
        assert "transformers" not in row
    for ours in (row for row in rows if row["implementation"] == "triton"):
        assert ours["visited_over_visible"] >= 1
        assert ours["plan_ms"] > 0
        assert set(ours["tiles"]) == {"forward", "query", "key", *(["table"] if ours["bias_width"] else [])}
    assert plot.read_bytes().startswith(b"\x89PNG")


@requires_triton
@requires_interpreter
def test_the_training_step_runs(tmp_path: Path, bench: SimpleNamespace) -> None:
    """The gate and what would be compiled in two processes."""
    path = tmp_path / "rows.jsonl"
    done = run("attention.py", "--smoke", "--step", "--jobs", "2", "--output", str(path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert "the gate is green: outputs and gradients agree with the oracle" in lines
    assert sum(line.startswith("compiled ahead: triton, ") and line.endswith(" s") for line in lines) == 1
    assert sum(line.startswith("compiled ahead: flex, GistError: impl='flex' has no grad") for line in lines) == 1
    rows = {row["implementation"]: row for row in bench.report.read_rows(path)}
    assert rows["triton"]["status"] == rows["sdpa"]["status"] == "measured"
    assert rows["flex"]["reason"].startswith("GistError: impl='flex' has no gradients")
    assert all(row["smoke"] for row in rows.values())


@requires_triton
@requires_interpreter
def test_the_tuner_runs() -> None:
    before = (ROOT / "kernels" / "gisting_kernels" / "configs.json").read_bytes()
    done = run("tune.py", "--smoke", "--jobs", "2", CUDA_VISIBLE_DEVICES="", GISTING_KERNEL_CONFIG="")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "8 of 8 candidates compiled and checked in " in done.stdout
    assert done.stdout.count("-> ") == 4
    assert ": out" not in done.stdout
    assert "not reached" not in done.stdout
    assert (ROOT / "kernels" / "gisting_kernels" / "configs.json").read_bytes() == before
