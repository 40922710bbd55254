"""Test the kernels' benchmark and tuner on a CPU: cases, counts, rows, files, and a tiny run of each (``--smoke``)."""

from __future__ import annotations

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
from typing import Any

import pytest
import torch
import typer
from torch import Tensor

from benchmarks.kernels import ahead, attention, clocks, report, step, tune, workload
from gisting import visibility as vis
from gisting.attention import api
from gisting.measure.rows import read_rows
from gisting.visibility import Visibility
from gisting_kernels import TileSizes, list_tiles
from tests.benchmarks.work import process_after, reciprocal, sleep
from tests.kernels.conftest import requires_interpreter
from tests.slow import slow

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m benchmarks`` at the root of the repository."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "HF_HUB_OFFLINE": "1",
            **environment,
        },
    )


# -- work in several processes before the timing -----------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_with_their_jobs(processes: int) -> None:
    found = {done.job: done for done in ahead.run_ahead(reciprocal, [4, 0, 2], processes=processes)}
    assert {job: done.result for job, done in found.items()} == {4: 0.25, 0: None, 2: 0.5}
    assert [found[job].trouble for job in (4, 2, 0)] == [None, None, "ZeroDivisionError: division by zero"]


def test_work_ends_at_its_deadline() -> None:
    start = time.monotonic()
    assert list(ahead.run_ahead(sleep, [60, 60], processes=2, deadline=start + 1)) == []
    assert time.monotonic() - start < 30
    assert list(ahead.run_ahead(sleep, [0], processes=1, deadline=start)) == []


def test_if_a_process_dies_only_its_job_fails() -> None:
    end = time.monotonic() + 120
    found = list(ahead.run_ahead(process_after, ["die", "", "die", ""], processes=2, deadline=end))
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
    ("messages", "are_replaced"),
    [slow([CUDA_ERRORS[0], OUT_OF_MEMORY], True), slow([NO_FIT, "a tile is wrong"], False)],
)
def test_a_process_is_replaced_after_an_error_that_breaks_it(messages: list[str], are_replaced: bool) -> None:
    found = list(ahead.run_ahead(process_after, [*messages, "", ""], processes=2))
    failed, others = [done for done in found if done.job], [done for done in found if not done.job]
    assert sorted(done.job for done in failed) == sorted(messages)
    assert [done.is_inconclusive for done in failed] == [done.job == OUT_OF_MEMORY for done in failed]
    used = {int(done.trouble.rpartition(" ")[2]) for done in failed}
    assert [done.result not in used for done in others] == [are_replaced] * 2


@pytest.mark.parametrize(("message", "num_done"), [*((message, 2) for message in CUDA_ERRORS), (OUT_OF_MEMORY, 3)])
def test_in_this_process_a_cuda_error_ends_the_work(message: str, num_done: int) -> None:
    assert len(list(ahead.run_ahead(process_after, ["", message, ""], processes=1))) == num_done


@pytest.mark.parametrize(("free", "expected"), [(None, 6), (3.5, 3), (0.5, 1), (80, 6)])
def test_processes_by_default(monkeypatch: pytest.MonkeyPatch, free: float | None, expected: int) -> None:
    """One for each core that this process may use, limited by device memory."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(ahead, "free_bytes", lambda device: None if free is None else int(free * 2**30))
    assert ahead.default_processes(CPU) == expected
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(ahead, "free_bytes", lambda device: None)
    assert ahead.default_processes(CPU) == 64


# -- cases -------------------------------------------------------------------------------------------------------------


def test_cases_have_different_names_and_full_batches() -> None:
    cases = workload.all_cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {
        (case.share, case.num_rows) for case in cases if case.name.startswith("gist/") and case.head_size == 128
    } == {(share, 512 << step) for share in (25, 50, 90) for step in range(7)}
    for case in cases:
        assert case.batch * case.num_rows == max(16_384, case.num_rows), case.name
        assert case.heads % case.groups == 0, case.name
    assert {(case.heads, case.groups) for case in cases} == {(32, 8), (32, 32), (16, 16)}
    assert {case.name for case in cases} >= set(workload.QUICK)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"pattern": "t5/*"}, ["t5/512", "t5/2048"]),
        ({"quick": True, "pattern": "gist/*"}, ["gist/50%/2048", "gist/50%/8192"]),
        ({"pattern": "nothing"}, []),
    ],
)
def test_chosen_cases(options: dict[str, Any], names: list[str]) -> None:
    assert [case.name for case in workload.chosen_cases(**options)] == names


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
def test_masks_equal_their_drawings(mask: str) -> None:
    case = workload.Case(mask, mask, 8, 2, share=40, num_gist=1, num_branches=2)
    visibility = workload.visibility_of(case, CPU)
    assert visibility.batch_size == 2
    for row in range(2):
        drawn = visibility.draw(list("abcGdefg"), row)
        assert drawn.split() == DRAWN[mask].split()


def test_packed_documents() -> None:
    case = next(case for case in workload.all_cases() if case.name == "packed/8192/d128")
    documents, is_gist = workload._pack(case)
    again, _ = workload._pack(case)
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


def test_visible_pairs_equal_those_of_the_dense_mask() -> None:
    for case in workload.smoke_cases():
        visibility = workload.visibility_of(replace(case, batch=2), CPU)
        assert workload.visible_pairs(visibility, 64) == visibility.to_dense().sum()
        assert workload.visible_pairs(visibility, 20) == visibility.to_dense(20).sum()


def test_visited_pairs() -> None:
    """A causal mask of 8 rows in tiles of 2 x 2 has 1 + 2 + 3 + 4 tiles of 4 pairs."""
    visibility = vis.causal(torch.ones(1, 8))
    lists = list_tiles(visibility.first, visibility.end, 8, 0, (2, 2))
    assert workload.visited_pairs(lists.counts, (2, 2)) == 40
    assert workload.visible_pairs(visibility, 8) == 36


def test_flops() -> None:
    """Two products forward and five backward, each of 2 D FLOPs for a pair and a head."""
    case = workload.Case("a", "gist", 8, 1, heads=32, groups=8, head_size=128)
    assert workload.flops(case, 36, "forward") == 2 * 2 * 128 * 32 * 36
    assert workload.flops(case, 36, "both") == 7 * 2 * 128 * 32 * 36


def test_dense_masks_that_would_not_fit_are_skipped() -> None:
    case = workload.Case("a", "gist", 1000, 2, head_size=64)
    assert workload.dense_bytes(case) == 6_000_000
    assert attention.why_skip("sdpa", case, 12_000_000) is None
    assert attention.why_skip("sdpa", case, 11_000_000_000) is None
    assert attention.why_skip("sdpa", replace(case, num_rows=100_000), 11_000_000_000) == (
        "the dense mask would take 60.0 GB, 11.0 GB are free"
    )
    assert attention.why_skip("flex", replace(case, num_rows=100_000), 1) is None
    assert attention.why_skip("sdpa", replace(case, num_rows=100_000), None) is None
    biased = replace(case, heads=4, groups=4, width=9)
    assert workload.dense_bytes(biased) == 34_000_000


# -- the gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["gist", "encoder"])
def test_faults_are_found_in_outputs_and_gradients(mask: str, dtype: torch.dtype) -> None:
    width = 5 if mask == "encoder" else None
    case = workload.Case(mask, mask, 41, 2, 4, 4 if width else 2, 16, num_gist=2, width=width)
    visibility = workload.visibility_of(case, CPU)
    given = workload.make_inputs(case, CPU, dtype)
    right = workload.plain(visibility)
    assert workload.faults_of(right, given, visibility) == []
    late = workload.plain(Visibility(visibility.first, visibility.end.clamp(max=30)))
    faults = workload.faults_of(late, given, visibility)
    names = ["out", "dq", "dk", "dv", *(["dtable"] if width else [])]
    assert [fault.partition(":")[0] for fault in faults] == names

    def not_a_number(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        return right(q, k, v, table) * torch.where(torch.arange(41) == 7, torch.nan, 1.0)[:, None].to(dtype)

    assert workload.faults_of(not_a_number, given, visibility)[0].startswith("out: error nan")


def test_nothing_is_timed_on_a_red_gate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # --smoke sets it; restored after the test
    monkeypatch.setattr(attention, "gate", lambda *args, **kwargs: ["gist/1001: dk: error 1, allowed 0"])
    monkeypatch.delattr(attention, "matrix_rate")
    path = tmp_path / "rows.jsonl"
    assert attention.main(smoke=True, output=path) == 3
    assert capsys.readouterr().out == "the gate is red: nothing was timed\n"
    assert not path.exists()


def test_a_fault_in_a_process_of_the_gate_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong numbers and kernels that cannot run are faults, printed at once; a failed compilation is only printed.

    Once the gate is red, nothing more is compiled.
    """
    said: list[str] = []
    case = workload.smoke_cases()[0]

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
            yield ahead.Done(jobs[number], result, trouble)
            said.append(capsys.readouterr().out)
        raise AssertionError("the gate is red, but work goes on")

    monkeypatch.setattr(attention, "run_ahead", run_ahead)
    faults = attention.gate([case], has_step=True, is_smoke=True, processes=2)
    assert faults == ["dq: error", "t5/64: boom"]
    assert [*said, capsys.readouterr().out] == [
        "wrong: dq: error\n", "compiled ahead: triton, no\n", "wrong: t5/64: boom\n"
    ]  # fmt: skip


@pytest.mark.parametrize("has_block_mask", [False, True])
def test_block_mask_also_times_create_block_mask(monkeypatch: pytest.MonkeyPatch, has_block_mask: bool) -> None:
    monkeypatch.setattr(attention, "PREPARE", dict.fromkeys(PREPARED, attention.PREPARE["sdpa"]))
    monkeypatch.setattr(attention, "block_mask_ms", lambda *args: 3.0)
    setting = clocks.Setting(CPU, 1, 0, 1.0, {"device": "cpu"})
    rows = attention.run_case(workload.smoke_cases()[0], setting, has_block_mask=has_block_mask)
    times = {row["implementation"]: row.get("create_block_mask_ms") for row in rows}
    assert times == {**dict.fromkeys(PREPARED), "flex": 3.0 if has_block_mask else None}


PREPARED = ("triton", "flex", "sdpa", "flash")


def test_the_gate_covers_what_is_timed() -> None:
    cases = attention.gate_cases(is_smoke=False)
    assert {case.head_size for case in cases} == {case.head_size for case in workload.all_cases()}
    # every group size, with and without a bias, lengths that are not multiples of a tile
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
        pytest.param({"triton": OUT, "flash": OUT + 1}, [], id="flash-is-not-compared"),
        pytest.param({"flex": OUT, "sdpa": OUT + 1}, [], id="without-ours"),
    ],
)
def test_disagreements(outputs: dict[str, Tensor], failed: list[str]) -> None:
    outputs = {name: tensor.to(torch.bfloat16) for name, tensor in outputs.items()}
    assert sorted(attention.disagreements(outputs)) == failed


# -- clocks and rows ---------------------------------------------------------------------------------------------------


def test_implementations_alternate() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = clocks.time_alternating(runs, CPU, repeats=3, warmup=1)
    assert "".join(order) == "abababab"
    assert [len(times[name]) for name in "ab"] == [3, 3]
    assert clocks.wall_ms(lambda: order.append("c"), CPU, repeats=2, warmup=1) >= 0
    assert order.count("c") == 3


def measured(name: str = "triton", case: str = "gist/50%/512", ms: float = 2.0) -> dict[str, Any]:
    """Make the row of a case with 10^9 FLOPs in the forward pass."""
    size = workload.Case(case, case.partition("/")[0], 512, 1, heads=1, groups=1, head_size=250)
    prepared = attention.Prepared(lambda *args: args[0], None, 1_000_000, {"plan_ms": 0.5})
    times = {"forward": [ms] * 3, "both": [4 * ms] * 3}
    row = attention.measured_row(size, name, prepared, times, 100.0)
    return row | {"device": "card", "torch": "2", "triton": "3", "commit": "abc"}


def test_measured_row() -> None:
    row = measured()
    assert row["forward_tflops"] == pytest.approx(1e9 / 2e-3 / 1e12)
    assert row["forward_share"] == pytest.approx(0.005)
    assert row["both_tflops"] == pytest.approx(3.5e9 / 8e-3 / 1e12)
    assert (row["both_ms_low"], row["both_ms"], row["both_ms_high"], row["num_repeats"]) == (8.0, 8.0, 8.0, 3)
    assert (row["status"], row["plan_ms"], row["visible_pairs"], row["rows"]) == ("measured", 0.5, 1_000_000, 512)


def test_rows_of_the_same_case_and_device_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    ours, peer = measured(), measured("flex", ms=3.0)
    other = {**ours, "device": "other card"}
    report.write_rows(path, [ours, peer, other])
    report.write_rows(path, [{**ours, "forward_ms": 1.0}])
    assert read_rows(path) == [{**ours, "forward_ms": 1.0}, peer, other]
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]


def test_lines() -> None:
    failed = {"case": "t5/512", "implementation": "flex", "status": "failed", "reason": "NYI"}
    assert report.line_of(failed) == "t5/512 flex: failed, NYI"
    assert report.line_of(measured()) == "gist/50%/512 triton: forward 2.000 ms, both 8.000 ms, plan 0.500 ms"
    row = {"case": "step", **step.step_row("sdpa", [1.0, 2.0, 3.0], 2_000_000_000, None)}
    assert report.line_of(row) == "step sdpa: step 2.000 ms, peak 2.00 GB"


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install 'gist-tokens[eval]'")
    rows = [measured(name, case) for name in report.IMPLEMENTATIONS for case in ("gist/50%/512", "packed/a")]
    rows += [{"case": "t5/512", "mask": "encoder", "implementation": "flex", "status": "failed", "reason": "NYI"}]
    report.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_step_row() -> None:
    row = step.step_row("flex", [1.0, 2.0, 3.0], 7, None)
    assert (row["status"], row["step_ms"], row["peak_bytes"], row["num_repeats"]) == ("measured", 2.0, 7, 3)
    assert step.step_row("flex", [], None, "OutOfMemoryError: ") == {
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
def test_gradients_of_a_step_that_differ(gradients: dict[str, Tensor], differ: list[str]) -> None:
    assert sorted(step.differing(gradients)) == differ


def test_a_step_with_a_wrong_mask_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here "triton" has a causal mask."""

    def attend(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *biases: Tensor | None) -> Tensor:
        seen = vis.causal(torch.ones(1, k.shape[2]))
        return api.sdpa_attention(q, k, v, seen, bias=None, sinks=None, scale=q.shape[-1] ** -0.5, dropout=0.0)

    monkeypatch.setattr(api, "_by_triton", lambda *args: attend)
    setting = clocks.Setting(CPU, 1, 0, 1.0, {"device": "cpu"})
    rows = {row["implementation"]: row for row in step.run_step(setting, is_smoke=True)}
    assert rows["sdpa"]["status"] == "failed"
    assert rows["sdpa"]["reason"].startswith("a gradient differs from triton's by ")


def test_a_step_runs_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The implementations alternate on one mask, which caches the layers' choice of attention."""
    reference, ran = api.reference_attention, []

    def by(name: str) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *rest: Any, **options: Any) -> Tensor:
            ran.append(name)
            scale = q.shape[-1] ** -0.5
            return reference(q, k, v, visibility, bias=None, sinks=None, scale=scale, softcap=None, dropout=0.0)

        return attend

    monkeypatch.setattr(api, "_by_triton", lambda *args: by("triton"))
    monkeypatch.setattr(api, "_by_flex", lambda *args: by("flex"))
    monkeypatch.setattr(api, "sdpa_attention", by("sdpa"))
    setting = clocks.Setting(CPU, 2, 1, 1.0, {"device": "cpu"})
    rows = step.run_step(setting, is_smoke=True)
    assert [row["status"] for row in rows] == ["measured"] * 3
    assert ran == 4 * list(step.STEP_IMPLEMENTATIONS)  # to compare gradients, to warm up, and twice for timing


# -- the tuner ---------------------------------------------------------------------------------------------------------


def test_the_file_is_written_as_it_was() -> None:
    text = tune.TABLE.read_text(encoding="utf-8")
    assert tune.layout(json.loads(text)) == text


def test_with_tile_changes_only_the_measurement(tmp_path: Path) -> None:
    document = json.loads(tune.TABLE.read_text(encoding="utf-8"))
    row = document["rows"][3]
    changed = tune.with_tile(row, TileSizes(16, 32, 4, 2), "card")
    again = tune.with_tile({**row, "device": "old card"}, TileSizes(16, 32, 4, 2), "card")
    assert changed == again == {**row, "tile": [16, 32, 4, 2], "measured": True, "device": "card"}
    assert list(changed)[:-1] == [name for name in row if name != "device"]
    other = tune.with_tile(row, TileSizes(16, 32, 4, 2, "descriptors"), "card")
    assert other == {**changed, "path": "descriptors"}
    assert tune.with_tile(other, TileSizes(16, 32, 4, 2), "card") == changed
    path = tmp_path / "configs.json"
    before = tune.layout(document).splitlines()
    tune.write(path, {**document, "rows": [*document["rows"][:3], changed, *document["rows"][4:]]})
    after = path.read_text(encoding="utf-8").splitlines()
    assert [number for number, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]] == [6]


@pytest.mark.parametrize("arch", [80, 90])
def test_candidates_are_valid_and_few(arch: int) -> None:
    spots = tune.spots_of(json.loads(tune.TABLE.read_text(encoding="utf-8"))["rows"], arch)
    assert {spot.row["kernel"] for spot in spots} == set(tune.KERNELS)
    for spot in spots:
        tiles = tune.candidates(spot.row)
        assert tiles[0] == TileSizes(*spot.row["tile"], spot.row.get("path", "pointers"))
        assert len(tiles) == len(set(tiles))
        assert 4 <= len(tiles) <= 64, spot.label()
        paths = {"pointers"}
        if arch == 90 and spot.row["bits"] == 16 and spot.row["kernel"] in tune.DESCRIBED:
            paths.add("descriptors")
            if spot.row.get("path") == "pingpong":
                paths.add("pingpong")
        assert {tile.path for tile in tiles} == paths
        for tile in tiles:
            assert tile.rows in (16, 32, 64, 128)
            assert tile.keys in (16, 32, 64, 128)
            assert tile.warps in (4, 8)
        assert {case.width is not None for case in tune.checked_cases(spot)} == set(spot.biases)
        assert (tune.timed_case(spot).width is not None) == spot.has_bias


def test_timed_inputs_have_the_segments_of_their_row() -> None:
    """The inputs that a row is timed with must be inputs that look up this row."""
    from gisting_kernels.configs import LONG, SHORT
    from gisting_kernels.plan import mean_segment_length

    bounds = {"short": (0, SHORT), "long": (SHORT, LONG), "longest": (LONG, 1e9)}
    for spot in tune.spots_of(json.loads(tune.TABLE.read_text(encoding="utf-8"))["rows"], 90):
        case = tune.timed_case(spot)
        visibility = workload.visibility_of(replace(case, batch=1), CPU)
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
def test_pick(medians: dict[TileSizes, float], best: TileSizes | None) -> None:
    assert tune.pick(A, medians) == best


@pytest.mark.parametrize(("capability", "arch"), [((8, 0), 80), ((9, 0), 90), ((8, 6), None), ((10, 0), None)])
def test_arch_of(capability: tuple[int, int], arch: int | None) -> None:
    assert tune.arch_of(capability) == arch


def test_difference() -> None:
    assert tune.difference([OUT], [OUT]) is None
    assert tune.difference([OUT, OUT + 0.1], [OUT, OUT]).startswith(
        "result 2 differs from the first tile's by 1.00e-01"
    )
    assert tune.difference([OUT * torch.nan], [OUT]) is not None


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    before = tune.TABLE.read_bytes()
    assert tune.main(dry_run=True, kernel="table", bits=16, head_size=64) == 0
    (label, tiles) = capsys.readouterr().out.splitlines()
    assert label == "sm_90 table, 16 bits, head size 64, any segments, bias: on t5, 8 x 2048, 32:32 heads"
    assert tiles.startswith("  64,32,4,1  ")
    assert tune.TABLE.read_bytes() == before


def test_rows_that_were_not_reached_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the four rows, one has a wrong candidate and one lacks its second candidate, which does not matter.

    One has no candidate, and for one memory ran out with its own tile: these two are not reached.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # --smoke sets it; restored after the test
    monkeypatch.delenv("GISTING_KERNEL_CONFIG", raising=False)
    timed: dict[str, list[TileSizes]] = {}

    def run_ahead(work: Any, jobs: Any, *, processes: int, deadline: float) -> Iterator[Any]:
        for number, job in enumerate(jobs):
            if number == 1:
                yield ahead.Done(job, ["out: error 1, allowed 0"])
            elif number == 6:
                yield ahead.Done(job, trouble="OutOfMemoryError: CUDA out of memory", is_inconclusive=True)
            elif number not in (3, 4, 5):
                yield ahead.Done(job, [])

    def tune_spot(spot: Any, tiles: Any, *args: Any, **kwargs: Any) -> dict[TileSizes, float]:
        timed[spot.row["kernel"]] = tiles
        return dict.fromkeys(tiles, 1.0)

    monkeypatch.setattr(tune, "run_ahead", run_ahead)
    monkeypatch.setattr(tune, "tune_spot", tune_spot)
    assert tune.main(smoke=True, seconds=60) == 0
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
def test_device_errors_and_lack_of_memory_are_raised(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """The process that checks a candidate is then replaced. A tile that does not fit is a fault of the candidate."""
    spot = tune.spots_of(json.loads(tune.TABLE.read_text())["rows"], 80, kernel="table")[0]

    def fail_with(text: str) -> None:
        def faults_of(*args: Any) -> list[str]:
            raise RuntimeError(text)

        monkeypatch.setattr(tune, "faults_of", faults_of)

    fail_with(message)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        tune.prepare(tune.Candidate(spot, A, is_smoke=True))
    fail_with(NO_FIT)
    faults = tune.prepare(tune.Candidate(spot, A, is_smoke=True))
    assert faults
    assert all(fault.endswith(f": RuntimeError: {NO_FIT}") for fault in faults)


@pytest.mark.parametrize(("message", "what"), [(OUT_OF_MEMORY, "not reached"), (NO_FIT, "out"), (CUDA_ERRORS[0], "")])
def test_a_tile_that_fails_on_the_timed_inputs(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    message: str,
    what: str,
) -> None:
    """The other tiles are timed, except after a CUDA error, which ends the process."""
    spot = tune.spots_of(json.loads(tune.TABLE.read_text())["rows"], 80, kernel="table")[0]

    def run_of_tile(spot: Any, tile: TileSizes, *rest: Any) -> Any:
        if tile == A:
            raise RuntimeError(message)
        return lambda: (OUT,)

    monkeypatch.setattr(tune, "run_of_tile", run_of_tile)
    setting = clocks.Setting(CPU, 1, 0, 0.0, {})
    if not what:
        with pytest.raises(RuntimeError, match="CUDA error"):
            tune.tune_spot(spot, [A, B], setting, (8, 0), is_smoke=True)
        return
    assert list(tune.tune_spot(spot, [A, B], setting, (8, 0), is_smoke=True)) == [B]
    line = f"  {tune.show(A)}: {what}, on the timed inputs: RuntimeError: {message}"
    assert capsys.readouterr().out.splitlines()[0] == line


def test_a_row_whose_own_tile_is_wrong_stays_unchanged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # --smoke sets it; restored after the test
    monkeypatch.delenv("GISTING_KERNEL_CONFIG", raising=False)
    monkeypatch.delattr(tune, "tune_spot")  # must not be called

    def run_ahead(work: Any, jobs: Any, *, processes: int, deadline: float) -> Iterator[Any]:
        for number, job in enumerate(jobs):
            yield ahead.Done(job, [] if number % 2 else ["out: error 1, allowed 0"])

    monkeypatch.setattr(tune, "run_ahead", run_ahead)
    assert tune.main(smoke=True, seconds=60) == 1
    assert capsys.readouterr().out.count("  its own tile was not timed: the row stays unchanged\n") == 4


def test_forced_sizes_are_not_tuned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GISTING_KERNEL_CONFIG", "forward=64,64,4,2")
    assert tune.main() == 2
    assert (
        capsys.readouterr().err == "GISTING_KERNEL_CONFIG is set and forces the sizes that would be tuned; unset it\n"
    )


# -- the commands ------------------------------------------------------------------------------------------------------


NO_CARD = {
    "kernels": "no CUDA device: nothing was measured, nothing written (--smoke runs the code on a CPU)",
    "tune": "no CUDA device: nothing was timed, nothing written (--dry-run shows the candidates)",
}


@pytest.mark.parametrize("name", NO_CARD)
def test_without_a_card_there_is_a_line_and_status_2(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GISTING_KERNEL_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = tune.TABLE.read_bytes()
    status = tune.main() if name == "tune" else attention.main(output=tmp_path / "rows.jsonl")
    assert (status, capsys.readouterr()) == (2, ("", NO_CARD[name] + "\n"))
    assert list(tmp_path.iterdir()) == []
    assert tune.TABLE.read_bytes() == before


@pytest.mark.parametrize("name", ["tune", slow("kernels")])
def test_the_driver_runs_them(name: str) -> None:
    done = run(name, CUDA_VISIBLE_DEVICES="", GISTING_KERNEL_CONFIG="")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", NO_CARD[name] + "\n")


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (attention.main, {"smoke": True, "output": "docs/results/kernels.jsonl"}, "does not write to docs/results"),
        (attention.main, {"smoke": True, "plot": "docs/results/../results/a.png"}, "does not write to docs/results"),
        (attention.main, {"case": "nothing"}, "no case matches 'nothing'; the cases are gist/25%/512, "),
        (tune.main, {"kernel": "dq"}, "--kernel must be one of forward, query, key, table, got dq"),
        (tune.main, {"bits": 8}, "--bits must be one of 16, 32, got 8"),
        (tune.main, {"head_size": 80}, "--head-size must be one of 64, 128, 256, got 80"),
        (tune.main, {"arch": 70}, "--arch must be one of 80, 90, got 70"),
    ],
)
def test_options_are_refused(main: Any, options: dict[str, Any], message: str) -> None:
    given = {name: ROOT / value if name in ("output", "plot") else value for name, value in options.items()}
    with pytest.raises(typer.BadParameter, match=re.escape(message)):
        main(**given)


requires_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the kernels need triton: pip install 'gist-tokens[kernels]'"
)


@pytest.mark.slow
@requires_triton
@requires_interpreter
def test_the_benchmark_runs(tmp_path: Path) -> None:
    path, plot = tmp_path / "rows.jsonl", tmp_path / "rows.png"
    done = run("kernels", "--smoke", "--output", str(path), "--plot", str(plot), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = read_rows(path)
    names = [case.name for case in workload.smoke_cases()]
    assert [(row["case"], row["implementation"]) for row in rows] == [
        (name, implementation) for name in names for implementation in report.IMPLEMENTATIONS
    ]
    for row in rows:
        assert (row["status"], row["smoke"]) == ("measured", True), row
        # On a CPU, torch's FlexAttention has no gradients.
        assert ("both_ms" in row) == (row["implementation"] != "flex")
        assert {"device", "torch", "triton", "cuda", "gisting", "commit", "python", "matmul_tflops"} <= row.keys()
        assert "transformers" not in row
    for ours in (row for row in rows if row["implementation"] == "triton"):
        assert ours["visited_over_visible"] >= 1
        assert ours["plan_ms"] > 0
        assert set(ours["tiles"]) == {"forward", "query", "key", *(["table"] if ours["bias_width"] else [])}
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@requires_triton
@requires_interpreter
def test_the_training_step_runs(tmp_path: Path) -> None:
    """The gate and the compilation run in two processes."""
    path = tmp_path / "rows.jsonl"
    done = run("kernels", "--smoke", "--step", "--jobs", "2", "--output", str(path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert "the gate is green: outputs and gradients agree with the oracle" in lines
    assert sum(line.startswith("compiled ahead: triton, ") and line.endswith(" s") for line in lines) == 1
    assert sum(line.startswith("compiled ahead: flex, GistError: impl='flex' has no grad") for line in lines) == 1
    rows = {row["implementation"]: row for row in read_rows(path)}
    assert rows["triton"]["status"] == rows["sdpa"]["status"] == "measured"
    assert rows["flex"]["reason"].startswith("GistError: impl='flex' has no gradients")
    assert all(row["smoke"] for row in rows.values())


@pytest.mark.slow
@requires_triton
@requires_interpreter
def test_the_tuner_runs() -> None:
    before = (ROOT / "kernels" / "gisting_kernels" / "configs.json").read_bytes()
    done = run("tune", "--smoke", "--jobs", "2", CUDA_VISIBLE_DEVICES="", GISTING_KERNEL_CONFIG="")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "8 of 8 candidates compiled and checked in " in done.stdout
    assert done.stdout.count("-> ") == 4
    assert ": out" not in done.stdout
    assert "not reached" not in done.stdout
    assert (ROOT / "kernels" / "gisting_kernels" / "configs.json").read_bytes() == before
