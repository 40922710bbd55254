"""Put a vLLM engine under load in this process; :mod:`benchmarks.vllm` starts one process for each configuration.

Place in the flow: vllm -> **vllm_load** -> vLLM. Keeps a number of requests in flight and records when each starts to
answer and when it is done. Only what needs vLLM is here; models, prompts, tables and rows belong to the benchmark.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["LoadCell", "LoadTask", "run"]


@dataclass(frozen=True)
class LoadTask:
    """One configuration of the engine and its requests.

    Args:
        model: directory of the checkpoint.
        store: directory of the gists, or None for an engine without them.
        is_prefix_cached: whether vLLM caches prefixes.
        num_blocks: blocks of the paged cache.
        block_size: positions in a block.
        concurrencies: numbers of requests in flight, tried one after another.
        warm: requests before the clock starts: ids, and the name of a gist or None.
        requests: timed requests for each concurrency.
        num_new_tokens: length of each answer.
        max_model_len: the longest sequence.
    """

    model: str
    store: str | None
    is_prefix_cached: bool
    num_blocks: int
    block_size: int
    concurrencies: list[int]
    warm: list[tuple[list[int], str | None]]
    requests: list[list[tuple[list[int], str | None]]]
    num_new_tokens: int
    max_model_len: int


@dataclass(frozen=True)
class LoadCell:
    """The result of one concurrency.

    Args:
        concurrency: requests in flight.
        num_requests: in total.
        requests_per_s: over all requests.
        first_token_s: for each request, from its submission to its first token.
        answers: ids of the answers, in the order of the requests.
        num_preemptions: how often a request was preempted.
        hit_rate: share of the looked-up ids that vLLM's own cache held.
    """

    concurrency: int
    num_requests: int
    requests_per_s: float
    first_token_s: list[float]
    answers: list[list[int]]
    num_preemptions: int
    hit_rate: float


def run(task: LoadTask) -> list[LoadCell]:
    """Make the engine, warm it up and time it; return a result for each concurrency of ``task``."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    from vllm import LLM  # pyright: ignore
    from vllm.config import KVTransferConfig  # pyright: ignore[reportMissingImports]

    ours: dict[str, Any] = {}
    if task.store is not None:
        from gisting.serving.vllm import NoGistTokens

        transfer = KVTransferConfig(
            kv_connector="GistConnector",
            kv_connector_module_path="gisting.serving.vllm",
            kv_role="kv_both",
            kv_connector_extra_config={"store": task.store},
        )
        ours = {"kv_transfer_config": transfer, "logits_processors": [NoGistTokens]}
    llm = LLM(
        model=task.model,
        dtype="float32",
        max_model_len=task.max_model_len,
        enforce_eager=True,
        disable_log_stats=False,
        max_num_seqs=max(task.concurrencies),
        enable_prefix_caching=task.is_prefix_cached,
        block_size=task.block_size,
        num_gpu_blocks_override=task.num_blocks,
        **ours,
    )
    _answer_all(llm, task, task.warm, max(task.concurrencies))
    cells = []
    for concurrency, requests in zip(task.concurrencies, task.requests, strict=True):
        gc.collect()
        before = _counts(llm)
        elapsed, first, answers = _answer_all(llm, task, requests, concurrency)
        preemptions, asked, hits = (now - then for now, then in zip(_counts(llm), before, strict=True))
        rate = hits / asked if asked else 0.0
        cells.append(
            LoadCell(concurrency, len(requests), len(requests) / elapsed, first, answers, int(preemptions), rate)
        )
    return cells


def _answer_all(
    llm: Any, task: LoadTask, requests: Sequence[tuple[list[int], str | None]], concurrency: int
) -> tuple[float, list[float], list[list[int]]]:
    """Seconds for all, seconds to each first token, and the answers."""
    from vllm import SamplingParams  # pyright: ignore

    engine = llm.llm_engine
    waiting = deque(range(len(requests)))
    began: dict[str, float] = {}
    first: dict[int, float] = {}
    answers: dict[int, list[int]] = {}
    start = time.perf_counter()
    while waiting or began:
        while waiting and len(began) < concurrency:
            number = waiting.popleft()
            ids, gist = requests[number]
            extra = None if gist is None else {"kv_transfer_params": {"gist": gist}}
            settings = SamplingParams(
                temperature=0, max_tokens=task.num_new_tokens, ignore_eos=True, detokenize=False, extra_args=extra
            )
            began[str(number)] = time.perf_counter()
            engine.add_request(str(number), {"prompt_token_ids": ids}, settings)
        for output in engine.step():
            number, now = int(output.request_id), time.perf_counter()
            if output.outputs and output.outputs[0].token_ids:
                first.setdefault(number, now - began[output.request_id])
            if output.finished:
                del began[output.request_id]
                answers[number] = list(output.outputs[0].token_ids)
                first.setdefault(number, float("nan"))
    elapsed = time.perf_counter() - start
    return elapsed, [first[number] for number in range(len(requests))], [answers[n] for n in range(len(requests))]


def _counts(llm: Any) -> tuple[float, float, float]:
    """Preemptions, ids looked up in vLLM's own cache, ids found there."""
    found = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    names = ("vllm:num_preemptions", "vllm:prefix_cache_queries", "vllm:prefix_cache_hits")
    preemptions, queries, hits = (found.get(name, 0.0) for name in names)
    return preemptions, queries, hits


def _main(source: str, target: str) -> None:
    cells = run(LoadTask(**json.loads(Path(source).read_text(encoding="utf-8"))))
    Path(target).write_text(json.dumps([asdict(cell) for cell in cells]), encoding="utf-8")


if __name__ == "__main__":
    # python -m benchmarks.vllm_load TASK CELLS: a fresh process for each configuration.
    _main(*sys.argv[1:])
