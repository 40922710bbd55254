"""Every row of the table of tile sizes compiles for sm_80 and sm_90 within the limits, without a GPU.

Compilation runs in child processes, because in this process Triton's interpreter replaces the compiler.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels import resources
from tests.slow import slow

triton = pytest.importorskip("triton", reason="the kernels need triton: pip install 'gist-tokens[kernels]'")

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "kernel_resources.md"


def is_older_compiler() -> bool:
    """Return whether triton is older than the one in the document; it may then need more registers for a tile."""
    proven = re.search(r"triton (\d+)\.(\d+)", DOCUMENT.read_text(encoding="utf-8"))
    assert proven is not None
    return tuple(int(n) for n in triton.__version__.split(".")[:2]) < tuple(int(n) for n in proven.groups())


@pytest.mark.skipif(is_older_compiler(), reason="older than the compiler in docs/kernel_resources.md")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "kernel",
    [*map(slow, ("forward", "query", "key", "table", "decode", "bounds", "list", "range", "order")), "merge"],
)
def test_every_row_compiles_within_the_limits(kernel: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "resources", "--kernel", kernel, "--jobs", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert result.stdout.strip().endswith(" 0 with a fault")


GOOD = {
    "registers": 200,
    "stack": 0,
    "shared": 1000,
    "num_loops": 2,
    "num_loops_ahead": 2,
    "tensor_instruction": "wgmma.mma_async",
}


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        pytest.param({}, None, id="good"),
        pytest.param({"stack": 64}, None, id="64 bytes are allowed"),
        pytest.param({"stack": 72}, "stack of 72 bytes", id="spills"),
        pytest.param({"registers": 32}, "ptxas fell back to 32 registers", id="ptxas gave up"),
        pytest.param({"shared": 10_001}, "10001 bytes of shared memory, the limit is 10000", id="shared memory"),
        pytest.param({"num_loops_ahead": 1}, "1 of 2 loops do not load ahead", id="one loop is not pipelined"),
        pytest.param({"tensor_instruction": ""}, "no tensor-core instruction", id="no tensor cores"),
    ],
)
def test_faults(changed: dict[str, object], fault: str | None) -> None:
    case = resources.Case(90, "forward", 16, 64, "long", (128, 64, 4, 3))
    assert resources.Resources(**GOOD | changed).faults(case, 10_000) == ([] if fault is None else [fault])


def test_a_kernel_with_descriptors_must_copy_in_bulk() -> None:
    case = resources.Case(90, "forward", 16, 64, "any", (128, 64, 4, 3), bias=True, path="descriptors")
    assert case.options == "bias, descriptors"
    assert resources.Resources(**GOOD | {"num_bulk_copies": 3}).faults(case, 10_000) == []
    assert resources.Resources(**GOOD).faults(case, 10_000) == ["no bulk copy"]


def test_options_that_tile_sizes_do_not_depend_on_may_spill() -> None:
    case = resources.Case(90, "key", 16, 64, "long", (64, 128, 8, 2), dropout=True)
    assert case.options == "dropout"
    assert resources.Resources(**GOOD | {"stack": 152}).faults(case, 10_000) == []
    assert resources.Resources(**GOOD | {"stack": 152, "tensor_instruction": ""}).faults(case, 10_000) != []


def test_loops_are_read_from_the_ir() -> None:
    ir = """
      tt.func @kernel() {
        scf.for %i = %a to %b {
          %1 = ttg.async_copy_global_to_local %p
          %2 = tt.dot %x, %y
        }
        scf.for %i = %a to %b {
          %3 = arith.addi %i, %i
        }
        %4 = scf.for %i = %a to %b iter_args(%c = %d) {
          %5 = ttng.warp_group_dot %x, %y
        } {tt.num_stages = 2}
      }
    """
    loops = resources.hot_loops(ir)
    assert ["async_copy" in loop for loop in loops] == [True, False]
    assert len(resources.loops_of(ir)) == 3


def test_every_kind_of_row_is_among_the_cases() -> None:
    cases = resources.cases_of_table()
    kinds = {(case.arch, case.kernel, case.bits, case.head_size) for case in cases}
    for arch in (80, 90):
        for kernel in ("forward", "query", "key", "table", "decode"):
            assert {(arch, kernel, 16, size) for size in (64, 128, 256)} <= kinds
            assert {(arch, kernel, 32, size) for size in (64, 128)} <= kinds
    paths = {(case.head_size, case.path) for case in cases if (case.arch, case.kernel) == (90, "forward")}
    assert {(size, path) for size in (64, 128) for path in ("descriptors", "pingpong")} <= paths
    assert all(case.arch == 90 for case in cases if case.path != "pointers")
    assert not any(case.softcap or case.dropout or case.bias or case.even for case in cases if case.path == "pingpong")


def test_markdown_has_a_row_for_each_case() -> None:
    cases = [
        resources.Case(90, "key", 16, 64, "long", (64, 128, 8, 2)),
        resources.Case(80, "key", 32, 64, "any", (1, 2, 3, 4)),
    ]
    text = resources.write_markdown(
        [(cases[0], resources.Resources(**GOOD)), (cases[1], "OutOfMemory: no")], "versions"
    )
    assert (
        "| sm_90 | key | 16 | 64 | long | no | 64 x 128, 8, 2 | 200 | 0 | 1,000 | 2 of 2 |  | wgmma.mma_async |" in text
    )
    assert "| failed: OutOfMemory: no |" in text


def test_the_committed_document_has_the_rows_of_the_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    starts = ["|".join(line.split("|")[:8]) for line in text.splitlines() if line.startswith("| sm_")]
    used = resources.Resources(**GOOD)
    fresh = resources.write_markdown([(case, used) for case in resources.cases_of_table()], "versions")
    assert starts == ["|".join(line.split("|")[:8]) for line in fresh.splitlines() if line.startswith("| sm_")]
    assert "failed" not in text
