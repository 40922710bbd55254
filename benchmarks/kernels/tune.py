"""Time candidates for the tile sizes on the CUDA device at hand, and rewrite the rows of its class in ``configs.json``.

    python benchmarks/kernels/tune.py                          every row of this card's class, in at most 480 seconds
    python benchmarks/kernels/tune.py --kernel forward --bits 16 --head-size 128 --seconds 120
    python benchmarks/kernels/tune.py --dry-run --arch 90      what would be timed, on any machine

For each row: candidates that registers and shared memory should hold. First a few processes (``--jobs``) compile them,
check each on small inputs against the float64 oracle (outputs and gradients, with a bias and without where the row
serves both) and run it once on those that are timed. Then, one row after another, all that are right are timed in
turns: a forward kernel by the forward pass, the others by the backward pass, in which only theirs changes. The row
keeps its tile unless another takes less than 0.98 of its time, and where its own was not timed. The file is written
after each row; rows not reached are listed. Long segments: a gist mask over 4,096 tokens, the longest over 16,384;
short ones: packed documents of 256; with a bias: the T5 encoder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.ahead import default_processes, is_device_error, is_out_of_memory, run_ahead
from benchmarks.kernels.clocks import Setting, first_line, release, time_alternating, wait
from benchmarks.kernels.workload import T5_WIDTH, Attend, Case, Inputs, faults_of, make_inputs, visibility_of, worst
from gisting.visibility import Visibility
from gisting_kernels import Plan, TileSizes, interval_attention, make_plan, mean_segment_length
from gisting_kernels.configs import CLASSES, ENVIRONMENT_VARIABLE, KERNELS, tile_sizes

TABLE = Path(__file__).resolve().parents[2] / "kernels" / "gisting_kernels" / "configs.json"
# Three TF32 products keep 21 bits of a factor, and sum in the order of the tiles.
EPS_FLOAT32 = 2.0**-20
# A tile has to be this much faster than the one in the table.
GAIN = 0.98
# Of the time, at most so much to compile in; timing takes about half as long.
COMPILING = 0.65


@dataclass(frozen=True)
class Spot:
    """A row of the table and where it stands."""

    index: int
    row: dict[str, Any]

    @property
    def has_bias(self) -> bool:
        """Whether it is timed with a bias."""
        return self.row["kernel"] == "table" or self.row.get("bias", False)

    @property
    def biases(self) -> tuple[bool, ...]:
        """What it serves, and is checked with."""
        if self.row["kernel"] == "table":
            return (True,)
        return (self.row["bias"],) if "bias" in self.row else (False, True)

    def label(self) -> str:
        """In a few words."""
        bias = ", bias" if self.has_bias else ""
        return (
            f"sm_{self.row['arch']} {self.row['kernel']}, {self.row['bits']} bits, head size {self.row['head_size']}, "
            f"{self.row.get('segment', 'any')} segments{bias}"
        )


def spots_of(
    rows: Sequence[dict[str, Any]],
    arch: int,
    *,
    kernel: str | None = None,
    bits: int | None = None,
    head_size: int | None = None,
) -> list[Spot]:
    """The rows of a class of cards, and of one kernel, width or head size alone."""
    wanted = {"arch": arch, "kernel": kernel, "bits": bits, "head_size": head_size}
    return [
        Spot(index, row)
        for index, row in enumerate(rows)
        if all(value is None or row[name] == value for name, value in wanted.items())
    ]


def candidates(row: dict[str, Any]) -> list[TileSizes]:
    """The row's own tile, then those whose estimated registers and shared memory fit and that keep a warp busy.

    Registers: the sums that a kernel keeps (rows x D forward and for dQ, twice keys x D for dK/dV) and the tile of
    scores (two of them backward), in float32 over the threads; those that spilled when compiled lie beyond the limits.
    Shared memory: what stays, and what is loaded ahead in every stage.
    """
    kernel, size, is_wide = row["kernel"], row["head_size"], row["bits"] == 32
    is_tight = is_wide or size == 256
    some_rows, some_keys = {
        "forward": ((32, 64, 128) if is_tight else (64, 128), (32, 64) if is_tight else (32, 64, 128)),
        "query": ((32, 64, 128) if is_tight else (64, 128), (32, 64) if is_tight else (32, 64, 128)),
        "key": ((32, 64, 128), (32, 64) if is_tight else (64, 128)),
        "table": ((32, 64), (32, 64)),
    }[kernel]
    limit = (64 if is_wide else 160) * (1.25 if kernel == "key" else 1.0)
    found = [TileSizes(*row["tile"])]
    for rows, keys, warps in itertools.product(some_rows, some_keys, (4, 8)):
        threads, area = 32 * warps, rows * keys
        registers, held, streamed = {
            "forward": ((rows * size + area) / threads, rows, 2 * keys),
            "query": ((rows * size + 2 * area) / threads, 2 * rows, 2 * keys),
            "key": ((2 * keys * size + 2 * area) / threads, 2 * keys, 2 * rows),
            "table": (4 * area / threads, 2 * rows, 2 * keys),
        }[kernel]
        for stages in (1, 2) if is_wide or kernel == "table" else (1, 2, 3) if is_tight else (2, 3):
            shared = (held + stages * streamed) * size * row["bits"] // 8
            tile = TileSizes(rows, keys, warps, stages)
            if registers <= limit and area >= 8 * threads and shared <= CLASSES[row["arch"]] and tile not in found:
                found.append(tile)
    return found


# -- inputs ------------------------------------------------------------------------------------------------------------


def timed_case(spot: Spot) -> Case:
    """What a row is timed on."""
    size = spot.row["head_size"]
    heads = max(2048 // size, 4)
    batch_factor = 1 if spot.row["bits"] == 16 else 2
    is_short = spot.row.get("segment") == "short"
    if spot.has_bias:
        rows = 256 if is_short else 2048
        return Case("t5", "encoder", rows, 16_384 // rows // batch_factor, heads, heads, size, width=T5_WIDTH)
    if is_short:
        documents = (256, 256)
        return Case(
            "packed", "packed", 8192, 2 // batch_factor, heads, heads // 4, size, num_gist=8, document_lengths=documents
        )
    rows = 16_384 if spot.row.get("segment") == "longest" else 4096
    return Case("gist", "gist", rows, max(16_384 // rows // batch_factor, 1), heads, heads // 4, size)


def checked_cases(spot: Spot) -> list[Case]:
    """What a row is checked on: odd lengths, a batch, grouped heads, every bias that the row serves."""
    size = spot.row["head_size"]
    found = []
    for has_bias in spot.biases:
        if has_bias:
            found.append(Case("t5", "encoder", 301, 2, 4, 4, size, width=T5_WIDTH))
        else:
            found.append(Case("gist", "gist", 301, 2, 4, 2, size, num_gist=8))
    return found


def shrink(case: Case) -> Case:
    """The same kind of mask at a size that the interpreter can do."""
    heads = 4 if case.groups == case.heads else 2
    small = replace(case, num_rows=41, batch=1, heads=heads, groups=min(heads, case.groups), head_size=16, num_gist=2)
    return replace(small, width=None if case.width is None else 5, document_lengths=(9, 20))


def plan_for(
    kernel: str, tile: TileSizes, case: Case, given: Inputs, visibility: Visibility, capability: tuple[int, int]
) -> Plan:
    """The table's sizes, those of one kernel replaced."""
    segment = mean_segment_length(visibility.first, visibility.end, case.num_rows)
    bits = given.q.element_size() * 8
    sizes = list(tile_sizes(capability, case.head_size, bits, segment, has_bias=case.width is not None))
    sizes[KERNELS.index(kernel)] = tile
    return make_plan(visibility.first, visibility.end, case.num_rows, tuple(sizes), near=case.width)  # pyright: ignore[reportArgumentType]


def attend_with(plan: Plan) -> Attend:
    """Ours, with this plan."""
    return lambda q, k, v, table: interval_attention(q, k, v, plan, relative_bias=table)


# -- one row -----------------------------------------------------------------------------------------------------------


def faults_of_tile(
    spot: Spot, tile: TileSizes, device: torch.device, capability: tuple[int, int], *, is_smoke: bool
) -> list[str]:
    """What is wrong with a candidate: that it cannot run, or what it gets wrong."""
    dtype = torch.bfloat16 if spot.row["bits"] == 16 else torch.float32
    found = []
    for case in checked_cases(spot):
        if is_smoke:
            case = shrink(case)
        given, visibility = make_inputs(case, device, dtype), visibility_of(case, device)
        try:
            plan = plan_for(spot.row["kernel"], tile, case, given, visibility, capability)
            eps = None if dtype == torch.bfloat16 else EPS_FLOAT32
            faults = faults_of(attend_with(plan), given, visibility, eps)
        except Exception as error:
            if is_device_error(error) or is_out_of_memory(error):
                # The first spoils this process for the next candidate, the second says nothing of this one.
                raise
            faults = [first_line(error)]
        found += [f"{case.name}: {fault}" for fault in faults]
    return found


def run_of_tile(
    spot: Spot, tile: TileSizes, case: Case, given: Inputs, visibility: Visibility, capability: tuple[int, int]
) -> Callable[[], Any]:
    """What is timed: the forward pass, or the backward pass behind a forward pass that was made before."""
    attend = attend_with(plan_for(spot.row["kernel"], tile, case, given, visibility, capability))
    if spot.row["kernel"] == "forward":

        def forward() -> tuple[torch.Tensor]:
            with torch.no_grad():
                return (attend(given.q, given.k, given.v, given.table),)

        return forward
    out = attend(given.q, given.k, given.v, given.table)
    return lambda: torch.autograd.grad(out, given.leaves, given.upstream, retain_graph=True)


@dataclass(frozen=True)
class Candidate:
    """A tile for a row."""

    spot: Spot
    tile: TileSizes
    is_smoke: bool


def prepare(candidate: Candidate) -> list[str]:
    """Compile a candidate and check it; what is wrong with it. Runs in a process of its own."""
    spot, tile = candidate.spot, candidate.tile
    device, capability = where(is_smoke=candidate.is_smoke)
    faults = faults_of_tile(spot, tile, device, capability, is_smoke=candidate.is_smoke)
    if not faults and not candidate.is_smoke:
        # For these inputs it is compiled once more: lengths that tiles divide, and strides.
        run_of_tile(spot, tile, *inputs_of(spot, device, is_smoke=False), capability)()
    wait(device)  # what goes wrong on the device is this candidate's fault, not the next one's
    release(device)
    return faults


def where(*, is_smoke: bool) -> tuple[torch.device, tuple[int, int]]:
    """The device, and the compute capability by which sizes are looked up."""
    if is_smoke:
        return torch.device("cpu"), (8, 0)
    device = torch.device("cuda", torch.cuda.current_device())
    return device, torch.cuda.get_device_capability(device)


def inputs_of(spot: Spot, device: torch.device, *, is_smoke: bool) -> tuple[Case, Inputs, Visibility]:
    """What a row is timed on."""
    case = shrink(timed_case(spot)) if is_smoke else timed_case(spot)
    dtype = torch.bfloat16 if spot.row["bits"] == 16 else torch.float32
    return case, make_inputs(case, device, dtype), visibility_of(case, device)


def prepare_all(
    jobs: Sequence[Candidate], processes: int, deadline: float
) -> tuple[dict[int, list[TileSizes]], dict[int, list[TileSizes]]]:
    """The candidates that are right, and those that were not reached, by the place of their row in the table.

    One for which memory ran out or whose process died was not reached.
    """
    is_right: dict[tuple[int, TileSizes], bool] = {}
    start = time.monotonic()
    for number, done in enumerate(run_ahead(prepare, jobs, processes=processes, deadline=deadline), 1):
        faults = done.result if done.trouble is None else [done.trouble]
        if not done.is_inconclusive:
            is_right[done.job.spot.index, done.job.tile] = not faults
        if faults:
            what = "not reached" if done.is_inconclusive else "out"
            print(f"{done.job.spot.label()}: {show(done.job.tile)}: {what}, {'; '.join(faults)}", flush=True)
        if number % 20 == 0 or number == len(jobs):
            took = time.monotonic() - start
            print(f"{number} of {len(jobs)} candidates compiled and checked in {took:.0f} s", flush=True)
    right: dict[int, list[TileSizes]] = {}
    missing: dict[int, list[TileSizes]] = {}
    for job in jobs:  # in their order, whatever ended first
        key = job.spot.index, job.tile
        if is_right.get(key, True):
            (right if key in is_right else missing).setdefault(job.spot.index, []).append(job.tile)
    return right, missing


def tune_spot(
    spot: Spot, tiles: Iterable[TileSizes], setting: Setting, capability: tuple[int, int], *, is_smoke: bool
) -> dict[TileSizes, float]:
    """Median milliseconds of candidates that were found right; prints what became of each."""
    device = setting.device
    case, given, visibility = inputs_of(spot, device, is_smoke=is_smoke)
    right: list[TileSizes] = []
    runs: dict[str, Callable[[], Any]] = {}
    first = None
    for tile in tiles:
        try:
            run = run_of_tile(spot, tile, case, given, visibility, capability)
            result = run()
        except Exception as error:
            if is_device_error(error):  # nothing that follows in this process could be trusted
                raise
            what, fault = "not reached" if is_out_of_memory(error) else "out", first_line(error)
        else:
            first = result if first is None else first
            what, fault = "out", difference(result, first)
        if fault is None:
            runs[show(tile)] = run
            right.append(tile)
        else:
            print(f"  {show(tile)}: {what}, on the timed inputs: {fault}", flush=True)
    times = time_alternating(runs, device, repeats=setting.repeats, warmup=setting.warmup)
    found = {tile: statistics.median(times[show(tile)]) for tile in right}
    for tile, median in sorted(found.items(), key=lambda item: item[1]):
        print(f"  {show(tile)}: {median:.4f} ms", flush=True)
    release(device)
    return found


def difference(have: Sequence[torch.Tensor], first: Sequence[torch.Tensor]) -> str | None:
    """Where two tiles differ in their results by more than rounding, or None: a full float64 run would not fit."""
    for number, one, other in zip(itertools.count(1), have, first, strict=False):
        eps = EPS_FLOAT32 if one.dtype == torch.float32 else torch.finfo(one.dtype).eps
        error, allowed = worst(one, other), 16 * eps * other.abs().max().item()
        if not error <= allowed:
            return f"result {number} differs by {error:.2e} from that of the first tile, allowed {allowed:.2e}"
    return None


def pick(current: TileSizes, medians: dict[TileSizes, float]) -> TileSizes | None:
    """The fastest; the current one where the gain is small; None where the current one was not timed."""
    if current not in medians:
        return None
    best = min(medians, key=lambda tile: medians[tile])
    return current if medians[best] >= GAIN * medians[current] else best


def show(tile: TileSizes) -> str:
    """Rows, keys, warps, stages."""
    return f"{tile.rows},{tile.keys},{tile.warps},{tile.stages}"


# -- the file ----------------------------------------------------------------------------------------------------------


def with_tile(row: dict[str, Any], tile: TileSizes, device: str) -> dict[str, Any]:
    """The row with a tile that was measured on a device; the order of its entries stays."""
    return {
        **{name: value for name, value in row.items() if name != "device"},
        "tile": [tile.rows, tile.keys, tile.warps, tile.stages],
        "measured": True,
        "device": device,
    }


def layout(document: dict[str, Any]) -> str:
    """The text of ``configs.json``: one row a line."""
    rows = ",\n".join(f"    {json.dumps(row)}" for row in document["rows"])
    return f'{{\n  "format": {document["format"]},\n  "rows": [\n{rows}\n  ]\n}}\n'


def write(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(layout(document), encoding="utf-8")
    part.replace(path)


# -- command -----------------------------------------------------------------------------------------------------------


def arch_of(capability: tuple[int, int]) -> int | None:
    """The class of the table that a card is to fill, or None: cards with less shared memory than their class borrow."""
    number = capability[0] * 10 + capability[1]
    return number if number in CLASSES else None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=KERNELS, help="only rows of this one")
    parser.add_argument("--bits", type=int, choices=(16, 32), help="only rows of this width")
    parser.add_argument("--head-size", type=int, choices=(64, 128, 256), help="only rows of this size")
    parser.add_argument("--repeats", type=int, default=20, help="runs of each candidate (20)")
    parser.add_argument("--seconds", type=float, default=480.0, help="when to stop, with what is done written (480)")
    parser.add_argument("--jobs", type=int, help="processes that compile (one a core, if device memory allows)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be timed")
    parser.add_argument("--arch", type=int, choices=tuple(CLASSES), default=90, help="class of the dry run (90)")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, tiny, a few rows; writes nothing")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    if not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, write; 2 without a CUDA device of a class of the table."""
    options = parse(arguments)
    start = time.monotonic()
    document = json.loads(TABLE.read_text(encoding="utf-8"))
    only = {"kernel": options.kernel, "bits": options.bits, "head_size": options.head_size}
    if options.dry_run:
        for spot in spots_of(document["rows"], options.arch, **only):
            case = timed_case(spot)
            print(f"{spot.label()}: on {case.name}, {case.batch} x {case.num_rows}, {case.heads}:{case.groups} heads")
            print(f"  {'  '.join(show(tile) for tile in candidates(spot.row))}")
        return 0
    if os.environ.get(ENVIRONMENT_VARIABLE):
        print(f"{ENVIRONMENT_VARIABLE} is set, which forces the sizes to be tuned; unset it", file=sys.stderr)
        return 2
    if options.smoke:
        # Before the first import of triton.
        os.environ["TRITON_INTERPRET"] = "1"
        name, repeats, warmup = "CPU", 1, 1
        # One row of each kernel with two tiles.
        tiles = [TileSizes(16, 16, 4, 1), TileSizes(32, 16, 4, 1)]
        spots = [spots_of(document["rows"], 80, kernel=kernel, bits=16, head_size=64)[0] for kernel in KERNELS]
        jobs = [Candidate(spot, tile, is_smoke=True) for spot in spots for tile in tiles]
    elif not torch.cuda.is_available():
        print("no CUDA device: nothing was timed, nothing written (--dry-run shows the candidates)", file=sys.stderr)
        return 2
    else:
        _, capability = where(is_smoke=False)
        name, repeats, warmup = torch.cuda.get_device_name(), options.repeats, 3
        arch = arch_of(capability)
        if arch is None:
            print(
                f"{name} (compute capability {capability[0]}.{capability[1]}) fills no class of the table, only "
                f"{', '.join(f'{number / 10}' for number in CLASSES)} do",
                file=sys.stderr,
            )
            return 2
        spots = spots_of(document["rows"], arch, **only)
        jobs = [Candidate(spot, tile, is_smoke=False) for spot in spots for tile in candidates(spot.row)]
    device, capability = where(is_smoke=options.smoke)
    setting = Setting(device, repeats, warmup, 0.0, {})
    processes = options.jobs or default_processes(device)
    right, missing = prepare_all(jobs, processes, start + COMPILING * options.seconds)
    num_written, num_lost, missed = 0, 0, []
    for number, spot in enumerate(spots, 1):
        current = next(job.tile for job in jobs if job.spot == spot)
        tiles, unknown = right.get(spot.index, []), missing.get(spot.index, [])
        # Without the tile of the table there is nothing to be faster than.
        if current in unknown or time.monotonic() - start > options.seconds:
            missed.append(spot.label())
            continue
        print(f"[{number}/{len(spots)}] {spot.label()}", flush=True)
        if unknown:
            print(f"  not reached: {'  '.join(show(tile) for tile in unknown)}", flush=True)
        medians = tune_spot(spot, tiles, setting, capability, is_smoke=options.smoke) if current in tiles else {}
        best = pick(current, medians)
        if best is None:
            num_lost += 1
            print("  its own tile was not timed: the row stays as it is", flush=True)
            continue
        print(f"  -> {show(best)}", flush=True)
        if not options.smoke:
            document["rows"][spot.index] = with_tile(spot.row, best, name)
            write(TABLE, document)
            num_written += 1
    for label in missed:
        print(f"not reached: {label}")
    if not options.smoke:
        print(f"{num_written} of {len(spots)} rows written to {TABLE} after {time.monotonic() - start:.0f} s")
    return 1 if num_lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
