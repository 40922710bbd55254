"""Settings are declared once: a field of a table is an option, a key of a file and a keyword argument."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import typer
from typer.testing import CliRunner

from gisting import GistError
from gisting.cli.options import takes_settings
from gisting.settings import (
    COUNT,
    FLAG,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    TEXT,
    TEXTS,
    WHOLE,
    Settings,
    choice,
    keywords_for,
    read_yaml,
    setting,
    takes_keywords_of,
)


@dataclass(frozen=True, kw_only=True)
class Table(Settings):
    """A setting of every kind."""

    old_names: ClassVar[dict[str, str]] = {"widths": "width"}

    source: str | None = setting(TEXT, None, "What to read.", is_argument=True)
    width: int = setting(COUNT, 3, "How wide.", "--width", "-w")
    seed: int = setting(WHOLE, 42, "Seed.")
    rate: float | None = setting(POSITIVE, None, "How fast.", shown_default="as published")
    weight: float = setting(NOT_NEGATIVE, 0.0, "How heavy.")
    names: tuple[str, ...] = setting(TEXTS, (), "What to call it.")
    colour: str = setting(choice("red", lambda: ["green"]), "red", "What colour.")
    folder: str | None = setting(PATH, None, "Where to write.")
    quick: bool | None = setting(FLAG, None, "Whether to hurry.")


@takes_keywords_of(Table)
def build(size: int, **settings: Any) -> Table:
    return Table(**settings)


def from_command(*words: str) -> tuple[Any, str]:
    seen: list[Table] = []
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @takes_settings
    def show(settings: Table, output: Annotated[str, typer.Option(help="Result.")] = "o") -> None:
        """Show the settings."""
        seen.append(settings)

    result = CliRunner().invoke(app, words, catch_exceptions=False)
    return (seen[0] if seen else None), result.output


def from_file(path: Path, text: str) -> Table:
    path.write_text(text, encoding="utf-8")
    return Table.load(path)


# A row for each field: the words of a command, the line of a file, and the value.
WAYS = [
    ("source", ["a.txt"], "source: a.txt", "a.txt"),
    ("width", ["-w", "5"], "width: 5", 5),
    ("seed", ["--seed", "0"], "seed: 0", 0),
    ("rate", ["--rate", "2e-5"], "rate: 2e-5", 2e-5),
    ("weight", ["--weight", "0.5"], "weight: 0.5", 0.5),
    ("names", ["--names", "a", "--names", "b"], "names: [a, b]", ("a", "b")),
    ("colour", ["--colour", "green"], "colour: green", "green"),
    ("folder", ["--folder", "runs/x"], "folder: runs/x", "runs/x"),
    ("quick", ["--no-quick"], "quick: false", False),
]


def test_the_ways_cover_every_field() -> None:
    assert [name for name, *_ in WAYS] == [one.name for one in fields(Table)]


@pytest.mark.parametrize(("name", "words", "line", "value"), WAYS, ids=[name for name, *_ in WAYS])
def test_a_setting_is_an_option_a_key_and_a_keyword(
    tmp_path: Path, name: str, words: list[str], line: str, value: Any
) -> None:
    expected = Table(**{name: value})
    assert getattr(expected, name) == value
    assert from_command(*words)[0] == expected
    assert from_file(tmp_path / "s.yaml", line) == expected
    assert build(1, **{name: value}) == expected
    assert inspect.signature(build).parameters[name].default == getattr(Table(), name)
    assert from_file(tmp_path / "s.yaml", _yaml(expected.written())) == expected
    assert set(expected.written()) == {name}


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(values) if values else "{}"


def test_help_shows_every_setting_with_its_default() -> None:
    _, text = from_command("--help")
    text = " ".join(text.split())
    for one in fields(Table):
        assert one.metadata["setting"].help in text
    for default in (
        "wide. [default: 3]",
        "Seed. [default: 42]",
        "fast. [default: as published]",
        "heavy. [default: 0]",
    ):
        assert default in text
        assert text.count("[default: ") == 6  # that of --output, too
    assert "--quick / --no-quick" in text


def test_options_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("width: 5\nseed: 7\nquick: true\nnames: [a]\nrate: null", encoding="utf-8")
    found, _ = from_command("--recipe", str(path), "--seed", "8", "--no-quick")
    assert found == Table(width=5, seed=8, quick=False, names=("a",))
    assert found.updated(width=None, seed=9) == Table(width=5, seed=9, quick=False, names=("a",))
    assert Table().written(always=["width"]) == {"width": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wdith: 3", r"s.yaml, line 1: there is no setting 'wdith'; did you mean width\?"),
        ("xyzzy: 3", "line 1: there is no setting 'xyzzy'; choose from source, width, "),
        ("true: 3", "line 1: there is no setting True; choose from"),
        ("seed: 1\nseed: 1", "line 2: seed is given twice, first in line 1; remove one"),
        ("seed: 1\nwidth: 0", "line 2: width must be a whole number of at least 1, got 0"),
        ("width: 1.5", "width must be a whole number of at least 1, got 1.5"),
        ("width: true", "width must be a whole number of at least 1, got True"),
        ("seed: -1", "seed must be a whole number of at least 0, got -1"),
        ("rate: .inf", "rate must be a number above 0, got inf"),
        ("weight: -0.1", "weight must be a number of at least 0, got -0.1"),
        ("names: [1]", r"names must be a list of texts, got \[1\]"),
        ("colour: blue", "colour must be one of red, green, got 'blue'"),
        ("folder: ''", "folder must be a path, got ''"),
        ("quick: no", "quick must be true or false, got 'no'"),
        ("- width", "must hold one 'name: value' per line, got list"),
        ("width: [", "s.yaml is not valid YAML: while parsing"),
        ("[a]: 1", "is not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(GistError, match=message):
        from_file(tmp_path / "s.yaml", text)


def test_old_keys_are_read_for_one_release(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="s.yaml: widths is now called width"):
        assert from_file(tmp_path / "s.yaml", "widths: 5") == Table(width=5)


def test_a_wrong_keyword_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'wdith'"):
        build(1, wdith=3)
    with pytest.raises(GistError, match="width must be a whole number of at least 1, got '3'"):
        build(1, width="3")


def test_keywords_are_those_that_a_function_takes() -> None:
    def use(source: str, width: int = 1, rate: float = 1.0, other: int = 0) -> None: ...

    assert keywords_for(use, Table(source="a.txt", width=5)) == {"width": 5}
    assert keywords_for(use, Table(rate=2)) == {"width": 3, "rate": 2.0}


@dataclass(frozen=True, kw_only=True)
class More(Table):
    depth: int = setting(WHOLE, 3, "Depth.")


def test_keywords_of_a_part_of_a_table() -> None:
    def use(width: int = 1, depth: int = 0) -> None: ...

    assert keywords_for(use, More(), Table) == {"width": 3}
    assert keywords_for(use, More()) == {"width": 3, "depth": 3}


def test_every_setting_of_batches_takes_effect() -> None:
    """A renamed parameter of a collator would otherwise leave its setting without effect, and without an error."""
    from gisting import GistCollator
    from gisting.data.packing import GistPackingCollator
    from gisting.train.settings import BatchSettings

    used = {"max_per_group"}  # by finetune itself, which groups the records
    for collator in (GistCollator, GistPackingCollator):
        used |= inspect.signature(collator).parameters.keys()
    assert {each.name for each in fields(BatchSettings)} <= used


def test_every_setting_of_the_trainer_takes_effect(tmp_path: Path) -> None:
    from gisting.train.settings import Recipe

    changed = {"learning_rate": 0.5, "lr_scheduler_type": "linear", "warmup_steps": 7.0, "weight_decay": 0.25}
    changed |= {"max_steps": 9, "save_steps": 11, "logging_steps": 13, "seed": 17, "torch_compile": True}
    found = Recipe(**changed, num_workers=2, group_by_length=True).arguments(tmp_path)
    assert {name: getattr(found, name) for name in changed} == changed
    assert (found.dataloader_num_workers, found.train_sampling_strategy) == (2, "group_by_length")


def test_any_mapping_is_read(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("# prices\na: 1:10\n\n2: no", encoding="utf-8")
    assert read_yaml(tmp_path / "s.yaml") == ({"a": "1:10", 2: "no"}, {"a": 2, 2: 4})
