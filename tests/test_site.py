"""Check pages and settings of the documentation site cheaply; CI builds it, with warnings as errors.

The masks on the pages are redrawn, every page must be in the table of contents, and every public name in the reference.
The hook that converts pages and docstrings for the site is tested on small texts.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import gisting
from gisting import visibility
from tests.repository import make_dry_run, requires_make

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SETTINGS: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

# -- masks -------------------------------------------------------------------------------------------------------------

# `<!-- mask: BUILDER | TOKENS | NAME VALUES ... -->` and a fence. Capital letters are gist tokens; so are copies.
DRAWN = re.compile(r"<!-- mask: (.*?) -->\n```text\n(.*?)\n?```", re.S)


def redrawn(source: str, with_positions: bool) -> str:
    """Draw the mask that a comment on a page describes."""
    builder, line, *others = (part.strip() for part in source.split("|"))
    tokens = line.split()
    given = {name: values for name, *values in (other.split() for other in others)}
    window = given.pop("window", None)
    tensors = {name: torch.tensor([list(map(int, values))]) for name, values in given.items()}
    is_gist = torch.tensor([[token.isupper() for token in tokens]])
    if "copies" in tensors:
        tensors["is_copy"] = tensors.pop("copies").bool()
        is_gist |= tensors["is_copy"]
    mask = getattr(visibility, builder)(is_gist, **tensors)
    if window is not None:
        mask = mask.windowed(int(window[0]))
    lines = [mask.draw(tokens)]
    if with_positions:
        assert mask.position_ids is not None
        lines.append("positions " + " ".join(map(str, mask.position_ids[0].tolist())))
    return "\n".join(lines)


def drawings() -> list[Any]:
    return [
        pytest.param(page, *found.groups(), id=f"{page.stem}-{number}")
        for page in PAGES
        for number, found in enumerate(DRAWN.finditer(page.read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize(("page", "source", "drawing"), drawings())
def test_a_drawn_mask_is_what_its_builder_gives(page: Path, source: str, drawing: str) -> None:
    assert drawing == redrawn(source, "positions" in drawing), page.name


def test_concepts_draw_every_kind_of_mask() -> None:
    text = (DOCS / "concepts.md").read_text(encoding="utf-8")
    sources = [found[1] for found in DRAWN.finditer(text)]
    assert text.count("<!-- mask:") == len(sources), "a comment without a drawing after it would not be compared"
    builders = {source.split("|")[0].strip() for source in sources}
    assert builders == {"gist", "positive", "negative", "encoder_gist", "chained"}


@pytest.mark.parametrize(
    ("source", "drawing"),
    [
        ("gist | a G b", "  a G b\na 1 . .\nG 1 1 .\nb . 1 1\npositions -1 0 1"),
        ("gist | a b | documents 0 1", "  a b\na 1 .\nb . 1\npositions 0 0"),
        ("positive | a b c | window 2", "  a b c\na 1 . .\nb 1 1 .\nc . 1 1\npositions 0 1 2"),
    ],
)
def test_redrawn(source: str, drawing: str) -> None:
    assert redrawn(source, with_positions=True) == drawing


# -- pages and links ---------------------------------------------------------------------------------------------------


def pages_in(nav: Any) -> list[str]:
    """List the pages of a table of contents in order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages_in(part)]


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = pages_in(SETTINGS["nav"])
    assert len(listed) == len(set(listed))
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def test_a_warning_ends_the_build_and_nothing_is_fetched() -> None:
    assert SETTINGS["strict"] is True
    assert {value for part in SETTINGS["validation"].values() for value in part.values()} == {"warn"}
    assert SETTINGS["theme"]["font"] is False
    assert not {"extra_javascript", "extra_css", "repo_url", "site_url"} & SETTINGS.keys()
    (python,) = (plugin["mkdocstrings"]["handlers"]["python"] for plugin in SETTINGS["plugins"] if plugin != "search")
    assert "inventories" not in python


def dead_links(page: Path) -> list[str]:
    """Find links to missing files on a page in the repository. The build checks anchors."""
    found = re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s#]+)[^)]*\)", outside_fences(page.read_text(encoding="utf-8")))
    return [link for link in found if not re.match("https?:", link) and not (page.parent / link).exists()]


def outside_fences(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    assert dead_links(page) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "[a](page.md#b) [b](https://x.org) [c](gone.md#d)\n```\n[d](in-a-fence.md)\n```\n", encoding="utf-8"
    )
    assert dead_links(page) == ["gone.md"]


# -- the reference -----------------------------------------------------------------------------------------------------


def directives() -> list[str]:
    """List the dotted names of objects and modules that the pages of the reference show."""
    pages = sorted((DOCS / "reference").glob("*.md"))
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)]


def unshown(module: types.ModuleType, shown: set[str]) -> list[str]:
    """List names in ``__all__`` that no directive shows, neither by name nor with their module."""
    homes = {name: getattr(getattr(module, name), "__module__", module.__name__) for name in module.__all__}
    return [
        name
        for name in module.__all__
        if not name.startswith("__") and not {f"{module.__name__}.{name}", homes[name]} & shown
    ]


def test_every_public_name_is_in_the_reference() -> None:
    assert unshown(gisting, set(directives())) == []


@pytest.mark.parametrize(
    "name",
    ["attention", "cache", "data.records", "generation", "models.hub", "pipeline", "store", "table", "tokens"],
)
def test_public_names_of_modules_that_are_not_shown_whole(name: str) -> None:
    module = importlib.import_module(f"gisting.{name}")
    public = {getattr(gisting, one) for one in gisting.__all__}
    left = [one for one in unshown(module, set(directives())) if not is_among(getattr(module, one), public)]
    # Used only by other modules of the library.
    inner = {
        "check_complete",
        "check_origin",
        "parse_json",
        "rows_of",
        "say_shared",
        "to_record",
        "to_records",
        "find_file",
        "upload",
        "read_tokenizer",
    }
    assert set(left) <= inner


def is_among(value: Any, values: set[Any]) -> bool:
    return any(value is one for one in values)


def test_a_name_that_is_not_shown_is_found() -> None:
    assert unshown(gisting, set(directives()) - {"gisting.converse"}) == ["converse"]


def test_what_the_reference_shows_is_there_and_documented() -> None:
    """The site omits objects without docstrings. The extension uses the comment above a constant as its docstring."""
    griffe = pytest.importorskip("griffe")
    extensions = griffe.load_extensions(hooks().Docstrings())
    package = griffe.load("gisting", search_paths=[ROOT], extensions=extensions)
    faults = []
    for path in directives():
        found = package[path.removeprefix("gisting.")]
        parts = [found.members[name] for name in found.exports or ()] if found.is_module else []
        faults += [part.path for part in [found, *parts] if not part.has_docstring]
    assert faults == []


# -- the hook ----------------------------------------------------------------------------------------------------------


def hooks() -> types.ModuleType:
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("[recipes](../recipes/)", "a.md", "`recipes/`"),
        ("[a run](../recipes/b.yaml#x)", "a.md", "a run (`recipes/b.yaml`)"),
        ("[`examples/b.py`](../examples/b.py)", "a.md", "`examples/b.py`"),
        ("[b](b.md) [c](https://x.org) [d](#d)", "a.md", "[b](b.md) [c](https://x.org) [d](#d)"),
        ("[b](../b.md) [c](../../c.py)", "reference/a.md", "[b](../b.md) c (`c.py`)"),
        ("```text\n[b](../b.py)\n```\n", "a.md", "```text\n[b](../b.py)\n```\n"),
        ("<!-- rows -->\n| a |", "a.md", "\n<!-- rows -->\n\n| a |"),
    ],
)
def test_a_page_as_the_site_takes_it(text: str, path: str, expected: str) -> None:
    assert hooks().as_page(text, path) == expected


def test_a_docstring_as_the_site_takes_it(tmp_path: Path) -> None:
    griffe = pytest.importorskip("griffe")
    (tmp_path / "planted.py").write_text(
        '''
__all__ = ["LIMIT", "BARE", "A", "f"]
# The most,
# and more.
LIMIT = 3

BARE = 4

class A:
    def g(self):
        """As :meth:`h`, :func:`f` and :func:`~other.f`::

            1 .

        A line.
        """

    def h(self): ...

def f(): ...

class Pair(NamedTuple):
    left: int
    right: str = ""
''',
        encoding="utf-8",
    )
    module = griffe.load("planted", search_paths=[tmp_path], extensions=griffe.load_extensions(hooks().Docstrings()))
    shown = module["A.g"].docstring.value
    for target, name in (("planted.A.h", "h"), ("planted.f", "f"), ("other.f", "f")):
        assert f'<autoref identifier="{target}" optional><code>{name}</code></autoref>' in shown
    assert "</autoref>:\n\n    1 .\n" in shown
    assert module["LIMIT"].docstring.value == "The most,\nand more."
    assert not module["BARE"].has_docstring
    assert [(one.name, one.default) for one in module["Pair"].parameters][1:] == [("left", None), ("right", "''")]


def test_commands_as_the_site_takes_them() -> None:
    from typer.main import get_command

    from gisting.cli import app

    text = "\n\n".join(hooks().described(get_command(app), "gisting"))
    for words in ("gisting train", "gisting store list", "gisting show"):
        assert f"\n## {words}\n" in f"\n{text}"
    assert "| `--num-gist-tokens, -k` | Gist tokens between them. [default: 2] |" in text
    assert "```bash\ngisting show 'translate to French' 'good morning' -k 2\n```" in text


# -- how it is built ---------------------------------------------------------------------------------------------------


@requires_make
def test_make_docs() -> None:
    assert "mkdocs build --strict" in make_dry_run("docs")


def test_ci_builds_the_site() -> None:
    """The build must not be quiet, because MkDocs only counts warnings that it shows."""
    assert 'mkdocs" build --strict --site-dir' in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
