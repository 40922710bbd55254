"""The shipped adapter with real vLLM: its untouched base model serves its gists, with the tokens of `generate`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gisting
from gisting import GistError, GistStore
from gisting.demo import museum
from gisting.demo.base_model import fetch
from gisting.models import adapters
from tests.vllm.conftest import Served
from tests.vllm.test_engine import counted, engine, params

ADAPTER = Path(gisting.__file__).parent / "adapters" / "smollm2-135m-instruct"
QUESTIONS = ("Who are you?", "When are you open?", "What does it cost?", "Tell me a joke.")
PROMPTS = {
    "museum": (Path(museum.__file__).parent / "museum.txt").read_text(encoding="utf-8").strip(),
    "bakery": "You are the assistant of Hollis Bakery in Porto. Rye bread costs 4 euros. We are closed on Mondays.",
}
NUM_TOKENS = 16


@pytest.mark.slow
def test_the_gists_of_the_shipped_adapter_are_served_by_its_untouched_base(tmp_path: Path) -> None:
    from gisting.serving.vllm import request

    pytest.importorskip("peft")
    try:
        base = fetch()
    except (GistError, ImportError) as error:
        pytest.skip(f"the base model can be had from nowhere: {error}")
    model, tokenizer = gisting.load(base, "chat", dtype=torch.float32)
    adapters.load(model, ADAPTER)
    with GistStore(tmp_path / "store") as store:
        for k, (name, prompt) in zip((8, 16), PROMPTS.items(), strict=True):
            store.get_or_compress(model, tokenizer, [prompt], k, names=[name])
    adapters.detach(model)
    # vLLM takes only ids that have an embedding row, and the base model has none to spare; `gisting serve` prints this.
    copy = tmp_path / "base"
    gisting.save_pretrained(model, tokenizer, copy)
    served = Served(copy, tmp_path / "store", model, tokenizer)
    wanted, expected = [], []
    for name in PROMPTS:
        cache = GistStore(served.store)[name]
        for question, ids in zip(QUESTIONS, tokenizer.encode_continuations(QUESTIONS), strict=True):
            prompt = request(name, token_ids=ids, tokenizer=tokenizer, num_gist_tokens=cache.num_gist_tokens[0]).prompt
            wanted.append((prompt, params(name, NUM_TOKENS)))
            expected.append(served.answer(ids, name, NUM_TOKENS))
            (said,) = gisting.generate(model, tokenizer, [question], cache=cache, max_new_tokens=NUM_TOKENS)
            assert tokenizer.decode(expected[-1]).strip().startswith(said.strip())
    assert expected[: len(QUESTIONS)] != expected[len(QUESTIONS) :], "the gist makes no difference"
    with engine(served) as llm:
        outputs = llm.generate(*map(list, zip(*wanted, strict=True)), use_tqdm=False)
        counts = counted(llm)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert counts["gist_requests"] == len(wanted)
