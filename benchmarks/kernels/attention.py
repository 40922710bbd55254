"""Time the kernels beside torch's own attention on a CUDA device; nothing is reported unless they are right first.

    python benchmarks/kernels/attention.py --output docs/results/kernels.jsonl --plot docs/results/kernels.png
    python benchmarks/kernels/attention.py --quick --case 'gist/*'     a handful of cases, or those whose name matches
    python benchmarks/kernels/attention.py --step                      a training step of a LLaMA-like model, 10^9 parameters
    python benchmarks/kernels/attention.py --quick --step              both

In order: the gate (kernel against the float64 oracle, outputs and gradients, on this device; red: exit 3, no timing)
while other processes (``--jobs``) compile what the cases need, the card's matrix rate, then each case, forward and
forward with backward. Implementations take turns in one process; before each run the L2 cache is overwritten;
reported are median and quartiles. Implementations:

    triton   ours, with the plan made before
    flex     torch's FlexAttention, compiled for the very lengths, with the block mask from our lists, made before
    sdpa     torch's fused operator with the mask made dense before
    flash    torch's FlashAttention on a causal mask (encoder: none) of that size: another question, a ceiling

What is made before is timed apart; torch's own way to a block mask, ``create_block_mask``, only with ``--block-mask``,
for compiling it takes long. FLOPs are those of the pairs that see each other, 4 B H D area forward and 2.5 times
that backward, whatever a kernel computes beside. Without a CUDA device: one line, exit 2. ``--smoke`` runs the whole of
it on a CPU under Triton's interpreter at sizes that mean nothing, to show that it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.ahead import default_processes, run_ahead
from benchmarks.kernels.clocks import (
    Setting,
    first_line,
    free_bytes,
    matrix_rate,
    release,
    spread,
    time_alternating,
    wait,
)
from benchmarks.kernels.report import (
    IMPLEMENTATIONS,
    PASSES,
    draw,
    environment,
    line_of,
    read_rows,
    step_table_of,
    table_of,
    write_rows,
)
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
from gisting.visibility import Visibility

ROOT = Path(__file__).resolve().parents[2]
MATMUL_SIZE = 8192
# Exit status; benchmarks/card.py knows it too.
RED_GATE = 3


# -- the gate ----------------------------------------------------------------------------------------------------------


def ours(visibility: Visibility) -> Attend:
    """The kernels, planned for each call."""
    return lambda q, k, v, table: interval_attention(q, k, v, visibility, relative_bias=table, impl="triton")


def gate_cases(*, is_smoke: bool) -> list[Case]:
    """Small cases of every kind of mask, odd lengths, long and short segments, the head sizes that are timed."""
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
    """What is wrong with the kernels in a case of the gate."""
    visibility, found = visibility_of(case, device), []
    for dtype in (torch.bfloat16, torch.float16):
        faults = faults_of(ours(visibility), make_inputs(case, device, dtype), visibility)
        found += [f"{case.name}, {dtype}: {fault}" for fault in faults]
    return found


@dataclass(frozen=True)
class Job:
    """Something to do before anything is timed: a case of the gate, or what is to be compiled for an implementation."""

    kind: str
    name: str
    case: Case | None
    is_smoke: bool


def run_once(run: Callable[[], Any]) -> float:
    """In place of a clock, where nothing is timed."""
    run()
    return 0.0


def do_ahead(job: Job) -> list[str]:
    """Do a job, in a process of its own; what the gate found wrong."""
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
    """What is wrong with the kernels on this device: nothing, if anything is to be timed. It is printed when found.

    With more than one process what ``cases`` and the training step need is compiled beside, unless the gate is red.
    """
    jobs = [Job("gate", case.name, case, is_smoke) for case in gate_cases(is_smoke=is_smoke)]
    if processes > 1:
        # What takes longest to compile comes first.
        if has_step:
            jobs += [Job("compile", name, None, is_smoke) for name in STEP_IMPLEMENTATIONS if name != "sdpa"]
        jobs += [Job("compile", name, case, is_smoke) for name in ("flex", "triton") for case in cases]
    found, num_left = [], len(gate_cases(is_smoke=is_smoke))
    start = time.monotonic()
    for done in run_ahead(do_ahead, jobs, processes=processes):
        if done.job.kind == "compile":
            # No fault of the gate: what is timed later fails in the same way, and its row says why.
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
    """An implementation made ready for a case: its call, its leaves, and what the row says of it."""

    attend: Attend
    given: Inputs
    pairs: int
    says: dict[str, Any]
    has_gradients: bool = True

    def forward(self) -> Tensor:
        """The forward pass as in inference."""
        with torch.no_grad():
            return self.attend(self.given.q, self.given.k, self.given.v, self.given.table)

    def both(self) -> tuple[Tensor, ...]:
        """Forward and backward."""
        out = self.attend(self.given.q, self.given.k, self.given.v, self.given.table)
        return torch.autograd.grad(out, self.given.leaves, self.given.upstream)


Clock = Callable[[Callable[[], Any]], float]


def prepare_triton(case: Case, given: Inputs, visibility: Visibility, clock: Clock) -> Prepared:
    """Ours."""
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
    """What ``impl="flex"`` runs; the block mask from our lists."""
    import gisting_kernels as kernels
    from gisting.attention import flex

    size = (flex.BLOCK, flex.BLOCK)

    def make_lists() -> kernels.TileLists:
        return kernels.list_tiles(visibility.first, visibility.end, case.num_rows, 0, size)

    # Forget the lengths of the case before, which would make those of this one variables, and slower.
    torch._dynamo.reset()
    lists = make_lists()
    pairs = visible_pairs(visibility, case.num_rows)
    says: dict[str, Any] = {
        "plan_ms": clock(lambda: flex.block_mask(visibility, make_lists(), case.num_rows)),
        "visited_over_visible": visited_pairs(lists.counts, size) / pairs,
    }

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> Tensor:
        # The block mask is remembered on the intervals after the first call.
        return flex.flex_attention(
            q, k, v, visibility, lists, relative_bias=table, scale=q.shape[-1] ** -0.5, softcap=None
        )

    return Prepared(attend, given, pairs, says, has_gradients=given.q.is_cuda)


def block_mask_ms(case: Case, visibility: Visibility, clock: Clock) -> float | str:
    """Milliseconds of ``create_block_mask``, torch's own way to a block mask, compiled; or why it does not run."""
    import gisting_kernels as kernels
    from gisting.attention import flex

    lists = kernels.list_tiles(visibility.first, visibility.end, case.num_rows, 0, (flex.BLOCK, flex.BLOCK))
    mask = flex.block_mask(visibility, lists, case.num_rows)
    create = torch.compile(create_block_mask)
    sizes = case.batch, None, case.num_rows, case.num_rows
    try:
        return clock(lambda: create(mask.mask_mod, *sizes, visibility.device))
    except Exception as error:  # noqa: BLE001  nothing else is timed with it; its reason goes into the row
        return first_line(error)


def prepare_sdpa(case: Case, given: Inputs, visibility: Visibility, clock: Clock) -> Prepared:
    """torch's fused operator. A bias is made dense before too, with the mask in it, and is the leaf that gets the
    gradient: what it would take to bring that back to the table is not counted.
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
            # With a mask torch's own grouping leaves the fused kernels.
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask if table is None else table)

    return Prepared(attend, given, visible_pairs(visibility, case.num_rows), says)


def prepare_flash(case: Case, given: Inputs, visibility: Visibility, clock: Clock) -> Prepared:
    """torch's FlashAttention on the nearest mask that it knows."""
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
    """The rows of a case, one for each implementation: measured, skipped or failed, the latter two with a reason.

    With ``has_block_mask`` the row of flex has the time of ``create_block_mask`` too.
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
        except Exception as error:  # noqa: BLE001  a peer that cannot run is a result, with its reason
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
    """Why an implementation does not run a case, or None."""
    if name == "sdpa" and free_bytes is not None and dense_bytes(case) > free_bytes // 2:
        return f"the dense mask would take {dense_bytes(case) / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB are free"
    return None


def disagreements(outputs: dict[str, Tensor]) -> dict[str, str]:
    """Whose result is not to be trusted, by more than rounding in 16 bits explains: no time of theirs is reported.

    A peer that differs from ours is named; where every peer does, so are we. flash answers another question.
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
            found[name] = f"its result differs from that of triton by {error:.2e}, allowed {allowed:.2e}"
    if len(found) == len(peers):
        found["triton"] = f"its result is that of none of {', '.join(peers)}"
    return found


def measured_row(
    case: Case, name: str, prepared: Prepared, times: dict[str, list[float]], matmul_tflops: float
) -> dict[str, Any]:
    """The row of an implementation that ran."""
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


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSONL file; rows of the same case and device are replaced")
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--quick", action="store_true", help="a handful of cases")
    parser.add_argument("--case", help="only cases whose name matches, such as 'gist/50%%/*'")
    parser.add_argument("--repeats", type=int, default=30, help="runs of each implementation (30)")
    parser.add_argument("--step", action="store_true", help="a training step of a LLaMA-like model; alone, no cases")
    parser.add_argument("--block-mask", action="store_true", help="time create_block_mask too, which compiles for long")
    parser.add_argument("--jobs", type=int, help="processes that check and compile first (one a core; 1 with --smoke)")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, tiny: shows that it runs, measures nothing")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    if options.jobs is None and options.smoke:
        options.jobs = 1
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    for path in (options.output, options.plot):
        if options.smoke and path is not None and path.resolve().is_relative_to(ROOT / "docs" / "results"):
            parser.error(f"--smoke measures nothing, so it does not write to docs/results; got {path}")
    if not options.smoke and not chosen_cases(quick=options.quick, pattern=options.case):
        parser.error(f"no case matches {options.case!r}; there are {', '.join(case.name for case in all_cases())}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, write; 2 without a CUDA device, 3 where the gate is red."""
    options = parse(arguments)
    if options.smoke:
        # Before the first import of triton.
        os.environ["TRITON_INTERPRET"] = "1"
        device = torch.device("cpu")
    elif not torch.cuda.is_available():
        print("no CUDA device: nothing was measured, nothing written (--smoke runs the code on a CPU)", file=sys.stderr)
        return 2
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.get_device_capability(device)[0] < 8:
            name = torch.cuda.get_device_name(device)
            print(f"the kernels need compute capability 8.0, {name} has less: nothing was measured", file=sys.stderr)
            return 2
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 180)
    cases = smoke_cases() if options.smoke else chosen_cases(quick=options.quick, pattern=options.case)
    if options.step and not options.quick and options.case is None:
        cases = []
    processes = options.jobs or default_processes(device)
    faults = gate(cases, has_step=options.step, is_smoke=options.smoke, processes=processes)
    if faults:
        print("the gate is red: nothing was timed")
        return RED_GATE
    repeats, warmup = (2, 1) if options.smoke else (options.repeats, 5)
    rate = matrix_rate(device, 64 if options.smoke else MATMUL_SIZE, repeats=repeats, warmup=warmup)
    about = {**environment(is_smoke=options.smoke), "matmul_tflops": rate}
    print(f"{about['device']}: {rate:.3g} TFLOP/s in a product of bfloat16 matrices", flush=True)
    setting = Setting(device, repeats, warmup, rate, about)
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(cases, 1):
        found = run_case(case, setting, has_block_mask=options.block_mask)
        rows += found
        for row in found:
            print(f"[{number}/{len(cases)}] {line_of(row)}", flush=True)
        if options.output is not None:
            write_rows(options.output, found)
        release(device)
    if options.step:
        found = run_step(setting, is_smoke=options.smoke)
        console.print(step_table_of(found))
        if options.output is not None:
            write_rows(options.output, found)
    if not cases:
        return 0
    console.print(table_of(rows))
    if options.plot is not None:
        # With the rows of earlier runs on this device, if they are kept.
        kept = rows if options.output is None else read_rows(options.output)
        draw([row for row in kept if row["device"] == about["device"]], options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
