"""Time the kernels against torch's own attention on a CUDA device, after checking that they are right.

Place in the flow: workload, clocks, ahead, step -> **attention** -> report. A run has these steps:

1. The gate compares the kernels with the float64 oracle, outputs and gradients, on this device. If it finds a fault,
   nothing is timed. Meanwhile other processes (``--jobs``) compile what the cases need.
2. The rate of a plain matrix product is measured.
3. Each case is timed, forward and forward with backward. The implementations alternate in one process, and the L2 cache
   is overwritten before each run. Rows have the median and the quartiles.

The implementations:

    triton   these kernels, with the plan made beforehand
    flex     torch's FlexAttention, compiled for the lengths of the case, with the block mask made from our lists
             beforehand; the row names the back end, torch's Triton kernels or FlashAttention-4
    sdpa     torch's fused operator, with the dense mask made beforehand
    flash    torch's FlashAttention with a causal mask (encoder: none) of the same size: another mask, as an upper bound

The preparation is timed separately. FLOPs are counted for the pairs that see each other, 4 B H D area forward and 2.5
times that backward, even if a kernel computes more.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.card_tables import kernels_table
from benchmarks.kernels.ahead import default_processes, run_ahead
from benchmarks.kernels.clocks import Setting, first_line, free_bytes, matrix_rate, release, time_alternating, wait
from benchmarks.kernels.report import IMPLEMENTATIONS, PASSES, draw, environment, line_of, write_rows
from benchmarks.kernels.step import STEP_IMPLEMENTATIONS, compile_step, run_step
from benchmarks.kernels.workload import (
    T5_WIDTH,
    Attend,
    Case,
    Inputs,
    all_cases,
    chosen_cases,
    dense_bytes,
    faults_of,
    flops,
    make_inputs,
    smoke_cases,
    visibility_of,
    visible_pairs,
    visited_pairs,
)
from gisting.attention import interval_attention
from gisting.attention.relative import dense_bias
from gisting.measure.rows import read_rows, spread
from gisting.visibility import Visibility

ROOT = Path(__file__).resolve().parents[2]
MATMUL_SIZE = 8192
# The exit status if the gate finds a fault; benchmarks/card.py has the same number.
RED_GATE = 3


# -- the gate ----------------------------------------------------------------------------------------------------------


def ours(visibility: Visibility) -> Attend:
    """Attend with the kernels, planned for each call."""
    return lambda q, k, v, table: interval_attention(q, k, v, visibility, relative_bias=table, impl="triton")


def gate_cases(*, is_smoke: bool) -> list[Case]:
    """List small cases: every kind of mask, odd lengths, long and short segments, the head sizes that are timed."""
    if is_smoke:
        return [replace(case, num_rows=41) for case in smoke_cases() if case.mask in ("packed", "encoder")]
    found = []
    for size in (64, 128):
        small: dict[str, Any] = {"batch": 2, "heads": 4, "head_size": size, "num_gist": 8}
        found += [
            Case(f"gist/1001/d{size}", "gist", 1001, groups=2, share=90, **small),
            Case(f"packed/777/d{size}", "packed", 777, groups=1, **small),
            Case(f"shared-gist/520/d{size}", "shared-gist", 520, groups=4, **small),
            Case(f"t5/300/d{size}", "encoder", 300, groups=4, width=T5_WIDTH, **small),
            Case(f"t5/1001/d{size}", "encoder", 1001, groups=4, width=T5_WIDTH, **small),
        ]
    return found


def gate_faults(case: Case, device: torch.device) -> list[str]:
    """Describe the faults of the kernels in a case of the gate."""
    visibility, found = visibility_of(case, device), []
    for dtype in (torch.bfloat16, torch.float16):
        faults = faults_of(ours(visibility), make_inputs(case, device, dtype), visibility)
        found += [f"{case.name}, {dtype}: {fault}" for fault in faults]
    return found


@dataclass(frozen=True)
class Job:
    """A job before the timing: a case of the gate, or the compilation of a case for an implementation."""

    kind: str
    name: str
    case: Case | None
    is_smoke: bool


def run_once(run: Callable[[], Any]) -> float:
    """Run without timing, in place of a clock."""
    run()
    return 0.0


def do_ahead(job: Job) -> list[str]:
    """Do a job, usually in a child process, and return the faults that the gate found."""
    device = torch.device("cpu") if job.is_smoke else torch.device("cuda", torch.cuda.current_device())
    found = []
    if job.case is None:
        compile_step(device, job.name, is_smoke=job.is_smoke)
    elif job.kind == "gate":
        found = gate_faults(job.case, device)
    else:
        given, visibility = make_inputs(job.case, device, torch.bfloat16), visibility_of(job.case, device)
        prepared = PREPARE[job.name](job.case, given, visibility, run_once)
        prepared.forward()
        if prepared.has_gradients:
            prepared.both()
    wait(device)
    release(device)
    return found


def gate(cases: Sequence[Case], *, has_step: bool, is_smoke: bool, processes: int) -> list[str]:
    """Check the kernels on this device; print the faults as they are found, and return them.

    With more than one process, what ``cases`` and the training step need is compiled at the same time.
    """
    jobs = [Job("gate", case.name, case, is_smoke) for case in gate_cases(is_smoke=is_smoke)]
    if processes > 1:
        # The longest compilations come first.
        if has_step:
            jobs += [Job("compile", name, None, is_smoke) for name in STEP_IMPLEMENTATIONS if name != "sdpa"]
        jobs += [Job("compile", name, case, is_smoke) for name in ("flex", "triton") for case in cases]
    found, num_left = [], len(gate_cases(is_smoke=is_smoke))
    start = time.monotonic()
    for done in run_ahead(do_ahead, jobs, processes=processes):
        if done.job.kind == "compile":
            # Not a fault of the gate: the timing will fail in the same way, and the row will say why.
            what = done.job.name if done.job.case is None else f"{done.job.case.name} {done.job.name}"
            print(f"compiled ahead: {what}, {done.trouble or f'{time.monotonic() - start:.0f} s'}", flush=True)
            continue
        num_left -= 1
        faults = done.result if done.trouble is None else [f"{done.job.name}: {done.trouble}"]
        for fault in faults:
            print(f"wrong: {fault}", flush=True)
        found += faults
        if num_left == 0:
            if found:
                break
            print("the gate is green: outputs and gradients agree with the oracle", flush=True)
    return found


# -- implementations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """An implementation prepared for a case: the call, its leaves, and entries for the row."""

    attend: Attend
    given: Inputs
    pairs: int
    says: dict[str, Any]
    has_gradients: bool = True

    def forward(self) -> Tensor:
        """Run the forward pass without gradients."""
        with torch.no_grad():
            return self.attend(self.given.q, self.given.k, self.given.v, self.given.table)

    def both(self) -> tuple[Tensor, ...]:
        """Run forward and backward."""
        out = self.attend(self.given.q, self.given.k, self.given.v, self.given.table)
        return torch.autograd.grad(out, self.given.leaves, self.given.upstream)


Clock = Callable[[Callable[[], Any]], float]


def prepare_triton(case: Case, given: Inputs, visibility: Visibility, clock: Clock) -> Prepared:
    """Prepare these kernels."""
    import gisting_kernels as kernels
    from gisting_kernels.configs import KERNELS

    def make_plan() -> kernels.Plan:
        return kernels.plan_tiles(visibility.first, visibility.end, given.q, relative_width=case.width)

    plan = make_plan()
    pairs = visible_pairs(visibility, case.num_rows)
    used = KERNELS if case.width is not None else KERNELS[:3]
    says = {
        "plan_ms": clock(make_plan),
        "tiles": {
            name: [size.rows, size.keys, size.warps, size.stages] for name, size in zip(used, plan.sizes, strict=False)
        },
        "visited_over_visible": visited_pairs(plan.forward.counts, plan.sizes[0].shape) / pairs,
    }
    return Prepared(
        lambda q, k, v, table: kernels.interval_attention(q, k, v, plan, relative_bias=table), given, pairs, says
    )


def prepare_flex(case: Case, given: Inputs, visibility: Visibility, clock: Clock) -> Prepared:
    """Prepare what ``impl="flex"`` runs, with the block mask made from our lists."""
    import gisting_kernels as kernels
    from gisting.attention import flex

    size = (flex.BLOCK, flex.BLOCK)

    def make_lists() -> kernels.TileLists:
        return kernels.list_tiles(visibility.first, visibility.end, case.num_rows, 0, size)

    # Forget the lengths of the previous case; otherwise this case's lengths would become dynamic, and slower.
    torch._dynamo.reset()
    lists = make_lists()
    pairs = visible_pairs(visibility, case.num_rows)
    says: dict[str, Any] = {
        "back_end": flex.back_end(),
        "plan_ms": clock(lambda: flex.block_mask(visibility, make_lists(), case.num_rows)),
        "visited_over_visible": visited_pairs(lists.counts, size) / pairs,
    }

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        # The first call caches the block mask on the intervals.
        return flex.flex_attention(
            q, k, v, visibility, lists, relative_bias=table, scale=q.shape[-1] ** -0.5, softcap=None
        )

    return Prepared(attend, given, pairs, says, has_gradients=given.q.is_cuda)


def block_mask_ms(case: Case, visibility: Visibility, clock: Clock) -> float | str:
    """Time torch's own ``create_block_mask``, compiled; return milliseconds, or the reason why it does not run."""
    import gisting_kernels as kernels
    from gisting.attention import flex

    lists = kernels.list_tiles(visibility.first, visibility.end, case.num_rows, 0, (flex.BLOCK, flex.BLOCK))
    mask = flex.block_mask(visibility, lists, case.num_rows)
    create = torch.compile(create_block_mask)
    sizes = case.batch, None, case.num_rows, case.num_rows
    try:
        return clock(lambda: create(mask.mask_mod, *sizes, visibility.device))
    except Exception as error:  # noqa: BLE001  a failure is a result, with its reason
        return first_line(error)


def prepare_sdpa(case: Case, given: Inputs, visibility: Visibility, clock: Clock) -> Prepared:
    """Prepare torch's fused operator with a dense mask.

    A relative bias is made dense too, together with the mask, and is the leaf that gets the gradient. Reducing that
    gradient to the table is not timed.
    """
    group = case.heads // case.groups

    def make_mask() -> Tensor:
        seen = visibility.to_dense()[:, None]
        if given.table is None:
            return seen
        bias = dense_bias(given.table.detach(), case.num_rows, case.num_rows).to(given.q.dtype)
        return bias.masked_fill(~seen, float("-inf"))

    mask = make_mask()
    says = {"plan_ms": clock(make_mask), "mask_bytes": mask.numel() * mask.element_size()}
    if given.table is not None:
        given = replace(given, table=mask.requires_grad_())

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        if group > 1:
            # With a mask, torch's own grouping (enable_gqa) does not use the fused kernels.
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask if table is None else table)

    return Prepared(attend, given, visible_pairs(visibility, case.num_rows), says)


def prepare_flash(case: Case, given: Inputs, visibility: Visibility, clock: Clock) -> Prepared:
    """Prepare torch's FlashAttention with the most similar mask that it supports."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    is_causal = case.mask != "encoder"
    pairs = case.num_rows * (case.num_rows + 1) // 2 if is_causal else case.num_rows**2

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=case.heads != case.groups)

    says = {"flash_mask": "causal" if is_causal else "none"}
    return Prepared(attend, replace(given, table=None), case.batch * pairs, says)


PREPARE: dict[str, Callable[[Case, Inputs, Visibility, Clock], Prepared]] = {
    "triton": prepare_triton,
    "flex": prepare_flex,
    "sdpa": prepare_sdpa,
    "flash": prepare_flash,
}


# -- one case ----------------------------------------------------------------------------------------------------------


def run_case(case: Case, setting: Setting, *, has_block_mask: bool = False) -> list[dict[str, Any]]:
    """Measure a case, and return one row for each implementation: measured, or skipped or failed with a reason.

    With ``has_block_mask``, the row of flex also has the time of ``create_block_mask``.
    """
    device = setting.device
    given, visibility = make_inputs(case, device, torch.bfloat16), visibility_of(case, device)
    ready: dict[str, Prepared] = {}
    troubles: dict[str, tuple[str, str]] = {}
    outputs: dict[str, Tensor] = {}
    for name in IMPLEMENTATIONS:
        release(device)
        reason = why_skip(name, case, free_bytes(device))
        if reason is not None:
            troubles[name] = ("skipped", reason)
            continue
        try:
            prepared = PREPARE[name](case, given, visibility, setting.clock)
            outputs[name] = prepared.forward()
            if prepared.has_gradients:
                prepared.both()
            wait(device)
            ready[name] = prepared
        except Exception as error:  # noqa: BLE001  a failure is a result, with its reason
            troubles[name] = ("failed", first_line(error))
            outputs.pop(name, None)
    for name, reason in disagreements(outputs).items():
        troubles[name] = ("failed", reason)
        del ready[name]
    outputs.clear()
    release(device)
    times: dict[str, dict[str, list[float]]] = {name: {} for name in ready}
    for which in PASSES:
        runs = {name: getattr(one, which) for name, one in ready.items() if which == "forward" or one.has_gradients}
        for name, found in time_alternating(runs, device, repeats=setting.repeats, warmup=setting.warmup).items():
            times[name][which] = found
    rows = []
    for name in IMPLEMENTATIONS:
        if name in troubles:
            status, reason = troubles[name]
            rows.append({**case.to_row(), "implementation": name, "status": status, "reason": reason})
        else:
            rows.append(measured_row(case, name, ready[name], times[name], setting.matmul_tflops))
    if has_block_mask:
        at = IMPLEMENTATIONS.index("flex")
        rows[at] = {**rows[at], "create_block_mask_ms": block_mask_ms(case, visibility, setting.clock)}
    return [{**row, **setting.about} for row in rows]


def why_skip(name: str, case: Case, free_bytes: int | None) -> str | None:
    """Return why an implementation skips a case, or None."""
    if name == "sdpa" and free_bytes is not None and dense_bytes(case) > free_bytes // 2:
        return f"the dense mask would take {dense_bytes(case) / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB are free"
    return None


def disagreements(outputs: dict[str, Tensor]) -> dict[str, str]:
    """Find outputs that differ by more than rounding in 16 bits explains; their times are not reported.

    A peer that differs from triton is named. If every peer differs, triton is named too. flash is not compared, because
    it computes another mask.
    """
    peers = {name: tensor for name, tensor in outputs.items() if name not in ("triton", "flash")}
    if "triton" not in outputs or not peers:
        return {}
    exact = outputs["triton"].float()
    allowed = 8 * torch.finfo(outputs["triton"].dtype).eps * exact.abs().max().item()
    found = {}
    for name, tensor in peers.items():
        error = (tensor.float() - exact).abs().max().item()
        if not error <= allowed:  # NaN differs
            found[name] = f"its result differs from triton's by {error:.2e}, allowed {allowed:.2e}"
    if len(found) == len(peers):
        found["triton"] = f"its result differs from the results of {', '.join(peers)}"
    return found


def measured_row(
    case: Case, name: str, prepared: Prepared, times: dict[str, list[float]], matmul_tflops: float
) -> dict[str, Any]:
    """Make the row of an implementation that ran."""
    row: dict[str, Any] = {**case.to_row(), "implementation": name, "status": "measured", **prepared.says}
    row["visible_pairs"] = prepared.pairs
    for which, found in times.items():
        low, median, high = spread(found)
        rate = flops(case, prepared.pairs, which) / median / 1e9
        row |= {
            f"{which}_ms": median,
            f"{which}_ms_low": low,
            f"{which}_ms_high": high,
            f"{which}_tflops": rate,
            f"{which}_share": rate / matmul_tflops,
        }
    return row | {"num_repeats": len(times["forward"])}


# -- command -----------------------------------------------------------------------------------------------------------


def main(
    *,
    output: Annotated[Path | None, typer.Option(help="JSONL file; replaces rows of the same case and device.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file to draw.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Run only a few cases.")] = False,
    case: Annotated[str | None, typer.Option(help="Run only cases whose name matches, such as 'gist/50%/*'.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each implementation.")] = 30,
    step: Annotated[
        bool, typer.Option("--step", help="Time a training step; without --quick or --case, only that.")
    ] = False,
    block_mask: Annotated[
        bool, typer.Option("--block-mask", help="Also time create_block_mask, which takes long to compile.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes that check and compile. [default: the cores; 1 with --smoke]")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Run on the CPU with tiny sizes, to test the code.")] = False,
) -> int:
    """Time the kernels against FlexAttention, SDPA and FlashAttention on a GPU, once their results are right.

    Exits with 2 without a CUDA device, and with 3 if the kernels are wrong, in which case nothing is timed.
    """
    for path in (output, plot):
        if smoke and path is not None and path.resolve().is_relative_to(ROOT / "docs" / "results"):
            raise typer.BadParameter(f"--smoke measures nothing, so it does not write to docs/results; got {path}")
    if not smoke and not chosen_cases(quick=quick, pattern=case):
        raise typer.BadParameter(
            f"no case matches {case!r}; the cases are {', '.join(case.name for case in all_cases())}"
        )
    if smoke:
        # Before triton is first imported.
        os.environ["TRITON_INTERPRET"] = "1"
        device, repeats, warmup, matmul_size = torch.device("cpu"), 2, 1, 64
    elif torch.cuda.is_available():
        device, warmup, matmul_size = torch.device("cuda", torch.cuda.current_device()), 5, MATMUL_SIZE
        if torch.cuda.get_device_capability(device)[0] < 8:
            name = torch.cuda.get_device_name(device)
            print(f"the kernels need compute capability 8.0, {name} has less: nothing was measured", file=sys.stderr)
            return 2
    else:
        print("no CUDA device: nothing was measured, nothing written (--smoke runs the code on a CPU)", file=sys.stderr)
        return 2
    cases = smoke_cases() if smoke else chosen_cases(quick=quick, pattern=case)
    if step and not quick and case is None:
        cases = []
    processes = jobs or (1 if smoke else default_processes(device))
    if gate(cases, has_step=step, is_smoke=smoke, processes=processes):
        print("the gate is red: nothing was timed")
        return RED_GATE
    rate = matrix_rate(device, matmul_size, repeats=repeats, warmup=warmup)
    about = {**environment(is_smoke=smoke), "matmul_tflops": rate}
    print(f"{about['device']}: {rate:.3g} TFLOP/s in a product of bfloat16 matrices", flush=True)
    setting = Setting(device, repeats, warmup, rate, about)
    rows: list[dict[str, Any]] = []

    def keep(found: list[dict[str, Any]], start: str) -> None:
        rows.extend(found)
        for row in found:
            print(f"{start} {line_of(row)}", flush=True)
        if output is not None:
            write_rows(output, found)
        release(device)

    for number, one in enumerate(cases, 1):
        keep(run_case(one, setting, has_block_mask=block_mask), f"[{number}/{len(cases)}]")
    if step:
        keep(run_step(setting, is_smoke=smoke), "[step]")
    if complete := [row for row in rows if "both_ms" in row]:
        print(kernels_table(complete))
    if plot is not None and cases:
        # Include the rows of earlier runs on this device, if there is a file of them.
        kept = rows if output is None else read_rows(output)
        draw([row for row in kept if row["device"] == about["device"]], plot)
    return 0
