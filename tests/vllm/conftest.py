"""A checkpoint, a store and the answers of transformers, for real vLLM on the CPU; skipped without vLLM."""

from __future__ import annotations

import os

# Before vLLM is imported: in this process, without a network, and quiet.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # there may be fewer cores than workers
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
)

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gisting import GistStore, GistTokenizer, patch, save_pretrained
from tests import tiny

IS_HERE = importlib.util.find_spec("vllm") is not None
# (k, words of the prompt): eight prompts.
PROMPTS = {
    "one": (1, 40),
    "three": (3, 17),
    "eight": (8, 60),
    "seventeen": (17, 33),
    "long": (130, 90),
    "other one": (1, 21),
    "other eight": (8, 60),
    "other long": (130, 70),
}
MAX_TOKENS = 24
CHAT = (
    "{% for m in messages %}{% if m.role == 'system' %}w58 {{ m.content }} w59 {% elif m.role == 'user' %}w56 "
    "{{ m.content }} w57 {% else %}{{ m.content }} </s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w55 {% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests if vLLM is not installed. tests/vllm/run makes a separate environment for it."""
    here = Path(__file__).parent
    for item in items:
        if not IS_HERE and here in item.path.parents:
            item.add_marker(
                pytest.mark.skip(reason="vLLM is not installed; tests/vllm/run makes an environment for it")
            )


@dataclass(frozen=True)
class Served:
    """A checkpoint on disk with its gists, and the same model in transformers."""

    path: Path
    store: Path
    model: Any
    tokenizer: GistTokenizer

    def answer(self, rest: Sequence[int], name: str | None = None, max_tokens: int = MAX_TOKENS) -> list[int]:
        """Return the ids that stock transformers answers greedily."""
        extra: dict[str, Any] = {}
        ids = list(rest)
        if name is not None:
            cache = GistStore(self.store)[name]
            ids = [self.tokenizer.gist_token_id] * cache.num_gist_tokens[0] + ids
            extra["past_key_values"] = cache.as_past_key_values()
        given = torch.tensor([ids])
        with torch.inference_mode():
            out = self.model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=max_tokens,
                eos_token_id=len(self.tokenizer) + 1,  # none: as long as vLLM with ignore_eos
                do_sample=False,
                **extra,
            )
        return out[0, len(ids) :].tolist()


def prompt_text(name: str) -> str:
    """Return the prompt of a name, which is different for each."""
    return tiny.words(PROMPTS[name][1], seed=100 + list(PROMPTS).index(name))


def make(folder: Path, seed: int = 1) -> Served:
    """Make a random LLaMA with its store. Its heads have 32 numbers, which vLLM's CPU attention supports."""
    inner = tiny.word_tokenizer()
    inner.chat_template = CHAT
    tokenizer = GistTokenizer(inner, "plain")
    model = tiny.model("llama", hidden_size=128, intermediate_size=192, head_dim=32, max_position_embeddings=512)
    if seed != 1:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.01 * seed)
    patch(model, tokenizer)
    save_pretrained(model, tokenizer, folder / "model")
    with GistStore(folder / "store") as store:
        for name, (k, _) in PROMPTS.items():
            store.get_or_compress(model, tokenizer, [prompt_text(name)], k, names=[name])
    return Served(folder / "model", folder / "store", model, tokenizer)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return make(tmp_path_factory.mktemp("served"))
