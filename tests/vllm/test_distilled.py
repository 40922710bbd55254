"""A distilled gist in real vLLM: the tokens of transformers, from the same file, however its numbers are stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gisting
from gisting import GistStore
from tests.vllm.conftest import MAX_TOKENS, Served, prompt_text
from tests.vllm.test_engine import engine, params, rest_of

K = 6
STORAGES = (None, "int8", "float8_e4m3")


def test_a_distilled_gist_is_read_as_transformers_reads_it(served: Served, tmp_path: Path) -> None:
    """In 8 bits the states are other ones, and both read the same."""
    prompt, inputs = prompt_text("eight"), [rest_of(number) for number in range(10, 20)]
    found = gisting.distill(
        served.model, served.tokenizer, prompt, inputs, K, num_answers=16, max_new_tokens=8, steps=12, value_rate=0.2
    )
    store = tmp_path / "store"
    for storage in STORAGES:
        with GistStore(store, storage=storage) as opened:
            opened.put(f"distilled {storage}", found.cache)
    mine = replace(served, store=store)
    rows = [served.tokenizer.encode_continuations([rest_of(number)])[0] for number in range(4)]
    asked = [(f"distilled {storage}", ids) for storage in STORAGES for ids in rows]
    expected = [mine.answer(ids, name) for name, ids in asked]
    assert expected[: len(rows)] != [served.answer(ids) for ids in rows], "it makes no difference"
    assert expected[: len(rows)] != [served.answer(ids, "eight") for ids in rows], "it did not learn"
    with engine(served, store=store) as llm:
        prompts = [{"prompt_token_ids": [served.tokenizer.gist_token_id] * K + ids} for _, ids in asked]
        outputs = llm.generate(prompts, [params(name, MAX_TOKENS) for name, _ in asked], use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
