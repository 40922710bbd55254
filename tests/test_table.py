"""``GistTable``: a gathered batch equals the single caches, whatever was added and removed in between."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

import gisting
from gisting.cache import CacheOrigin, GistCache
from gisting.errors import CacheMismatchError, GistError
from gisting.rotary import Rotary
from gisting.table import GistTable
from tests import tiny
from tests.memory import peak_growth_mb, requires_peak
from tests.test_cache import assert_same, made_up, tensors_of

both_kinds = pytest.mark.parametrize("encoder", [False, True], ids=["decoder", "encoder"])
slow = pytest.mark.slow


def each(cache: GistCache) -> list[GistCache]:
    return [cache[row] for row in range(len(cache))]


def table_of(counts: tuple[int, ...] = (2, 5, 1), **settings: Any) -> GistTable:
    return GistTable(made_up(counts, **settings), ["a", "b", "c", "d", "e", "f"][: len(counts)])


# -- gathering ---------------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize(
    ("rows", "numbers"),
    [
        ([0, 1, 2], [0, 1, 2]),
        ([2, 0, 2], [2, 0, 2]),
        (["c"], [2]),
        (["b", "a", "b"], [1, 0, 1]),
        (torch.tensor([2, 0]), [2, 0]),
        (torch.tensor([2, 0], dtype=torch.int32), [2, 0]),
        ((0, 2), [0, 2]),
        (range(1, 3), [1, 2]),
        (np.array([2, 0]), [2, 0]),
        (np.array(["c", "a"]), [2, 0]),
    ],
    ids=str,
)
def test_gather_is_select(rows: Any, numbers: list[int], encoder: bool) -> None:
    assert_same(table_of(encoder=encoder).gather(rows), made_up(encoder=encoder).select(numbers))


def test_names_and_rows_may_be_any_iterable_with_an_order() -> None:
    table = GistTable(made_up(), (name for name in "abc"))
    assert_same(table.gather(name for name in "ca"), made_up().select([2, 0]))
    assert_same(table.gather(number for number in (2, 0)), made_up().select([2, 0]))
    assert table.rows_of(name for name in "ca").tolist() == [2, 0]
    assert table.rows_of(np.array(["c", "a"])).tolist() == [2, 0]
    table.remove(name for name in "b")
    table.add(made_up((1,)), (name for name in "d"))
    assert table.names == ["a", "c", "d"]


def test_what_it_says_about_itself() -> None:
    table = table_of()
    assert len(table) == 3
    assert table.names == ["a", "b", "c"]
    assert "b" in table
    assert "z" not in table
    assert table.num_bytes == made_up().num_bytes
    assert table.origin == made_up().origin
    assert table.dtype == torch.float32
    assert table.device == torch.device("cpu")
    assert repr(table) == (
        "GistTable(3 prompts ('a', 'b', 'c'), 3 layers, 3600 bytes, torch.float32, cpu, made for llama/0123456789ab)"
    )
    assert GistTable(made_up()).names == ["0", "1", "2"]
    assert table.rows_of(["c", "a"]).tolist() == [2, 0]


@both_kinds
def test_several_caches(encoder: bool) -> None:
    caches = [made_up(counts, encoder=encoder, seed=seed) for seed, counts in enumerate([(2, 5), (1,), (7, 0, 3)])]
    whole = GistCache.cat(caches)
    table = GistTable(caches)
    assert table.names == list("012345")
    assert_same(table.gather(range(6)), whole)
    table = GistTable(caches, list("abcdef"), dtype=torch.float64)
    assert_same(table.gather("a f".split()), whole.to(dtype=torch.float64).select([0, 5]))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (made_up((1,), dtype=torch.float16), "^caches are torch.float32 on cpu and torch.float16"),
        (made_up((1,), encoder=True), "^caches differ in layers, heads or sizes"),
        (dataclasses.replace(made_up((1,)), origin=CacheOrigin("a", "b", "c", "d")), "^caches belong to different ori"),
    ],
    ids=["dtype", "encoder", "origin"],
)
def test_several_caches_that_do_not_belong_together(second: GistCache, message: str) -> None:
    with pytest.raises(CacheMismatchError, match=message):
        GistTable([made_up((1,)), second], dtype=torch.bfloat16)
    with pytest.raises(GistError, match=r"^caches is empty; give at least one$"):
        GistTable([])


@requires_peak
def test_building_takes_the_memory_of_the_table_and_of_one_layer() -> None:
    """80 prompts of two lengths that were compressed one by one: 40 MB in ten tensors of 4 MB."""

    def of(k: int) -> GistCache:
        layers = tuple(torch.randn(1, 4, k, 256) for _ in range(5))
        return GistCache(layers, tuple(layer + 1 for layer in layers), torch.tensor([k]), made_up().origin)

    caches = [of(12 + row % 2) for row in range(80)]
    with peak_growth_mb() as grown:
        table = GistTable(caches)
    assert 38 <= table.num_bytes / 2**20 <= 42
    assert 38 <= grown() < 76, "the table, a layer, and what the allocator keeps; less than two copies"


def test_dtype_and_device() -> None:
    table = GistTable(made_up(), dtype=torch.bfloat16)
    assert table.dtype == torch.bfloat16
    assert_same(table.gather([1, 0]), made_up().to(dtype=torch.bfloat16).select([1, 0]))
    assert GistTable(made_up(), device="meta").device == torch.device("meta")


def test_rotary_travels_along() -> None:
    rotary = Rotary(((1.0, 0.5),), (0, 0, None))
    rotated = dataclasses.replace(made_up(), rotary=rotary)
    assert GistTable(rotated).gather([0]).rotary == rotary
    table = table_of()
    assert table.gather([0]).rotary is None
    table.add(rotated, ["x", "y", "z"])
    assert table.gather([0]).rotary == table.rotary == rotary
    with pytest.raises(CacheMismatchError, match=r"^caches are of one model, but their keys are rotated differently"):
        table.add(dataclasses.replace(made_up(), rotary=Rotary((), (None, None, None))), ["1", "2", "3"])


def test_what_is_known_about_a_prompt_travels_along() -> None:
    known = dataclasses.replace(made_up(), about=({"a": 1}, None, {"b": 2}))
    table = GistTable([known, made_up()])
    assert table.gather([2, 0, 1, 5]).about == ({"b": 2}, {"a": 1}, None, None)
    table.remove(["0"])
    table.add(made_up()[0], ["new"])
    assert table.gather(["new", "2"]).about == (None, {"b": 2})


def test_no_slots_at_all() -> None:
    """The negative control has no slots."""
    assert_same(GistTable(made_up((0, 0))).gather([1, 1, 0]), made_up((0, 0, 0)))


def test_a_gathered_batch_and_the_table_share_nothing() -> None:
    cache = made_up()
    table = GistTable(cache)
    for _ in range(2):
        found = table.gather([0, 1, 2])
        assert_same(found, made_up())
        for tensor in tensors_of(found):
            tensor.fill_(7)
    for tensor in tensors_of(cache):
        tensor.fill_(8)
    assert_same(table.gather([0, 1, 2]), made_up())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "^rows is empty; name at least one prompt$"),
        (torch.zeros(0, dtype=torch.int64), "^rows is empty; name at least one prompt$"),
        ([0, 3], "^rows must be numbers of prompts in the table; 3 was removed or never added; get"),
        ([-1], "^rows must be numbers of prompts in the table; -1 was removed or never added"),
        ([0, 1], "^rows must be numbers of prompts in the table; 1 was removed or never added"),
        ([2**40], "^rows must be numbers of prompts in the table; 1099511627776 was removed or never added"),
        ([1 << 32], "^rows must be numbers of prompts in the table; 4294967296 was removed or never added"),
        ([2**70], "^rows must be row numbers or names, one for each prompt "),
        ({"a"}, "^rows must be a list or another ordered collection, got set$"),
        ({"a": 0}, "^rows must be a list or another ordered collection, got dict$"),
        (0, "^rows must be a list or another ordered collection, got int$"),
        (None, "^rows must be a list or another ordered collection, got NoneType$"),
        (b"a", "^rows must be a list, got one text; put it in a list$"),
        (np.array(0), "^rows must be a list, got one value; put it in a list$"),
        ([None], "^rows must be row numbers or names, one for each prompt "),
        (
            np.array([0.0]),
            r"^rows must be row numbers or names, one for each prompt, got torch.float32 of shape \(1,\)$",
        ),
        (["a", "b"], r"^'b' is not in the table of 2 prompts; add it: table.add\(cache, names\)$"),
        ("a", "^rows must be a list, got one text; put it in a list$"),
        ([0, "a"], "^rows must be either all row numbers or all names"),
        (["a", 0], "^rows must be either all row numbers or all names"),
        ([0.0], r"^rows must be row numbers or names, one for each prompt, got torch.float32 of shape \(1,\)$"),
        ([True], r"^rows must be row numbers or names, one for each prompt, got torch.bool of shape \(1,\)$"),
        (torch.tensor(0), r"^rows must be row numbers or names, one for each prompt, got torch.int64 of shape \(\)$"),
        ([[0]], r"^rows must be row numbers or names, one for each prompt, got torch.int64 of shape \(1, 1\)$"),
    ],
    ids=str,
)
def test_gather_refuses(rows: Any, message: str) -> None:
    table = table_of()
    table.remove(["b"])
    with pytest.raises(GistError, match=message):
        table.gather(rows)


# -- changing it -------------------------------------------------------------------------------------------------------


@both_kinds
def test_add_and_remove(encoder: bool) -> None:
    table = table_of(encoder=encoder)
    single = {name: made_up(encoder=encoder)[row] for row, name in enumerate("abc")}
    table.remove(["b"])
    assert table.names == ["a", "c"]
    more = made_up((7, 3), encoder=encoder, seed=1)
    assert table.add(more, ["d", "e"]).tolist() == [(1 << 32) + 1, 3], "the free row, then a new one"
    single |= {"d": more[0], "e": more[1]}
    assert table.names == ["a", "c", "e", "d"]
    for names in (["e", "d", "c", "a"], ["c"], ["a", "c", "a"]):
        assert_same(table.gather(names), GistCache.cat([single[name] for name in names]))


def test_a_used_row_holds_nothing_of_the_prompt_before() -> None:
    table = table_of((5, 2))
    table.remove(["a"])
    assert table.add(made_up((1,), seed=1), ["c"]).tolist() == [1 << 32]
    assert_same(table.gather(["c", "b"]), GistCache.cat([made_up((1,), seed=1), made_up((5, 2))[1]]))


def test_a_row_that_was_kept_never_means_another_prompt() -> None:
    """``rows_of``, a change by another thread, ``gather``: refused, instead of returning another prompt's gist."""
    table = table_of()
    kept = table.rows_of(["b", "a"])
    for seed in range(1, 4):
        table.remove(["b"])
        with pytest.raises(GistError, match=r"^rows must be numbers of prompts in the table; .* was removed"):
            table.gather(kept)
        table.add(made_up((4,), seed=seed), ["b"])
        with pytest.raises(GistError, match=r"^rows must be numbers of prompts in the table; .* was removed"):
            table.gather(kept)
        kept = table.rows_of(["b", "a"])
        assert_same(table.gather(kept)[0], made_up((4,), seed=seed)[0])
        table.add(made_up((6,) * seed), [f"{seed}/{number}" for number in range(seed)])
        assert_same(table.gather(kept)[0], made_up((4,), seed=seed)[0])  # it has grown, and the number has not changed


def test_room_is_doubled() -> None:
    table = table_of((1,))
    one = table.num_bytes
    sizes = []
    for number in range(1, 9):
        table.add(made_up((1,), seed=number), [str(number)])
        sizes.append(table.num_bytes // one)
    assert sizes == [2, 4, 4, 8, 8, 8, 8, 16]
    table.remove([str(number) for number in range(1, 9)])
    table.add(made_up((1,) * 15), [str(number) for number in range(15)])
    assert table.num_bytes // one == 16, "rows are reused"


def test_everything_can_be_removed() -> None:
    table = table_of()
    table.remove(["a", "b", "c"])
    assert len(table) == 0
    with pytest.raises(GistError, match=r"^rows must be numbers of prompts in the table; 0 was removed or never added"):
        table.gather([0])
    table.add(made_up(seed=2), ["a", "b", "c"])
    assert_same(table.gather(["a", "b", "c"]), made_up(seed=2))


@pytest.mark.parametrize(
    ("cache", "names", "error", "message"),
    [
        (made_up((1,)), ["b"], GistError, "^'b' is already in the table; remove it first, or choose another name$"),
        (made_up((1, 1)), ["x"], GistError, "^names must be one for each of the 2 prompts, got 1$"),
        (made_up((1, 1)), ["x", "x"], GistError, "^names has 'x' twice; give each prompt a different name$"),
        (made_up((1,)), "x", GistError, "^names must be a list, got one text; put it in a list$"),
        (made_up((1,)), [1], GistError, "^names must be texts, got 1$"),
        (
            made_up((1,), origin=CacheOrigin("llama/ffffffffffff", "ba9876543210", "plain", "gist")),
            ["x"],
            CacheMismatchError,
            "^caches belong to different origins, .*llama/0123.* and .*llama/ffff",
        ),
        (made_up((1,), dtype=torch.float16), ["x"], CacheMismatchError, "^caches are torch.float32 on cpu and torch.f"),
        (made_up((1,), encoder=True), ["x"], CacheMismatchError, "^caches differ in layers, heads or sizes from the"),
        (
            GistCache(made_up((1,)).keys[:2], made_up((1,)).values[:2], torch.tensor([1]), made_up().origin),
            ["x"],
            CacheMismatchError,
            "^caches differ in layers, heads or sizes from the table, which was made for llama/0123456789ab; compr",
        ),
    ],
    ids=["taken", "too-few", "twice", "text", "number", "origin", "dtype", "encoder", "layers"],
)
def test_add_refuses(cache: GistCache, names: Any, error: type[GistError], message: str) -> None:
    table = table_of()
    with pytest.raises(error, match=message):
        table.add(cache, names)
    assert table.names == ["a", "b", "c"]
    assert_same(table.gather(["a", "b", "c"]), made_up())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "x"], "^'x' is not in the table of 3 prompts"),
        (["a", "a"], "^names has 'a' twice"),
        ([], r"^names must be a list of at least one text, got \[\]$"),
        ("a", "^names must be a list, got one text; put it in a list$"),
    ],
    ids=str,
)
def test_remove_refuses(names: Any, message: str) -> None:
    table = table_of()
    with pytest.raises(GistError, match=message):
        table.remove(names)
    assert table.names == ["a", "b", "c"]


def test_memory_that_runs_out_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of()

    def fail(*_: Any) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(Tensor, "narrow", fail)
    with pytest.raises(MemoryError):
        table.add(made_up((9, 9)), ["x", "y"])
    monkeypatch.undo()
    assert_same(table.gather(table.names), made_up())
    table.add(made_up((9, 9)), ["x", "y"])
    assert_same(table.gather(["y", "x"]), made_up((9, 9)).select([1, 0]))


def test_inference_mode_does_not_stick() -> None:
    """A table made in inference mode can be changed outside it, and the other way round."""
    with torch.inference_mode():
        table = table_of()
    for seed in range(1, 5):
        table.remove(["a"])
        with torch.inference_mode(seed % 2 == 0):
            table.add(made_up((3,), seed=seed), ["a"])
            assert_same(table.gather(["a"]), made_up((3,), seed=seed))


class Machine(RuleBasedStateMachine):
    """Adding, removing and gathering in any order, compared with a dictionary of caches."""

    caches: dict[str, GistCache]
    table: GistTable

    @initialize(counts=st.lists(st.integers(0, 4), min_size=1, max_size=3), encoder=st.booleans())
    def start(self, counts: list[int], encoder: bool) -> None:
        self.encoder, self.count = encoder, 0
        cache = made_up(tuple(counts), encoder=encoder)
        self.table = GistTable(cache)
        self.caches = {str(row): one for row, one in enumerate(each(cache))}

    @rule(counts=st.lists(st.integers(0, 6), min_size=1, max_size=4))
    def add(self, counts: list[int]) -> None:
        self.count += 1
        cache = made_up(tuple(counts), encoder=self.encoder, seed=self.count)
        names = [f"{self.count}/{row}" for row in range(len(counts))]
        rows = self.table.add(cache, names)
        assert rows.tolist() == self.table.rows_of(names).tolist()
        self.caches |= dict(zip(names, each(cache), strict=True))

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.caches)), min_size=1, unique=True))
        self.table.remove(names)
        for name in names:
            del self.caches[name]

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def gather(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.caches)), min_size=1, max_size=5))
        wanted = GistCache.cat([self.caches[name] for name in names])
        assert_same(self.table.gather(names), wanted)
        assert_same(self.table.gather(self.table.rows_of(names)), wanted)

    @invariant()
    def names_fit(self) -> None:
        if hasattr(self, "table"):
            assert sorted(self.table.names) == sorted(self.caches)
            assert len(self.table) == len(self.caches)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)


@pytest.mark.slow
def test_machine_at_length() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=60, stateful_step_count=25, deadline=None))


def test_a_change_waits_for_a_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of ``a`` is reused for another prompt while the gather is between two layers."""
    table = table_of()
    original = Tensor.index_select

    def change() -> None:
        table.remove(["a"])
        table.add(made_up((2,), seed=1), ["x"])

    changing = threading.Thread(target=change)

    def interrupted(tensor: Tensor, *args: Any) -> Tensor:
        found = original(tensor, *args)
        if not changing.ident:
            changing.start()
            changing.join(timeout=0.3)
        return found

    monkeypatch.setattr(Tensor, "index_select", interrupted)
    assert_same(table.gather(["a"]), made_up()[0])
    changing.join()
    assert_same(table.gather(table.rows_of(["x"])), made_up((2,), seed=1))


@pytest.fixture
def _eager_threads() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_eager_threads")
def test_many_threads() -> None:
    """Prompts are added and removed and make the table grow. While a name moves, a gather returns one prompt or the
    other, never a mixture.
    """
    stays, first, second = made_up((4, 4)), made_up((3,), seed=1), made_up((5,), seed=2)
    table = GistTable(stays, ["stays", "too"])
    table.add(first, ["changes"])
    faults: list[BaseException] = []
    is_over = threading.Event()

    def come_and_go(thread: int) -> None:
        for number in range(60):
            name, cache = f"{thread}/{number}", made_up((number % 5,), seed=number)
            table.add(cache, [name])
            assert_same(table.gather([name]), cache)
            if number % 3:
                table.remove([name])

    def change_hands() -> None:
        for number in range(200):
            table.remove(["changes"])
            table.add(second if number % 2 else first, ["changes"])

    def read() -> None:
        while not is_over.is_set():
            assert_same(table.gather(["too", "stays"]), stays.select([1, 0]))
            try:
                found = table.gather(["changes"])
            except GistError:
                continue
            assert_same(found, first if found.num_slots == 3 else second)

    def guarded(work: Callable[..., None], *args: Any) -> threading.Thread:
        def run() -> None:
            try:
                work(*args)
            except BaseException as error:  # noqa: BLE001 (an error in a thread fails the test)
                faults.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    readers = [guarded(read) for _ in range(2)]
    for thread in [*(guarded(come_and_go, number) for number in range(2)), guarded(change_hands)]:
        thread.join()
    is_over.set()
    for thread in readers:
        thread.join()
    assert not faults, faults[0]
    assert len(table) == 3 + 2 * 20


# -- in generation -----------------------------------------------------------------------------------------------------


BEAMS, SAMPLE = {"num_beams": 2}, {"do_sample": True}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *(pytest.param("llama", more, id=f"llama-{[*more]}") for more in ({}, BEAMS, SAMPLE)),
        pytest.param("gemma3_text", {}, id="gemma3_text-[]"),
        pytest.param("t5", BEAMS, id="t5-beams"),
        *(pytest.param("gemma3_text", more, id=f"gemma3_text-{[*more]}", marks=slow) for more in (BEAMS, SAMPLE)),
        *(pytest.param("t5", more, id=f"t5-{[*more]}", marks=slow) for more in ({}, SAMPLE)),
    ],
)
def test_generate_from_a_table(name: str, more: dict[str, Any]) -> None:
    """A batch of different prompts and k answers like each prompt alone, and the table's bytes stay unchanged."""
    model, tokenizer = tiny.patched(name)
    counts = [3, 1, 4, 2]
    prompts = [tiny.words(length, length) for length in (9, 4, 12, 7)]
    caches = [gisting.compress(model, tokenizer, [prompt], k) for prompt, k in zip(prompts, counts, strict=True)]
    table = GistTable(caches[0], ["0"])
    for number, cache in enumerate(caches[1:], start=1):
        table.add(cache, [str(number)])
    before = [tensor.clone() for tensor in table._states]
    rows = [2, 0, 3, 2, 1]
    inputs = ["w1 w2", "w3", "w4 w5 w6", "w7", "w8"]
    for given in (rows, [str(row) for row in rows], torch.tensor(rows)):
        torch.manual_seed(1)
        answers = gisting.generate(model, tokenizer, inputs, cache=table.gather(given), max_new_tokens=6, **more)
        torch.manual_seed(1)
        cache = GistCache.cat([caches[row] for row in rows])
        assert answers == gisting.generate(model, tokenizer, inputs, cache=cache, max_new_tokens=6, **more)
        if not more.get("do_sample"):
            alone = [
                gisting.generate(model, tokenizer, [text], cache=caches[row], max_new_tokens=6, **more)[0]
                for row, text in zip(rows, inputs, strict=True)
            ]
            assert answers == alone
    assert len(table._states) == len(before)
    for tensor, old in zip(table._states, before, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gather_waits_for_the_device_once() -> None:
    table = GistTable(made_up(), device="cuda")
    rows = torch.tensor([2, 0], device="cuda")
    table.gather(rows)
    waits = []
    original = Tensor.cpu

    def counted(tensor: Tensor, *args: Any) -> Tensor:
        waits.append(tensor)
        torch.cuda.set_sync_debug_mode("default")
        try:
            return original(tensor, *args)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "cpu", counted)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = table.gather(rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1
    assert_same(found.to("cpu"), made_up().select([2, 0]))
