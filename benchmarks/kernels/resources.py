"""Compile the kernels with every row of ``configs.json`` for sm_80 and sm_90, without a GPU, and report what they use.

Place in the flow: ``configs.json`` and the kernels -> **resources** -> ``docs/kernel_resources.md``. It reports
registers, stack (spills) and shared memory per program, whether the loop loads ahead (asynchronous copies in the IR),
and whether it uses tensor-core instructions. A row is faulty if its stack exceeds 64 bytes, if ptxas falls back to 32
registers, if it needs more shared memory than the card has, if a loop does not load ahead, or if there is no
tensor-core instruction, or if a kernel that takes descriptors has no bulk copies. The loop of the table-gradient kernel
need not load ahead, because it contains a barrier. The loop of the ping-pong kernel does not load at all; others
of its warps do.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gisting.markdown import markdown_table
from gisting_kernels.configs import CLASSES, HEAD_SIZES, read_table
from gisting_kernels.op import MAX_HEAD_SIZE_FLOAT32

MAX_STACK = 64
# Compiled besides the rows of the table: head size, bias, tile, path.
VARIANTS = (
    (64, False, (128, 64, 4, 3), "descriptors"),
    (64, True, (128, 64, 8, 3), "descriptors"),
    (128, False, (64, 64, 4, 3), "descriptors"),
    (128, False, (128, 128, 8, 3), "descriptors"),
    (128, True, (128, 64, 8, 3), "descriptors"),
)
# Kernels that multiply no matrices, so there is nothing to load ahead.
SMALL_KERNELS = ("merge", "bounds", "list", "range", "order")


@dataclass(frozen=True)
class Case:
    """A kernel with one configuration, compiled as a call would compile it."""

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
    path: str = "pointers"

    @property
    def options(self) -> str:
        """The options that are compiled in, in words, and the path if it is not pointers."""
        names = [name for name in ("bias", "softcap", "dropout", "even") if getattr(self, name)]
        if self.path != "pointers":
            names.append(self.path)
        return ", ".join(names) or "no"


@dataclass(frozen=True)
class Resources:
    """What a compiled case uses."""

    registers: int
    stack: int
    shared: int
    num_loops: int
    num_loops_ahead: int
    tensor_instruction: str
    num_bulk_copies: int = 0

    def faults(self, case: Case, shared_limit: int) -> list[str]:
        """Describe the limits that the case breaks."""
        found = []
        # Tile sizes do not depend on dropout and softcap, so their spills are shown but not limited.
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
        if case.path != "pointers" and self.num_bulk_copies == 0:
            found.append("no bulk copy")
        return found


def cases_of_table() -> list[Case]:
    """List what is compiled.

    These are all rows of the table, with and without a bias if the kernel has both; the decoding kernel; some rows with
    other options; and the kernels that multiply no matrices.
    """
    from gisting_kernels.decode import decode_size

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
                path=row.get("path", "pointers"),
            )
            for bias in biases
        ]
    known = {(case.head_size, case.bias, case.tile, case.path) for case in cases if case.kernel == "forward"}
    cases += [
        Case(90, "forward", 16, size, "any", tile, bias, path=path)
        for size, bias, tile, path in VARIANTS
        if (size, bias, tile, path) not in known
    ]
    for arch, bits, head_size, packed in itertools.product(CLASSES, (16, 32), HEAD_SIZES, (16, 64)):
        if bits == 16 or head_size <= MAX_HEAD_SIZE_FLOAT32:
            size = decode_size(packed, head_size, bits)
            cases.append(Case(arch, "decode", bits, head_size, "any", (size.rows, size.keys, size.warps, size.stages)))
    plain = [case for case in cases if case.bits == 16 and case.segment == "long" and not case.bias]
    for option in ("softcap", "dropout", "even"):
        for case in plain:
            if case.head_size == 64 and (case.path != "pingpong" or option != "even"):
                # The ping-pong kernel has no options; a plan that was made for none uses its tile with them.
                path = "descriptors" if case.path == "pingpong" else case.path
                cases.append(dataclasses.replace(case, **{option: True}, path=path))
    biased = [case for case in cases if case.bits == 16 and case.segment == "long" and case.bias]
    cases += [dataclasses.replace(case, dropout=True) for case in biased if case.head_size == 64]  # T5 in training
    # A head size that is not a power of two uses the tiles of the next power.
    cases += [dataclasses.replace(case, head_size=80) for case in plain if case.head_size == 128]
    cases += [Case(arch, kernel, 16, 64, "any", (64, 64, 4, 1)) for arch in CLASSES for kernel in SMALL_KERNELS]
    return cases


def compile_case(case: Case) -> Resources:
    """Compile one case. Needs triton, but no GPU.

    Raises:
        Exception: whatever Triton raises if it cannot compile the case.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gisting_kernels import backward, decode, forward, plan_kernels

    if case.path == "pingpong":
        return _compile_pingpong(case)

    functions: dict[str, Any] = {
        "forward": forward.forward_kernel,
        "query": backward.query_kernel,
        "key": backward.key_kernel,
        "table": backward.table_kernel,
        "decode": decode.decode_kernel,
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
        "EVEN_K": case.even, "PRECISION": "ieee" if case.bits == 16 else "tf32x3", "HAS_NEAR": True, "CHUNK": 128,
        "BLOCK": 32, "BS": 64, "DESCRIPTORS": case.path == "descriptors", "STAGES": stages,
    }  # fmt: skip
    element = "*bf16" if case.bits == 16 else "*fp32"
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[(position,)] = constants[name]
        elif case.path == "descriptors" and name in ("p_q", "p_k", "p_v", "p_grad"):
            height = rows if name in ("p_q", "p_grad") else keys
            signature[name] = f"tensordesc<{element[1:]}[1, 1, {height}, {constants['BD']}]>"
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
            # The head dimension is contiguous; Triton specialises on a stride of 1.
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
    return _read(compiled, hot_loops(compiled.asm["ttgir"]))


def _compile_pingpong(case: Case) -> Resources:
    """Compile the ping-pong kernel. Its one loop that loads is the loader's."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from gisting_kernels.descriptors import layout_of
    from gisting_kernels.pingpong import pingpong_kernel

    rows, keys, _, stages = case.tile
    padded = 1 << (case.head_size - 1).bit_length()
    constants = {"GROUP": 4, "HALF": rows // 2, "BN": keys, "BD": padded, "STAGES": stages, "s_mask": 1}
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(pingpong_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[(position,)] = constants[name]
        elif name in ("q", "k", "v", "out"):
            block = (keys if name in ("k", "v") else rows // 2, padded)
            signature[name] = f"tensordesc<bf16[1, 1, {block[0]}, {block[1]}],{layout_of(*block, torch.bfloat16)!r}>"
        elif name.startswith("p_"):
            signature[name] = "*fp32" if name == "p_lse" else "*i32"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    compiled = triton.compile(
        GluonASTSource(fn=pingpong_kernel, signature=signature, constexprs=constexprs, attrs=attributes),
        target=GPUTarget("cuda", case.arch, 32),
        options={"num_warps": 4, "enable_fp_fusion": True},
    )
    loops = [loop for loop in loops_of(compiled.asm["ttgir"]) if "async_tma_copy_global_to_local" in loop]
    return _read(compiled, loops[:1])


def _read(compiled: Any, loops: list[str]) -> Resources:
    """Read what a compiled kernel uses; ``loops`` are those that should load ahead."""
    usage = _resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    found = re.search(r"\b(wgmma\.mma_async|mma\.sync)\b[\w.]*", ptx)
    return Resources(
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=compiled.metadata.shared,
        num_loops=len(loops),
        num_loops_ahead=sum("async_copy_global_to_local" in loop or "async_tma_copy" in loop for loop in loops),
        tensor_instruction="" if found is None else found.group(1),
        num_bulk_copies=len(re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared", ptx)),
    )


def hot_loops(ir: str) -> list[str]:
    """Return the text of each loop in Triton's GPU IR that multiplies matrices. These kernels have no nested loops."""
    return [loop for loop in loops_of(ir) if re.search(r"\btt\.dot\b|warp_group_dot\b", loop)]


def loops_of(ir: str) -> list[str]:
    """Return the text of each loop in Triton's GPU IR."""
    loops, lines = [], ir.splitlines()
    for number, line in enumerate(lines):
        if "scf.for" not in line:
            continue
        indent = len(line) - len(line.lstrip())
        stop = next(at for at in range(number + 1, len(lines)) if lines[at].startswith(" " * indent + "}"))
        loops.append("\n".join(lines[number:stop]))
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
    except Exception as error:  # noqa: BLE001  a failure to compile is a result, with its reason
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def write_markdown(results: Sequence[tuple[Case, Resources | str]], versions: str) -> str:
    """Make the page ``docs/kernel_resources.md``."""
    columns = (
        "card", "kernel", "bits", "D", "segments", "options", "tile", "registers", "stack", "shared", "ahead",
        "copies", "instruction",
    )  # fmt: skip
    lines = []
    for case, used in results:
        rows, keys, warps, stages = case.tile
        line = [f"sm_{case.arch}", case.kernel, str(case.bits), str(case.head_size), case.segment, case.options]
        line.append(f"{rows} x {keys}, {warps}, {stages}")
        if isinstance(used, str):
            line += [f"failed: {used}", "", "", "", "", ""]
        else:
            ahead = f"{used.num_loops_ahead} of {used.num_loops}"
            copies = str(used.num_bulk_copies or "")
            line += [str(used.registers), str(used.stack), f"{used.shared:,}", ahead, copies, used.tensor_instruction]
        lines.append(line)
    return "\n".join(
        [
            "# What the kernels use",
            "",
            "The registers, stack and shared memory that the kernels use with each row of the table of tile sizes,",
            f"compiled without a GPU by `python -m benchmarks resources` ({versions}). Speed is not measured here.",
            "",
            "- tile: rows x keys, warps, stages",
            "- stack: bytes that a thread spills (the limit is 64)",
            "- shared: bytes of shared memory per program",
            "- ahead: how many of the loops that multiply matrices load ahead; with pingpong, of the loops that load",
            "- copies: bulk copies by the tensor copy unit (descriptors, pingpong)",
            "",
            "Four query heads share a key head, and no length is a multiple of a tile. 16 bits are bfloat16; 32 bits",
            "are float32, by three TF32 products. Rows with dropout or softcap show what these options cost; tile",
            'sizes do not depend on them, so the limit of the stack does not apply. Rows with segments "any" and',
            "descriptors at D 64 and 128 are candidates that the table does not use.",
            "",
            *markdown_table(columns, lines),
            "",
        ]
    )


def main(
    *,
    output: Annotated[Path | None, typer.Option(help="Markdown file to write.")] = None,
    arch: Annotated[int | None, typer.Option(help="Only this class of cards, 80 or 90.")] = None,
    kernel: Annotated[str | None, typer.Option(help="Only this kernel.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> int:
    """Report the registers, stack and shared memory that the kernels use, without a GPU.

    Exits with 1 if a row breaks a limit.
    """
    import triton

    cases = [case for case in cases_of_table() if arch in (None, case.arch) and kernel in (None, case.kernel)]
    if not cases:
        raise typer.BadParameter(
            f"no row has --arch {arch} and --kernel {kernel}; the classes are {', '.join(map(str, CLASSES))}, the "
            f"kernels {', '.join(dict.fromkeys(case.kernel for case in cases_of_table()))}"
        )
    results, num_faults = [], 0
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        for case, used in zip(cases, pool.map(_compile_safely, cases), strict=True):
            faults = [used] if isinstance(used, str) else used.faults(case, CLASSES[case.arch])
            num_faults += bool(faults)
            print(case, used if not isinstance(used, str) else "", *faults, flush=True)
            results.append((case, used))
    if output is not None:
        output.write_text(write_markdown(results, f"torch {torch.__version__}, triton {triton.__version__}"))
    print(f"{len(results)} configurations, {num_faults} with a fault")
    return 1 if num_faults else 0
