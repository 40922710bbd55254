"""Compile every row of ``configs.json`` for sm_80 and sm_90, without a GPU, and write what the compiler used.

    python benchmarks/kernels/resources.py --output docs/kernel_resources.md

Registers, stack (spills) and shared memory per program, whether the loop loads ahead (asynchronous copies in the IR)
and whether it computes on the tensor cores' own instructions. Exits with 1 where a row breaks a limit: a stack over 64
bytes, the 32 registers with which ptxas gives up, more shared memory than the card has, a loop that does not load
ahead, no tensor-core instruction. The loop of the table-gradient kernel is not asked to load ahead: it has a barrier.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
sys.path.insert(0, str(KERNELS))

MAX_STACK = 64
# They multiply no matrices, so there is nothing to load ahead.
SMALL_KERNELS = ("delta", "merge", "bounds", "list", "range", "order")


@dataclass(frozen=True)
class Case:
    """One kernel with one configuration, as a call would compile it."""

    arch: int
    kernel: str
    bits: int
    head_size: int
    segment: str
    tile: tuple[int, int, int, int]
    bias: bool = False
    softcap: bool = False
    dropout: bool = False
    even: bool = False

    @property
    def options(self) -> str:
        """What is compiled in, for people."""
        names = [name for name in ("bias", "softcap", "dropout", "even") if getattr(self, name)]
        return ", ".join(names) or "no"


@dataclass(frozen=True)
class Resources:
    """What the compiler used for a case."""

    registers: int
    stack: int
    shared: int
    num_loops: int
    num_loops_ahead: int
    tensor_instruction: str

    def faults(self, case: Case, shared_limit: int) -> list[str]:
        """What breaks a limit."""
        found = []
        # Tile sizes do not depend on dropout and softcap: what these cost is shown, not held to the limit.
        if self.stack > MAX_STACK and not (case.dropout or case.softcap):
            found.append(f"stack of {self.stack} bytes")
        if self.registers == 32 and case.kernel not in SMALL_KERNELS:
            found.append("ptxas fell back to 32 registers")
        if self.shared > shared_limit:
            found.append(f"{self.shared} bytes of shared memory, the limit is {shared_limit}")
        if case.kernel in SMALL_KERNELS:
            return found
        if self.num_loops_ahead < self.num_loops and case.kernel != "table":
            found.append(f"{self.num_loops - self.num_loops_ahead} of {self.num_loops} loops do not load ahead")
        if not self.tensor_instruction:
            found.append("no tensor-core instruction")
        return found


def cases_of_table() -> list[Case]:
    """Every row of the table, with and without bias where the kernel has both; the kernel for decoding; some rows with
    what else can be compiled in; the kernels that multiply nothing.
    """
    from gisting_kernels.configs import CLASSES, HEAD_SIZES, read_table
    from gisting_kernels.decode import decode_size
    from gisting_kernels.op import MAX_HEAD_SIZE_FLOAT32

    cases = []
    for row in read_table():
        biases = (True,) if row["kernel"] == "table" else (row["bias"],) if "bias" in row else (False, True)
        cases += [
            Case(
                row["arch"],
                row["kernel"],
                row["bits"],
                row["head_size"],
                row.get("segment", "any"),
                tuple(row["tile"]),
                bias,
            )
            for bias in biases
        ]
    for arch, bits, head_size, packed in itertools.product(CLASSES, (16, 32), HEAD_SIZES, (16, 64)):
        if bits == 16 or head_size <= MAX_HEAD_SIZE_FLOAT32:
            size = decode_size(packed, head_size, bits)
            cases.append(Case(arch, "decode", bits, head_size, "any", (size.rows, size.keys, size.warps, size.stages)))
    plain = [case for case in cases if case.bits == 16 and case.segment == "long" and not case.bias]
    for option in ("softcap", "dropout", "even"):
        cases += [dataclasses.replace(case, **{option: True}) for case in plain if case.head_size == 64]
    biased = [case for case in cases if case.bits == 16 and case.segment == "long" and case.bias]
    cases += [dataclasses.replace(case, dropout=True) for case in biased if case.head_size == 64]  # T5 in training
    # A head size that is no power of two runs in the tiles of the next.
    cases += [dataclasses.replace(case, head_size=80) for case in plain if case.head_size == 128]
    cases += [Case(arch, kernel, 16, 64, "any", (64, 64, 4, 1)) for arch in CLASSES for kernel in SMALL_KERNELS]
    return cases


def compile_case(case: Case) -> Resources:
    """Compile one case; needs triton, no GPU.

    Raises:
        Exception: what Triton raises where it cannot compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gisting_kernels import backward, decode, forward, plan_kernels

    functions: dict[str, Any] = {
        "forward": forward.forward_kernel,
        "query": backward.query_kernel,
        "key": backward.key_kernel,
        "table": backward.table_kernel,
        "decode": decode.decode_kernel,
        "delta": backward.delta_kernel,
        "merge": decode.merge_kernel,
        "bounds": plan_kernels.bounds_kernel,
        "list": plan_kernels.list_kernel,
        "range": plan_kernels.range_kernel,
        "order": plan_kernels.order_kernel,
    }
    function = functions[case.kernel]
    rows, keys, warps, stages = case.tile
    constants = {
        "GROUP": 4, "BIAS": case.bias, "TABLE_GRADIENT": case.bias, "SOFTCAP": case.softcap, "DROPOUT": case.dropout,
        "D": case.head_size, "BD": 1 << (case.head_size - 1).bit_length(), "BM": rows, "BN": keys,
        "EVEN_K": case.even, "PRECISION": "ieee" if case.bits == 16 else "tf32x3", "HAS_NEAR": True, "CHUNK": 128, "BLOCK": 32, "BS": 64,
    }  # fmt: skip
    element = "*bf16" if case.bits == 16 else "*fp32"
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[(position,)] = constants[name]
        elif name.startswith("p_"):
            integers = ("p_first", "p_end", "p_tiles", "p_counts", "p_order", "p_bounds", "p_ranges", "p_lengths")
            floats = ("p_lse", "p_delta", "p_table", "p_far", "p_partial", "p_parts")
            if name in integers:
                signature[name] = "*i32"
            elif name in floats or (case.kernel == "decode" and name == "p_out"):
                signature[name] = "*fp32"
            else:
                signature[name] = "*i64" if name == "p_seed" else element
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name == "s_mask" or re.fullmatch(r"s_.d", name):
            # Contiguous along the head size; a value of 1 is compiled in.
            signature[name] = "constexpr"
            constexprs[(position,)] = 1
        elif name in ("scale", "softcap", "dropout"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if re.fullmatch(r"s_..", name):
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", case.arch, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )
    usage = _resource_usage(compiled.asm["cubin"])
    ir, ptx = compiled.asm["ttgir"], compiled.asm["ptx"]
    loops = hot_loops(ir)
    found = re.search(r"\b(wgmma\.mma_async|mma\.sync)\b[\w.]*", ptx)
    return Resources(
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=compiled.metadata.shared,
        num_loops=len(loops),
        num_loops_ahead=sum("async_copy_global_to_local" in loop or "async_tma_copy" in loop for loop in loops),
        tensor_instruction="" if found is None else found.group(1),
    )


def hot_loops(ir: str) -> list[str]:
    """The text of each loop of Triton's GPU IR that multiplies matrices; loops do not nest in these kernels."""
    loops, lines = [], ir.splitlines()
    for number, line in enumerate(lines):
        if "scf.for" not in line:
            continue
        indent = len(line) - len(line.lstrip())
        stop = next(at for at in range(number + 1, len(lines)) if lines[at].startswith(" " * indent + "}"))
        body = "\n".join(lines[number:stop])
        if re.search(r"\btt\.dot\b|warp_group_dot\b", body):
            loops.append(body)
    return loops


def _resource_usage(cubin: bytes) -> dict[str, int]:
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)}


def _compile_safely(case: Case) -> Resources | str:
    try:
        return compile_case(case)
    except Exception as error:  # noqa: BLE001  a compiler's failure is a result of this command, with its reason
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def write_markdown(results: Sequence[tuple[Case, Resources | str]], versions: str) -> str:
    """The table of ``docs/kernel_resources.md``."""
    lines = [
        "# What the kernels use",
        "",
        f"Compiled without a GPU by `python benchmarks/kernels/resources.py` ({versions}); nothing here is a measurement",
        "of speed. Tile: rows x keys, warps, stages. Stack: bytes a thread spills (limit 64). Shared: bytes a program.",
        "Ahead: loops that load ahead, of those that multiply. The group has 4 heads, lengths are no multiple of a",
        "tile, 16 bits means bfloat16, 32 bits float32 by three TF32 products. Rows with dropout or softcap show what",
        "these cost; tile sizes do not depend on them, so they are not held to the limit of the stack.",
        "",
        "| card | kernel | bits | D | segments | options | tile | registers | stack | shared | ahead | instruction |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, used in results:
        rows, keys, warps, stages = case.tile
        start = (
            f"| sm_{case.arch} | {case.kernel} | {case.bits} | {case.head_size} | {case.segment} | "
            f"{case.options} | {rows} x {keys}, {warps}, {stages} | "
        )
        if isinstance(used, str):
            lines.append(f"{start}failed: {used} | | | | |")
        else:
            lines.append(
                f"{start}{used.registers} | {used.stack} | {used.shared:,} | {used.num_loops_ahead} of "
                f"{used.num_loops} | {used.tensor_instruction} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, write; 1 where a row breaks a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--arch", type=int, choices=(80, 90), help="only this one")
    parser.add_argument(
        "--kernel", choices=("forward", "query", "key", "table", "decode", *SMALL_KERNELS), help="only this one"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)

    import torch
    import triton

    from gisting_kernels.configs import CLASSES

    cases = [
        case for case in cases_of_table() if options.arch in (None, case.arch) and options.kernel in (None, case.kernel)
    ]
    results, num_faults = [], 0
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for case, used in zip(cases, pool.map(_compile_safely, cases), strict=True):
            faults = [used] if isinstance(used, str) else used.faults(case, CLASSES[case.arch])
            num_faults += bool(faults)
            print(case, used if not isinstance(used, str) else "", *faults, flush=True)
            results.append((case, used))
    if options.output is not None:
        options.output.write_text(write_markdown(results, f"torch {torch.__version__}, triton {triton.__version__}"))
    print(f"{len(results)} configurations, {num_faults} with a fault")
    return 1 if num_faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
