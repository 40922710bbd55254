"""A store compared with a dictionary: put, rename, remove, collect and open again in any order."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gisting.cache import GistCache
from gisting.errors import StoreError
from gisting.store import GistStore
from tests.store.made import is_same, made

NAMES = st.sampled_from(["a", "b", "c", "d", "é"])
SEEDS = st.integers(0, 3)


class AgainstDictionary(RuleBasedStateMachine):
    """``held`` has the seed of each name; two stores of one directory take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.held: dict[str, int] = {}

    @initialize(max_open_bytes=st.sampled_from([0, 20_000, 2**28]))
    def open(self, max_open_bytes: int) -> None:
        self.max_open_bytes = max_open_bytes
        self.stores = [GistStore(self.folder / "store", max_open_bytes=max_open_bytes) for _ in range(2)]

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def take_turns(self) -> GistStore:
        self.stores.reverse()
        return self.stores[0]

    @rule(name=NAMES, seed=SEEDS)
    def put(self, name: str, seed: int) -> None:
        self.take_turns().put(name, made(seed))
        self.held[name] = seed

    @rule(wanted=st.dictionaries(NAMES, SEEDS))
    def put_many(self, wanted: dict[str, int]) -> None:
        self.take_turns().put_many({name: made(seed) for name, seed in wanted.items()})
        self.held |= wanted

    @rule(names=st.sets(NAMES, min_size=1))
    def remove(self, names: set[str]) -> None:
        try:
            self.take_turns().remove(names)
        except StoreError:
            assert not names <= self.held.keys()
        else:
            for name in names:
                del self.held[name]

    @rule(seed=SEEDS)
    def remove_by_key(self, seed: int) -> None:
        names = [name for name, held in self.held.items() if held == seed]
        if names:
            store = self.take_turns()
            store.remove(next(entry.key for entry in store.list() if entry.name == names[0]))
            self.held = {name: held for name, held in self.held.items() if held != seed}

    @rule(old=NAMES, new=NAMES)
    def rename(self, old: str, new: str) -> None:
        try:
            self.take_turns().rename(old, new)
        except StoreError:
            assert old not in self.held or (new in self.held and new != old)
        else:
            self.held[new] = self.held.pop(old)

    @rule()
    def collect(self) -> None:
        assert self.take_turns().gc() == 0, "removing leaves nothing for gc"

    @rule()
    def open_again(self) -> None:
        self.take_turns().close()
        self.stores[0] = GistStore(self.folder / "store", max_open_bytes=self.max_open_bytes)

    @invariant()
    def both_hold_what_the_dictionary_holds(self) -> None:
        for store in self.stores:
            assert [entry.name for entry in store.list()] == sorted(self.held)
            assert len(store) == len(self.held)
            if self.held:
                wanted = GistCache.cat([made(seed) for seed in self.held.values()])
                assert is_same(store.get([*self.held]), wanted)
            assert len([*store._objects]) == len({*self.held.values()}), "one file for each content"
            assert store._reader.open_caches.num_bytes <= self.max_open_bytes
        assert self.stores[0].verify() == []


AgainstDictionary.TestCase.settings = settings(
    max_examples=12, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestAgainstDictionary = AgainstDictionary.TestCase
