"""Write every table of the README and of docs/ that is made from committed rows.

Place in the flow: docs/results/*.jsonl -> **pages** -> Markdown pages. Imports the benchmarks; none of them imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.adapter.on_top import on_top_table
from benchmarks.adapter.recipe import adapter_table
from benchmarks.card_tables import kernels_table, real_model_table, step_table
from benchmarks.check import check_table
from benchmarks.codes import codes_table
from benchmarks.cpu_attention import attention_table
from benchmarks.demo import demo_table, museum_excerpt, museum_output
from benchmarks.distill import distill_table, starts_table
from benchmarks.distill_time import distill_time_table
from benchmarks.distillation import distillation_table
from benchmarks.families import families_table
from benchmarks.flood import flood_table
from benchmarks.inference import highlights_table, inference_table, losses_table
from benchmarks.internalize import internalize_table, serving_table
from benchmarks.memory import memory_table
from benchmarks.methods import methods_table
from benchmarks.nl2bash import nl2bash_costs_table, nl2bash_requests_table, nl2bash_table
from benchmarks.objective import objective_table
from benchmarks.quality import quality_table
from benchmarks.storage import storage_table
from benchmarks.store import store_table
from benchmarks.training import training_table
from benchmarks.vllm import vllm_highlights, vllm_table
from gisting.errors import GistError
from gisting.measure.inference_results import plot
from gisting.measure.rows import read_rows

__all__ = ["TABLES", "main", "write_between"]

ROOT = Path(__file__).resolve().parents[1]
#: Page, mark, file of rows, and the function that makes the table.
TABLES: list[tuple[str, str, str, Callable[[list[dict[str, Any]]], str]]] = [
    ("README.md", "demo results", "demo.jsonl", demo_table),
    ("README.md", "inference highlights", "inference.jsonl", highlights_table),
    ("README.md", "vllm highlights", "vllm.jsonl", vllm_highlights),
    ("README.md", "demo excerpt", "museum.jsonl", museum_excerpt),
    ("docs/demo.md", "museum output", "museum.jsonl", museum_output),
    ("docs/benchmarks.md", "cpu attention results", "cpu_attention.jsonl", attention_table),
    ("docs/benchmarks.md", "kernels results", "kernels.jsonl", kernels_table),
    ("docs/benchmarks.md", "step results", "kernels.jsonl", step_table),
    ("docs/benchmarks.md", "inference results", "inference.jsonl", inference_table),
    ("docs/benchmarks.md", "inference losses", "inference.jsonl", losses_table),
    ("docs/stores.md", "storage results", "storage.jsonl", storage_table),
    ("docs/stores.md", "store results", "store.jsonl", store_table),
    ("docs/evaluation.md", "quality results", "quality.jsonl", quality_table),
    ("docs/training.md", "training results", "training.jsonl", training_table),
    ("docs/training.md", "methods results", "methods.jsonl", methods_table),
    ("docs/training.md", "real model results", "smollm2.jsonl", real_model_table),
    ("docs/training.md", "adapter results", "adapter.jsonl", adapter_table),
    ("docs/training.md", "adapter distil results", "adapter_distil.jsonl", on_top_table),
    ("docs/training.md", "objective results", "objective.jsonl", objective_table),
    ("docs/training.md", "distillation results", "distillation.jsonl", distillation_table),
    ("docs/models.md", "families results", "families.jsonl", families_table),
    ("docs/models.md", "check results", "check.jsonl", check_table),
    ("docs/how_to_quantised.md", "memory results", "memory.jsonl", memory_table),
    ("docs/how_to_distill.md", "distill results", "distill.jsonl", distill_table),
    ("docs/how_to_distill.md", "distill time", "distill_time.jsonl", distill_time_table),
    ("docs/how_to_distill.md", "distill starts", "distill_starts.jsonl", starts_table),
    ("docs/internalisation.md", "internalize results", "internalize.jsonl", internalize_table),
    ("docs/internalisation.md", "requests results", "internalize.jsonl", serving_table),
    ("docs/internalisation.md", "codes results", "codes.jsonl", codes_table),
    ("docs/internalisation.md", "nl2bash results", "nl2bash.jsonl", nl2bash_table),
    ("docs/internalisation.md", "nl2bash costs", "nl2bash.jsonl", nl2bash_costs_table),
    ("docs/internalisation.md", "nl2bash requests", "nl2bash.jsonl", nl2bash_requests_table),
    ("docs/vllm.md", "vllm results", "vllm.jsonl", vllm_table),
    ("docs/vllm.md", "flood results", "flood.jsonl", flood_table),
]


def write_between(path: str | Path, name: str, text: str) -> None:
    """Replace the text between ``<!-- name -->`` and ``<!-- end of name -->`` in a Markdown file.

    Raises:
        GistError: the marks are not there.
    """
    path = Path(path)
    whole = path.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if start not in whole or end not in whole:
        raise GistError(f"{path} must contain the lines {start.strip()} and {end}")
    head, rest = whole.split(start, 1)
    path.write_text(head + start + text + "\n" + end + rest.split(end, 1)[1], encoding="utf-8")


def main() -> None:
    """Write every table of the README and docs/ from the rows in docs/results/, and draw the plot."""
    results = ROOT / "docs" / "results"
    for page, name, file, table in TABLES:
        write_between(ROOT / page, name, table(read_rows(results / file)))
    plot(read_rows(results / "inference.jsonl"), results / "inference.png")
