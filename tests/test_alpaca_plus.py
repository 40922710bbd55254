"""Alpaca+ rebuilt: the published rules on small sources that can be checked by eye, and on random ones."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gisting.data.alpaca_plus import SIZES, alpaca_plus, read_source, save_splits
from gisting.data.records import Record, load_records
from gisting.errors import RecordError


def item(instruction: str, input: str = "", output: str = "o") -> dict[str, str]:
    return {"instruction": instruction, "input": input, "output": output}


def shown(records: list[Record]) -> list[str]:
    return [f"{record.instruction}({record.input}) {record.source}" for record in records]


ALPACA = [
    item("sum", "4"),  # its instruction is in the training data: train
    item("tell"),  # no input: train
    item("odd", "a b"),  # unseen
    item("odd", "c d"),  # unseen as well: an instruction may occur twice
    item("tell", "x"),  # its instruction just became training data: train
    item("even", "e"),  # the split is full: train
    item("even", "e"),  # Alpaca keeps its duplicates
]
SELF_INSTRUCT = [
    item("sum", "1"),  # the first of several with an input: seen
    item("write"),  # several, but the first has no input: train, both
    item("sum", "2"),
    item("alone", "z"),  # the only example: train
    item("write", "w"),
    item("sum", "1"),  # already in validation_seen: dropped
    item("sum", "2"),  # a duplicate: dropped
    item("late", "1"),  # seen, the second one
    item("late", "2"),
    item("more", "1"),  # the split is full: train
    item("more", "2"),
]
HUMAN = [{"instruction": "judge", "instances": [{"input": "p", "output": "q"}, {"input": "", "output": "r"}]}]


def test_the_rules() -> None:
    splits = alpaca_plus(ALPACA, SELF_INSTRUCT, HUMAN, num_validation=2)
    assert list(splits) == list(SIZES)
    assert shown(splits["validation_seen"]) == ["sum(1) self_instruct", "late(1) self_instruct"]
    assert shown(splits["validation_unseen"]) == ["odd(a b) alpaca", "odd(c d) alpaca"]
    assert shown(splits["train"]) == [
        "sum(2) self_instruct",  # in the order of instructions, not of lines
        "write() self_instruct",
        "write(w) self_instruct",
        "alone(z) self_instruct",
        "late(2) self_instruct",
        "more(1) self_instruct",
        "more(2) self_instruct",
        "sum(4) alpaca",
        "tell() alpaca",
        "tell(x) alpaca",
        "even(e) alpaca",
        "even(e) alpaca",
    ]
    assert shown(splits["validation_human"]) == ["judge(p) self_instruct", "judge() self_instruct"]


def test_an_unseen_instruction_that_would_be_trained_on() -> None:
    with pytest.raises(RecordError, match=r"^alpaca record 3 repeats the instruction 'odd' of validation_unseen"):
        alpaca_plus([item("odd", "a"), item("even", "b"), item("odd", "c")], [], [], num_validation=2)


_items = st.lists(
    st.builds(item, st.sampled_from("abcdef"), st.sampled_from(["", "1", "2", "3"]), st.sampled_from("xy")), max_size=40
)


@given(alpaca=_items, self_instruct=_items, size=st.integers(0, 4))
def test_the_splits_share_nothing(alpaca: list[dict[str, str]], self_instruct: list[dict[str, str]], size: int) -> None:
    try:
        splits = alpaca_plus(alpaca, self_instruct, [], num_validation=size)
    except RecordError:
        return  # the test above covers this
    train, seen, unseen = splits["train"], splits["validation_seen"], splits["validation_unseen"]
    pairs = {(record.instruction, record.input) for record in train if record.source == "self_instruct"}
    assert not pairs & {(record.instruction, record.input) for record in seen}
    assert not {record.instruction for record in unseen} & {record.instruction for record in train}
    assert max(len(seen), len(unseen)) <= size
    assert all(record.input for record in seen + unseen)
    # Only duplicates in Self-Instruct are dropped.
    assert len(train) + len(seen) + len(unseen) == len(alpaca) + len(
        {(point["instruction"], point["input"]) for point in self_instruct}
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([{"instruction": "a"}], [], []), r"alpaca record 1 has no 'output'"),
        (([], [item("a"), 3], []), r"self_instruct record 2 must be an object"),
        (
            ([], [], [{"instruction": "a"}]),
            r"human task 1 must be an object with 'instruction' and a list of 'instances'",
        ),
        (([], [], [{"instruction": "a", "instances": [{"input": "b"}]}]), r"human task 1 has no 'output'"),
        (([], [], [{"instances": [{"input": "b", "output": "c"}]}]), r"human task 1: 'instruction' must be a string"),
    ],
)
def test_bad_sources_are_named(arguments: tuple[list, list, list], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        alpaca_plus(*arguments)


def test_the_published_unseen_split_passes_unchanged(shared: Path) -> None:
    held_out = read_source(shared / "data" / "alpaca_plus_validation_unseen.json")
    assert [vars(record) for record in alpaca_plus(held_out, [], [])["validation_unseen"]] == held_out


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "list.json").write_text(json.dumps(ALPACA), encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text(
        "\n".join(json.dumps(point) for point in SELF_INSTRUCT) + "\n", encoding="utf-8"
    )

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_sources_from_files_and_addresses(tmp_path: Path, address: str) -> None:
    for where in (tmp_path, address):
        assert read_source(f"{where}/list.json") == ALPACA
        assert read_source(f"{where}/lines.jsonl") == SELF_INSTRUCT
    with pytest.raises(RecordError, match=r"none\.json cannot be fetched \(.*404.*\); download it and pass its path"):
        read_source(f"{address}/none.json")
    with pytest.raises(FileNotFoundError):
        read_source(tmp_path / "none.json")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a"\n', encoding="utf-8")
    with pytest.raises(RecordError, match=r"bad\.jsonl, line 2 is not JSON"):
        read_source(tmp_path / "bad.jsonl")


def test_saved_splits_are_records(tmp_path: Path) -> None:
    splits = alpaca_plus(ALPACA, SELF_INSTRUCT, HUMAN, num_validation=2)
    paths = save_splits(splits, tmp_path / "data")
    assert {path.name for path in paths.values()} == {f"alpaca_plus_{name}.json" for name in SIZES}
    assert {name: load_records(path) for name, path in paths.items()} == splits
