"""Tune the tile sizes of ``configs.json`` on a CUDA device.

Place in the flow: workload, clocks, ahead -> **tune** -> ``configs.json``. Each row of the table has candidates that
should fit into registers and shared memory. A few processes (``--jobs``) first compile them, check each on small inputs
against the float64 oracle (outputs and gradients, with and without a bias if the row serves both), and run it once on
the inputs for timing. Then, row by row, all correct candidates are timed in alternation: a forward kernel by the
forward pass, another kernel by the backward pass, in which only that kernel changes. A row keeps its tile unless
another takes less than 0.98 of its time. If the row's own tile could not be timed, the row stays unchanged. The file is
written after each row, and rows that were not reached are listed. Long segments are timed with a gist mask over 4,096
tokens, the longest over 16,384, short ones with packed documents of 256, and rows with a bias with the T5 encoder.

On cards with a tensor copy unit, each tile of a kernel in ``DESCRIBED`` is also a candidate with descriptors, and the
ping-pong forward kernel is one too, so that a run compares all ways to run a kernel.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.kernels.ahead import default_processes, is_device_error, is_out_of_memory, run_ahead
from benchmarks.kernels.clocks import Setting, first_line, release, time_alternating, wait
from benchmarks.kernels.workload import T5_WIDTH, Attend, Case, Inputs, faults_of, make_inputs, visibility_of, worst
from gisting.visibility import Visibility
from gisting_kernels import Plan, TileSizes, interval_attention, make_plan, mean_segment_length
from gisting_kernels.configs import CLASSES, ENVIRONMENT_VARIABLE, HEAD_SIZES, KERNELS, tile_sizes

TABLE = Path(__file__).resolve().parents[2] / "kernels" / "gisting_kernels" / "configs.json"
# Three TF32 products keep 21 bits of each factor, and the order of their sums depends on the tile.
EPS_FLOAT32 = 2.0**-20
# The kernels that can take descriptors.
DESCRIBED = ("forward", "query", "key")
# Tiles of the ping-pong forward kernel.
PINGPONG = ((128, 128, 8, 2), (128, 64, 8, 4))
# A tile replaces the row's own only if its time is below this share of the own time.
GAIN = 0.98
# The largest share of the time for compiling; timing takes about half as long.
COMPILING = 0.65


@dataclass(frozen=True)
class Spot:
    """A row of the table and its index."""

    index: int
    row: dict[str, Any]

    @property
    def has_bias(self) -> bool:
        """Whether the row is timed with a bias."""
        return self.row["kernel"] == "table" or self.row.get("bias", False)

    @property
    def biases(self) -> tuple[bool, ...]:
        """With and without a bias: what the row serves, and is checked with."""
        if self.row["kernel"] == "table":
            return (True,)
        return (self.row["bias"],) if "bias" in self.row else (False, True)

    def label(self) -> str:
        """Describe the row in a few words."""
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
    """Select the rows of a class of cards, optionally of a single kernel, width or head size."""
    wanted = {"arch": arch, "kernel": kernel, "bits": bits, "head_size": head_size}
    return [
        Spot(index, row)
        for index, row in enumerate(rows)
        if all(value is None or row[name] == value for name, value in wanted.items())
    ]


def candidates(row: dict[str, Any]) -> list[TileSizes]:
    """List the row's own tile, then the tiles that should fit into registers and shared memory and keep warps busy.

    See ``DESCRIBED`` and ``PINGPONG`` for the paths they are tried with. A row whose own tile is not for the
    ping-pong kernel is for the other cards of its class, too, so it stays without.

    The estimate of registers counts the sums that a kernel keeps (rows x D forward and for dQ, twice keys x D for
    dK/dV) and the tile of scores (two tiles backward), in float32, divided by the threads. The limits exclude the tiles
    that spilled when compiled. Shared memory holds the tiles that stay, and those loaded ahead in every stage.
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
    own = TileSizes(*row["tile"], path=row.get("path", "pointers"))
    found = [own]
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
    if row["arch"] >= 90 and not is_wide and kernel in DESCRIBED:
        found += [replace(tile, path="descriptors") for tile in found if tile.path == "pointers"]
        if own.path == "pingpong":
            found += [TileSizes(*tile, path="pingpong") for tile in PINGPONG]
    return list(dict.fromkeys(found))


# -- inputs ------------------------------------------------------------------------------------------------------------


def timed_case(spot: Spot) -> Case:
    """Choose the case that a row is timed with."""
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
    """Choose the cases that a row is checked with: odd lengths, a batch, grouped heads, with and without a bias."""
    size = spot.row["head_size"]
    found = []
    for has_bias in spot.biases:
        if has_bias:
            found.append(Case("t5", "encoder", 301, 2, 4, 4, size, width=T5_WIDTH))
        else:
            found.append(Case("gist", "gist", 301, 2, 4, 2, size, num_gist=8))
    return found


def shrink(case: Case) -> Case:
    """Shrink a case to a size that the interpreter can handle."""
    heads = 4 if case.groups == case.heads else 2
    small = replace(case, num_rows=41, batch=1, heads=heads, groups=min(heads, case.groups), head_size=16, num_gist=2)
    return replace(small, width=None if case.width is None else 5, document_lengths=(9, 20))


def plan_for(
    kernel: str, tile: TileSizes, case: Case, given: Inputs, visibility: Visibility, capability: tuple[int, int]
) -> Plan:
    """Plan with the tile sizes of the table, except for one kernel."""
    segment = mean_segment_length(visibility.first, visibility.end, case.num_rows)
    bits = given.q.element_size() * 8
    sizes = list(tile_sizes(capability, case.head_size, bits, segment, has_bias=case.width is not None))
    sizes[KERNELS.index(kernel)] = tile
    return make_plan(visibility.first, visibility.end, case.num_rows, tuple(sizes), near=case.width)  # pyright: ignore[reportArgumentType]


def attend_with(plan: Plan) -> Attend:
    """Attend with the kernels and this plan."""
    return lambda q, k, v, table: interval_attention(q, k, v, plan, relative_bias=table)


# -- one row -----------------------------------------------------------------------------------------------------------


def faults_of_tile(
    spot: Spot, tile: TileSizes, device: torch.device, capability: tuple[int, int], *, is_smoke: bool
) -> list[str]:
    """Describe the faults of a candidate: why it cannot run, or which results are wrong."""
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
                # A device error breaks this process; running out of memory says nothing about this candidate.
                raise
            faults = [first_line(error)]
        found += [f"{case.name}: {fault}" for fault in faults]
    return found


def run_of_tile(
    spot: Spot, tile: TileSizes, case: Case, given: Inputs, visibility: Visibility, capability: tuple[int, int]
) -> Callable[[], Any]:
    """Return what is timed: the forward pass, or the backward pass after a forward pass done beforehand."""
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
    """A candidate tile for a row."""

    spot: Spot
    tile: TileSizes
    is_smoke: bool


def prepare(candidate: Candidate) -> list[str]:
    """Compile and check a candidate, usually in a child process, and return its faults."""
    spot, tile = candidate.spot, candidate.tile
    device, capability = where(is_smoke=candidate.is_smoke)
    faults = faults_of_tile(spot, tile, device, capability, is_smoke=candidate.is_smoke)
    if not faults and not candidate.is_smoke:
        # The inputs for timing need another compilation: tiles divide their lengths, and strides differ.
        run_of_tile(spot, tile, *inputs_of(spot, device, is_smoke=False), capability)()
    wait(device)  # so an error on the device counts for this candidate, not for the next
    release(device)
    return faults


def where(*, is_smoke: bool) -> tuple[torch.device, tuple[int, int]]:
    """Return the device, and the compute capability for looking up tile sizes."""
    if is_smoke:
        return torch.device("cpu"), (8, 0)
    device = torch.device("cuda", torch.cuda.current_device())
    return device, torch.cuda.get_device_capability(device)


def inputs_of(spot: Spot, device: torch.device, *, is_smoke: bool) -> tuple[Case, Inputs, Visibility]:
    """Make the inputs that a row is timed with."""
    case = shrink(timed_case(spot)) if is_smoke else timed_case(spot)
    dtype = torch.bfloat16 if spot.row["bits"] == 16 else torch.float32
    return case, make_inputs(case, device, dtype), visibility_of(case, device)


def prepare_all(
    jobs: Sequence[Candidate], processes: int, deadline: float
) -> tuple[dict[int, list[TileSizes]], dict[int, list[TileSizes]]]:
    """Prepare all candidates. Return the correct ones and those not reached, by the index of their row.

    A candidate counts as not reached if memory ran out or its process died.
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
    for job in jobs:  # in this order, no matter which finished first
        key = job.spot.index, job.tile
        if is_right.get(key, True):
            (right if key in is_right else missing).setdefault(job.spot.index, []).append(job.tile)
    return right, missing


def tune_spot(
    spot: Spot, tiles: Iterable[TileSizes], setting: Setting, capability: tuple[int, int], *, is_smoke: bool
) -> dict[TileSizes, float]:
    """Time the correct candidates of a row, print the results, and return the median milliseconds."""
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
            if is_device_error(error):  # later results in this process could not be trusted
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
    """Say where the results of two tiles differ by more than rounding, or return None.

    The timed inputs are too large for a comparison with float64.
    """
    for number, one, other in zip(itertools.count(1), have, first, strict=False):
        eps = EPS_FLOAT32 if one.dtype == torch.float32 else torch.finfo(one.dtype).eps
        error, allowed = worst(one, other), 16 * eps * other.abs().max().item()
        if not error <= allowed:
            return f"result {number} differs from the first tile's by {error:.2e}, allowed {allowed:.2e}"
    return None


def pick(current: TileSizes, medians: dict[TileSizes, float]) -> TileSizes | None:
    """Return the fastest tile, the current one if the gain is small, or None if the current one was not timed."""
    if current not in medians:
        return None
    best = min(medians, key=lambda tile: medians[tile])
    return current if medians[best] >= GAIN * medians[current] else best


def show(tile: TileSizes) -> str:
    """Write a tile as rows, keys, warps, stages, and the path if it is not pointers."""
    path = "" if tile.path == "pointers" else f",{tile.path}"
    return f"{tile.rows},{tile.keys},{tile.warps},{tile.stages}{path}"


# -- the file ----------------------------------------------------------------------------------------------------------


def with_tile(row: dict[str, Any], tile: TileSizes, device: str) -> dict[str, Any]:
    """Put a tile that was measured on a device into a row, keeping the order of its entries."""
    path = {} if tile.path == "pointers" else {"path": tile.path}
    return {
        **{name: value for name, value in row.items() if name not in ("path", "measured", "device")},
        "tile": [tile.rows, tile.keys, tile.warps, tile.stages],
        **path,
        "measured": True,
        "device": device,
    }


def layout(document: dict[str, Any]) -> str:
    """Format ``configs.json`` with one row on each line."""
    rows = ",\n".join(f"    {json.dumps(row)}" for row in document["rows"])
    return f'{{\n  "format": {document["format"]},\n  "rows": [\n{rows}\n  ]\n}}\n'


def write(path: Path, document: dict[str, Any]) -> None:
    """Write the file in one step."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(layout(document), encoding="utf-8")
    part.replace(path)


# -- command -----------------------------------------------------------------------------------------------------------


def arch_of(capability: tuple[int, int]) -> int | None:
    """Return the class of the table that a card fills, or None: other cards borrow a class."""
    number = capability[0] * 10 + capability[1]
    return number if number in CLASSES else None


def _one_of(option: str, value: Any, allowed: Sequence[Any]) -> None:
    if value is not None and value not in allowed:
        raise typer.BadParameter(f"{option} must be one of {', '.join(map(str, allowed))}, got {value}")


def main(
    *,
    kernel: Annotated[str | None, typer.Option(help=f"Only rows of this kernel: {', '.join(KERNELS)}.")] = None,
    bits: Annotated[int | None, typer.Option(help="Only rows of this width, 16 or 32.")] = None,
    head_size: Annotated[int | None, typer.Option(help="Only rows of this head size: 64, 128 or 256.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each candidate.")] = 20,
    seconds: Annotated[float, typer.Option(min=1, help="When to stop; rows done by then are written.")] = 480.0,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes that compile. [default: the cores, if device memory allows]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the candidates, on any machine.")] = False,
    arch: Annotated[int, typer.Option(help="Class of cards for the dry run, 80 or 90.")] = 90,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Run a few tiny rows on the CPU, to test the code; writes nothing.")
    ] = False,
) -> int:
    """Time candidates for the kernels' tile sizes on this GPU, and write the fastest to configs.json.

    Exits with 1 if a row's own tile could not be timed, and with 2 without a CUDA device that fills the table.
    """
    _one_of("--kernel", kernel, KERNELS)
    _one_of("--bits", bits, (16, 32))
    _one_of("--head-size", head_size, HEAD_SIZES)
    _one_of("--arch", arch, tuple(CLASSES))
    start = time.monotonic()
    document = json.loads(TABLE.read_text(encoding="utf-8"))
    if dry_run:
        for spot in spots_of(document["rows"], arch, kernel=kernel, bits=bits, head_size=head_size):
            case = timed_case(spot)
            print(f"{spot.label()}: on {case.name}, {case.batch} x {case.num_rows}, {case.heads}:{case.groups} heads")
            print(f"  {'  '.join(show(tile) for tile in candidates(spot.row))}")
        return 0
    if os.environ.get(ENVIRONMENT_VARIABLE):
        print(f"{ENVIRONMENT_VARIABLE} is set and forces the sizes that would be tuned; unset it", file=sys.stderr)
        return 2
    if smoke:
        # Before triton is first imported.
        os.environ["TRITON_INTERPRET"] = "1"
        name, repeats, warmup = "CPU", 1, 1
        # One row of each kernel with two tiles.
        tiles = [TileSizes(16, 16, 4, 1), TileSizes(32, 16, 4, 1)]
        spots = [spots_of(document["rows"], 80, kernel=name, bits=16, head_size=64)[0] for name in KERNELS]
        prepared = [Candidate(spot, tile, is_smoke=True) for spot in spots for tile in tiles]
    elif not torch.cuda.is_available():
        print("no CUDA device: nothing was timed, nothing written (--dry-run shows the candidates)", file=sys.stderr)
        return 2
    else:
        _, capability = where(is_smoke=False)
        name, warmup, own = torch.cuda.get_device_name(), 3, arch_of(capability)
        if own is None:
            print(
                f"{name} (compute capability {capability[0]}.{capability[1]}) fills no class of the table; only "
                f"{', '.join(f'{number / 10}' for number in CLASSES)} do",
                file=sys.stderr,
            )
            return 2
        spots = spots_of(document["rows"], own, kernel=kernel, bits=bits, head_size=head_size)
        prepared = [Candidate(spot, tile, is_smoke=False) for spot in spots for tile in candidates(spot.row)]
    device, capability = where(is_smoke=smoke)
    setting = Setting(device, repeats, warmup, 0.0, {})
    right, missing = prepare_all(prepared, jobs or default_processes(device), start + COMPILING * seconds)
    num_written, num_lost, missed = 0, 0, []
    for number, spot in enumerate(spots, 1):
        current = next(one.tile for one in prepared if one.spot == spot)
        found, unknown = right.get(spot.index, []), missing.get(spot.index, [])
        # Without the tile of the table, there is nothing to compare with.
        if current in unknown or time.monotonic() - start > seconds:
            missed.append(spot.label())
            continue
        print(f"[{number}/{len(spots)}] {spot.label()}", flush=True)
        if unknown:
            print(f"  not reached: {'  '.join(show(tile) for tile in unknown)}", flush=True)
        medians = tune_spot(spot, found, setting, capability, is_smoke=smoke) if current in found else {}
        best = pick(current, medians)
        if best is None:
            num_lost += 1
            print("  its own tile was not timed: the row stays unchanged", flush=True)
            continue
        print(f"  -> {show(best)}", flush=True)
        if not smoke:
            document["rows"][spot.index] = with_tile(spot.row, best, name)
            write(TABLE, document)
            num_written += 1
    for label in missed:
        print(f"not reached: {label}")
    if not smoke:
        print(f"{num_written} of {len(spots)} rows written to {TABLE} after {time.monotonic() - start:.0f} s")
    return 1 if num_lost else 0
