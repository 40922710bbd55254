"""Convert pages and docstrings for the documentation site: a hook of MkDocs and an extension of Griffe.

Pages can also be read as files of the repository, and docstrings in a terminal. Here links that leave docs/ become the
names of their targets, because the repository has no address to link to; roles in docstrings (``:func:`compress```)
become references, and drawings become Markdown.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

import griffe

_FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2[ \t]*$", re.M | re.S)
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(\s*([^)\s#]+)(#[^)\s]*)?\s*\)")
_COMMENT = re.compile(r"^( *<!--.*?-->)$", re.M)
_ROLE = re.compile(r":(?:py:)?(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")
_LITERAL = re.compile(r"::(?=\n\n[ ]+\S)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Handle MkDocs' event for the Markdown of a page."""
    if "<!-- commands -->" in markdown:
        from typer.main import get_command

        from gisting.cli import app

        markdown = markdown.replace("<!-- commands -->", "\n\n".join(described(get_command(app), "gisting")))
    return as_page(markdown, page.file.src_uri)


def described(command: Any, name: str) -> list[str]:
    """Describe a command and its subcommands in Markdown: help, options, examples.

    Args:
        command: the result of typer's ``get_command`` for an app.
        name: what users type to run it.

    Returns:
        Paragraphs, tables and fences.
    """
    if hasattr(command, "commands"):
        below = command.commands.items()
        return [part for word, inner in below for part in described(inner, f"{name} {word}")]
    rows = ["| | |", "|---|---|"]
    for option in command.params:
        if option.hidden:
            continue
        is_option = option.param_type_name == "option"
        words = ", ".join([*option.opts, *option.secondary_opts]) if is_option else option.name.upper()
        told = [option.help or ""]
        if option.required:
            told.append("Required." if is_option else "")
        elif option.show_default and not (option.default in (None, (), []) or isinstance(option.default, bool)):
            told.append(f"[default: {option.default}]")
        rows.append(f"| `{words}` | {_in_a_cell(' '.join(filter(None, told)))} |")
    parts = [f"## {name}", _as_text(command.help or "")]
    if len(rows) > 2:
        parts.append("\n".join(rows))
    if command.epilog:
        lines = [line.strip() for line in command.epilog.splitlines() if line.startswith("  ")]
        parts.append("\n".join(["```bash", *lines, "```"]))
    return parts


def _as_text(text: str) -> str:
    """Escape tags in a help text."""
    return text.replace("<", "&lt;")


def _in_a_cell(text: str) -> str:
    return _as_text(" ".join(text.split())).replace("|", "\\|")


def as_page(markdown: str, path: str) -> str:
    """Convert a page for the site.

    Args:
        markdown: the page in the repository.
        path: its path, relative to docs/.

    Returns:
        The text with links out of docs/ replaced by names, and with empty lines around comments, because otherwise
        Python-Markdown does not recognise a table next to them. Fences are unchanged.
    """
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_outside_fences(markdown[end : fence.start()], path), fence.group()]
        end = fence.end()
    return "".join([*parts, _outside_fences(markdown[end:], path)])


def _outside_fences(text: str, path: str) -> str:
    def named(link: re.Match[str]) -> str:
        label, target = link[1], link[2]
        where = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if re.match(r"[a-z]+:", target) or not where.startswith("../"):
            return link[0]
        where = where.removeprefix("../") + ("/" if target.endswith("/") else "")
        plain = label.replace("`", "").rstrip("/")
        return f"`{where}`" if where.rstrip("/").endswith(plain) else f"{label} (`{where}`)"

    return _COMMENT.sub(r"\n\1\n", _LINK.sub(named, text))


class Docstrings(griffe.Extension):
    """Convert docstrings to Markdown. Roles become references if the site shows their target, and code otherwise.

    The docstring of a constant in ``__all__`` is the comment above it.
    """

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Handle Griffe's event for a loaded object."""
        if obj.docstring is None and obj.is_attribute and obj.lineno and obj.name in (obj.module.exports or ()):
            comment = _comment_above(obj.module.lines, obj.lineno)
            obj.docstring = griffe.Docstring(comment, parent=obj) if comment else None
        if obj.docstring is not None:
            text = _ROLE.sub(lambda role: _reference(obj, role), obj.docstring.value)
            obj.docstring.value = _LITERAL.sub(":", text)

    def on_class(self, *, cls: griffe.Class, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Handle Griffe's event for a loaded class, and give named tuples a constructor with their fields.

        Griffe itself does so for dataclasses.
        """
        if "NamedTuple" in map(str, cls.bases):
            kind = griffe.ParameterKind.positional_or_keyword
            members = [member for member in cls.members.values() if isinstance(member, griffe.Attribute)]
            fields = [member for member in members if "property" not in member.labels]
            parameters = [
                griffe.Parameter(field.name, annotation=field.annotation, kind=kind, default=field.value)
                for field in fields
            ]
            init = griffe.Function(
                "__init__", parameters=griffe.Parameters(griffe.Parameter("self", kind=kind), *parameters)
            )
            cls.set_member("__init__", init)


def _comment_above(lines: list[str], number: int) -> str:
    """Return the comment that ends in the line before line ``number`` (counted from 1), or an empty text."""
    found: list[str] = []
    for line in reversed(lines[: number - 1]):
        if not line.startswith("#"):
            break
        found.insert(0, line.lstrip("#: "))
    return "\n".join(found)


def _reference(obj: griffe.Object, role: re.Match[str]) -> str:
    name = role[2]
    shown = name.rpartition(".")[2] if role[1] else name
    return f'<autoref identifier="{_path_of(obj, name)}" optional><code>{shown}</code></autoref>'


def _path_of(obj: griffe.Object, name: str) -> str:
    """Return the full dotted path of a name in a docstring, which may be that of a member of the class or module."""
    first, _, rest = name.partition(".")
    scope: Any = obj
    while scope is not None:
        if first in scope.members:
            return ".".join(filter(None, (scope.path, first, rest)))
        scope = scope.parent
    return name
