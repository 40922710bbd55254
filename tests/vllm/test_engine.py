"""Real vLLM in this process: greedy tokens equal those of transformers, whatever the scheduler does."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gisting import GistCache, GistStore
from gisting.store.lru import BoundedLRU
from tests import tiny
from tests.vllm.conftest import MAX_TOKENS, PROMPTS, Served, make, prompt_text

PROCESSOR = "gisting.serving.vllm:NoGistTokens"


@contextmanager
def engine(
    served: Served, *, store: Path | None = None, extra: dict[str, Any] | None = None, **settings: Any
) -> Iterator[Any]:
    """Start an engine over a served checkpoint, and shut it down afterwards."""
    from vllm import LLM
    from vllm.config import KVTransferConfig
    from vllm.distributed import cleanup_dist_env_and_memory

    transfer = KVTransferConfig(
        kv_connector="GistConnector",
        kv_connector_module_path="gisting.serving.vllm",
        kv_role="kv_both",
        kv_connector_extra_config={"store": str(store or served.store), **(extra or {})},
        **settings.pop("transfer", {}),
    )
    given: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 512,
        "enforce_eager": True,
        "disable_log_stats": False,
        "kv_transfer_config": transfer,
        "logits_processors": [PROCESSOR],
        "enable_prefix_caching": True,
        **settings,
    }
    llm = LLM(model=str(served.path), **given)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def counted(llm: Any) -> dict[str, float]:
    """Return our counters among vLLM's metrics, and those of preemptions and prefix cache hits."""
    return {
        metric.name.removeprefix("vllm:"): metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:gist_") or metric.name in ("vllm:num_preemptions", "vllm:prefix_cache_hits")
    }


def params(name: str | None = None, max_tokens: int = MAX_TOKENS, **settings: Any) -> Any:
    from vllm import SamplingParams

    extra = {} if name is None else {"extra_args": {"kv_transfer_params": {"gist": name}}}
    settings = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **extra, **settings}
    return SamplingParams(**settings)


def rest_of(number: int) -> str:
    return tiny.words(5 + 7 * (number % 5), seed=900 + number)


@pytest.fixture(scope="module")
def batch(served: Served) -> list[tuple[str | None, list[int], list[int]]]:
    """32 requests: gist or None, the ids after it, the ids that transformers answers."""
    wanted: list[tuple[str | None, str]] = []
    for number, name in enumerate(PROMPTS):
        wanted += [(name, rest_of(number)), (name, rest_of(number + 8)), (name, rest_of(number))]
        wanted.append((None, prompt_text(name) + " " + rest_of(number)))
    made = []
    for name, text in wanted:
        (ids,) = served.tokenizer.encode_continuations([text])
        made.append((name, ids, served.answer(ids, name)))
    assert len(made) == 32
    # The gist matters: without it, or with another, the answers differ.
    assert made[0][2] != served.answer(made[0][1]) != served.answer(made[0][1], "long")
    return made


def run(llm: Any, served: Served, batch: list[Any], max_tokens: int = MAX_TOKENS) -> list[list[int]]:
    from gisting.serving.vllm import request

    prompts, settings = [], []
    for name, ids, _ in batch:
        if name is None:
            prompts.append({"prompt_token_ids": ids})
        else:
            k = PROMPTS[name][0]
            prompts.append(request(name, token_ids=ids, tokenizer=served.tokenizer, num_gist_tokens=k).prompt)
        settings.append(params(name, max_tokens))
    outputs = llm.generate(prompts, settings, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_mixed_batch_is_transformers_tokens(served: Served, batch: list[Any]) -> None:
    with engine(served) as llm:
        for _ in range(2):  # the second time from vLLM's own prefix cache as well
            found = run(llm, served, batch)
            assert found == [answer for _, _, answer in batch]
        counts = counted(llm)
    assert counts["gist_requests"] == 48
    assert counts["gist_loads"] == 8
    assert counts["gist_hits"] >= 16
    assert counts["gist_refused"] == counts["gist_failed"] == 0
    assert counts["gist_bytes"] == counts["gist_tokens"] * 2 * 3 * 2 * 32 * 4  # keys and values, layers, heads, size


def test_chunked_prefill(served: Served, batch: list[Any]) -> None:
    with engine(served, max_num_batched_tokens=16, max_num_seqs=8, enable_chunked_prefill=True) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens == 16
        assert run(llm, served, batch) == [answer for _, _, answer in batch]


def test_preempted_requests_load_their_gist_again(served: Served, batch: list[Any]) -> None:
    with engine(served, block_size=32, num_gpu_blocks_override=24, max_num_seqs=16) as llm:
        assert run(llm, served, batch) == [answer for _, _, answer in batch]
        counts = counted(llm)
    assert counts["num_preemptions"] > 0
    assert counts["gist_hits"] + counts["gist_loads"] > 24


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes of the CPU; a GPU has its own layout")
def test_two_tensor_parallel_workers(served: Served, batch: list[Any]) -> None:
    with engine(served, tensor_parallel_size=2) as llm:
        assert run(llm, served, batch) == [answer for _, _, answer in batch]
        refused = ask(llm, placed(served, "eight"), "unknown")
        assert refused.finish_reason == "error"
        counts = counted(llm)
    assert counts["gist_loads"] == 2 * 8
    assert counts["gist_bytes"] == counts["gist_tokens"] * 2 * 3 * 1 * 32 * 4  # one head each


# -- one engine, in which the store changes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def changing(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the store, with a gist that does not belong there."""
    folder = tmp_path_factory.mktemp("changing")
    shutil.copytree(served.store, folder / "store")
    other = make(folder / "other", seed=2)
    with GistStore(folder / "store") as store:
        store.put("another model's", GistStore(other.store)["eight"])
    return folder / "store"


@pytest.fixture(scope="module")
def llm(served: Served, changing: Path) -> Iterator[Any]:
    """An engine with small blocks, so that prompts share some, and memory for two of the large gists."""
    with engine(served, store=changing, extra={"max_bytes": 2 * 130 * 2 * 3 * 2 * 32 * 4}, block_size=32) as found:
        yield found


def ask(llm: Any, ids: list[int], name: str | None, **settings: Any) -> Any:
    """Return the first answer to these ids, even if it failed."""
    (output,) = llm.generate([{"prompt_token_ids": ids}], [params(name, **settings)], use_tqdm=False)
    return output.outputs[0]


def rest(served: Served, number: int = 1) -> list[int]:
    return served.tokenizer.encode_continuations([rest_of(number)])[0]


def placed(served: Served, name: str, number: int = 1) -> list[int]:
    return [served.tokenizer.gist_token_id] * PROMPTS[name][0] + rest(served, number)


def test_gists_that_look_the_same_are_never_mixed(served: Served, llm: Any) -> None:
    # Two prompts of k = 130, each with four blocks of placeholders, and the same text after them.
    for name in ("long", "other long", "long"):
        assert list(ask(llm, placed(served, name), name).token_ids) == served.answer(rest(served), name)
    assert counted(llm)["prefix_cache_hits"] > 0
    assert served.answer(rest(served), "long") != served.answer(rest(served), "other long")


def test_a_salt_of_the_user_counts_as_well(served: Served, llm: Any) -> None:
    prompts = [{"prompt_token_ids": placed(served, name), "cache_salt": "mine"} for name in ("long", "other long")]
    outputs = llm.generate(prompts, [params("long"), params("other long")], use_tqdm=False)
    for output, name in zip(outputs, ("long", "other long"), strict=True):
        assert list(output.outputs[0].token_ids) == served.answer(rest(served), name)


@pytest.mark.parametrize(
    ("name", "ids", "settings", "message"),
    [
        ("unknown", "eight", {}, "is not in the store"),
        ("another model's", "eight", {}, "was made for llama/"),
        ("three", "eight", {}, "has 8 gist tokens in front, but the gist has 3"),
        ("three", None, {}, "has no placeholders in front for the 3 tokens"),
        (None, "eight", {}, "has gist tokens but names no gist"),
        ("eight", "eight", {"prompt_logprobs": 1}, "prompt_logprobs"),
        ("../eight", "eight", {}, "name must be"),
        (7, "eight", {}, "must be the name of a gist"),
    ],
    ids=["unknown", "another model", "k", "no placeholders", "no gist", "scored", "no name", "no text"],
)
def test_what_does_not_fit_fails_alone(
    served: Served,
    llm: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    name: Any,
    ids: str | None,
    settings: dict[str, Any],
    message: str,
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    before = counted(llm)["gist_refused"]
    bad = rest(served) if ids is None else placed(served, ids)
    prompts = [
        {"prompt_token_ids": placed(served, "eight", 2)},
        {"prompt_token_ids": bad},
        {"prompt_token_ids": rest(served, 3)},
    ]
    outputs = llm.generate(prompts, [params("eight"), params(name, **settings), params()], use_tqdm=False)
    assert outputs[1].outputs[0].finish_reason == "error"
    assert list(outputs[1].outputs[0].token_ids) == []
    assert list(outputs[0].outputs[0].token_ids) == served.answer(rest(served, 2), "eight")
    assert list(outputs[2].outputs[0].token_ids) == served.answer(rest(served, 3))
    assert message in caplog.text
    assert counted(llm)["gist_refused"] == before + 1


def test_gist_tokens_are_never_sampled(served: Served, llm: Any) -> None:
    from vllm import SamplingParams

    wanted = served.tokenizer.gist_token_id
    for temperature in (0, 1.0):
        settings = SamplingParams(temperature=temperature, max_tokens=8, ignore_eos=True, logit_bias={wanted: 100.0})
        (output,) = llm.generate([{"prompt_token_ids": rest(served)}], [settings], use_tqdm=False)
        assert wanted not in output.outputs[0].token_ids


def test_several_answers_of_one_request(served: Served, llm: Any) -> None:
    near_greedy = params("long", n=3, temperature=0.01)  # n asks for sampling
    (output,) = llm.generate([{"prompt_token_ids": placed(served, "long")}], [near_greedy], use_tqdm=False)
    assert [list(found.token_ids) for found in output.outputs] == [served.answer(rest(served), "long")] * 3


def test_memory_of_gists_is_bounded(served: Served, llm: Any) -> None:
    names = [name for name, (k, _) in PROMPTS.items() if k == 130]
    with (
        GistStore(served.store) as kept,
        GistStore(llm.llm_engine.vllm_config.kv_transfer_config.kv_connector_extra_config["store"]) as store,
    ):
        # A third gist of that size, with other states, so that not all three fit.
        cache = kept["long"]
        store.put("third long", GistCache(cache.values, cache.keys, cache.lengths, cache.origin))
    before = counted(llm)
    for name in [*names, "third long"] * 2:
        ask(llm, [served.tokenizer.gist_token_id] * 130 + rest(served, 4), name, max_tokens=1)
        llm.reset_prefix_cache()
    after = counted(llm)
    assert after["gist_loads"] - before["gist_loads"] >= 5


def test_the_store_may_change_while_it_is_served(served: Served, llm: Any, changing: Path) -> None:
    with GistStore(changing) as store:
        store.put("moving", store["eight"])
        assert list(ask(llm, placed(served, "eight"), "moving").token_ids) == served.answer(rest(served), "eight")
        store.put("moving", store["other eight"])
        assert list(ask(llm, placed(served, "eight"), "moving").token_ids) == served.answer(rest(served), "other eight")
        store.remove("moving")
        assert ask(llm, placed(served, "eight"), "moving").finish_reason == "error"
        store.put("moving", store["eight"])
        assert list(ask(llm, placed(served, "eight"), "moving").token_ids) == served.answer(rest(served), "eight")


def test_a_file_that_is_gone_fails_its_request_alone(served: Served, llm: Any, changing: Path) -> None:
    with GistStore(changing) as store:
        cache = store["three"]
        store.put("torn", GistCache(cache.values, cache.keys, cache.lengths, cache.origin))
        (entry,) = [entry for entry in store.list() if entry.name == "torn"]
    (file,) = changing.rglob(f"{entry.key}*")
    file.unlink()
    prompts = [{"prompt_token_ids": placed(served, "three")}, {"prompt_token_ids": placed(served, "three")}]
    outputs = llm.generate(prompts, [params("torn"), params("three")], use_tqdm=False)
    assert outputs[0].outputs[0].finish_reason == "error"
    assert list(outputs[1].outputs[0].token_ids) == served.answer(rest(served), "three")
    assert counted(llm)["gist_failed"] >= 1


def test_cancelled_requests_leave_nothing_behind(served: Served, llm: Any) -> None:
    scheduler = scheduler_of(llm)
    llm.enqueue([{"prompt_token_ids": placed(served, "eight")}], [params("eight")])
    assert scheduler.entries
    llm.llm_engine.abort_request([*scheduler.entries], internal=True)
    llm.wait_for_completion()
    assert not scheduler.entries
    assert not scheduler._pending


def test_running_requests_that_are_cancelled_leave_nothing_behind(served: Served, llm: Any) -> None:
    scheduler = scheduler_of(llm)
    llm.enqueue([{"prompt_token_ids": placed(served, "long", number)} for number in (1, 2)], [params("long")] * 2)
    first, _ = scheduler.entries
    for _ in range(6):
        llm.llm_engine.step()
    assert scheduler._given[first].request.num_output_tokens > 0
    llm.llm_engine.abort_request([first], internal=True)
    assert [*scheduler.entries] == [*scheduler._given] != [first]
    (other,) = llm.wait_for_completion()
    assert list(other.outputs[0].token_ids) == served.answer(rest(served, 2), "long")
    assert not scheduler.entries
    assert not scheduler._given
    assert list(ask(llm, placed(served, "long"), "long").token_ids) == served.answer(rest(served), "long")


@pytest.mark.parametrize("num_requests", [1, 2])
def test_pages_that_were_never_written_are_never_read(
    served: Served, llm: Any, changing: Path, monkeypatch: pytest.MonkeyPatch, num_requests: int
) -> None:
    # vLLM adds pages to its prefix cache before they are written, and an abort may come before it learns that they were
    # not. The second of two requests finds the first one's pages there, and writes its own after them.
    with GistStore(changing) as store:
        cache = store["long"]
        factor = -1.0 - num_requests
        store.put(
            "torn long",
            GistCache(tuple(factor * keys for keys in cache.keys), cache.values, cache.lengths, cache.origin),
        )
        (entry,) = [entry for entry in store.list() if entry.name == "torn long"]
    (file,) = changing.rglob(f"{entry.key}*")
    hidden = file.rename(file.with_suffix(".hidden"))
    core = llm.llm_engine.engine_core.engine_core
    aborts = core._process_aborts_queue
    failed = counted(llm)["gist_failed"]

    def abort_all() -> None:
        llm.llm_engine.abort_request([*scheduler_of(llm).entries], internal=True)
        aborts()

    ids = placed(served, "long", 4)
    given = [ids, ids + rest(served, 4) * 2][:num_requests]
    with monkeypatch.context() as patched:
        patched.setattr(core, "_process_aborts_queue", abort_all)
        llm.enqueue([{"prompt_token_ids": ids} for ids in given], [params("torn long")] * num_requests)
        llm.wait_for_completion()
        for _ in range(2):
            core.step_fn()
    hidden.rename(file)
    found = [list(ask(llm, ids, "torn long").token_ids) for ids in given * 2]
    llm.reset_prefix_cache()
    wanted = [list(ask(llm, ids, "torn long").token_ids) for ids in given]
    assert found == wanted * 2
    assert counted(llm)["gist_failed"] > failed
    assert wanted[0] != served.answer(rest(served, 4), "long")


@pytest.mark.parametrize("value", ["x", ["a"], 5])
def test_parameters_of_another_type_fail_alone(served: Served, llm: Any, value: Any) -> None:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    # A request's vllm_xargs may hold this. vLLM 0.32 fails on it before the engine, so it is put in after that.
    settings = SamplingParams(temperature=0, max_tokens=4, extra_args={"kv_transfer_params": value})
    core = llm.llm_engine.engine_core.engine_core
    odd = Request("odd", rest(served), settings, None)
    core.scheduler.add_request(odd)
    assert "must be an object" in scheduler_of(llm).refused["odd"]
    assert list(ask(llm, placed(served, "eight"), "eight").token_ids) == served.answer(rest(served), "eight")
    assert odd.get_finished_reason().name == "ERROR"
    assert "odd" not in scheduler_of(llm).refused


def test_an_unexpected_error_fails_alone(served: Served, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gisting.serving.gists import StoredGists

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("of memory")

    llm.reset_prefix_cache()
    for method in ("find", "load"):
        with monkeypatch.context() as patched:
            patched.setattr(StoredGists, method, fail)
            patched.setattr(worker(), "prepared", BoundedLRU(0))
            prompts = [{"prompt_token_ids": placed(served, "three")}, {"prompt_token_ids": rest(served)}]
            outputs = llm.generate(prompts, [params("three"), params()], use_tqdm=False)
        assert outputs[0].outputs[0].finish_reason == "error"
        assert list(outputs[1].outputs[0].token_ids) == served.answer(rest(served))
    assert list(ask(llm, placed(served, "three"), "three").token_ids) == served.answer(rest(served), "three")


def worker() -> Any:
    """The worker side of the connector, in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker


def scheduler_of(llm: Any) -> Any:
    """The scheduler side of the connector, in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler.get_kv_connector().scheduler


def test_logits_of_other_models_are_left_alone() -> None:
    from types import SimpleNamespace

    from gisting.serving.vllm import NoGistTokens

    def config(gist: Any, extra: Any = None) -> Any:
        return SimpleNamespace(
            model_config=SimpleNamespace(hf_config=SimpleNamespace(gist=gist)),
            kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra),
        )

    logits = torch.zeros(2, 5)
    other = NoGistTokens(config(None), torch.device("cpu"), False)
    assert other.is_argmax_invariant()
    assert other.apply(logits).eq(0).all()
    ours = NoGistTokens(config({"gist_token_id": 3}), object())
    assert not ours.is_argmax_invariant()
    assert ours.apply(logits, object()).isneginf().sum(0).tolist() == [0, 0, 0, 2, 0]
    base = NoGistTokens(config(None, {"store": "s", "gist_token_id": 1}), object())
    assert base.apply(torch.zeros(2, 5)).isneginf().sum(0).tolist() == [0, 2, 0, 0, 0], "a base model of adapters"
